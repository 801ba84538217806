"""Writing mlx-lm's adapters: a folder that its `load_adapters` takes.

It wraps the modules that the config's `keys` and `num_layers` name, all at one rank and one scale, and then refuses
tensors that the wrappers do not have. A full fine-tune is whole tensors and nothing else. Every line here is tested by
loading the folder with mlx-lm.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from loratool import folding
from loratool.adapter import Adapter, Targeted
from loratool.bundle import Bundle, Content, Safetensors, document
from loratool.checkpoint import Checkpoint
from loratool.conventions.mlx_names import MlxModel, is_embedding, is_foreign, keys_and_layers, may_be_shifted
from loratool.conventions.writing import Misfit, Options, grouped
from loratool.errors import LoratoolError
from loratool.names import natural, parent
from loratool.tensors import TensorRef
from loratool.updates import Dora, Lora, Replace

FILE_STEM = "adapters"
WITH_MLX_BASE = "give the MLX model with --base BASE; mlx_lm.convert makes it from the Hugging Face one"
MULTIMODAL = "model.language_model."  # transformers' prefix, which each of MLX's models turns into one of its own
EXPERTS = Misfit(
    (),
    "MLX stacks the experts in other tensors",
    f"give the base with --base BASE, its config.json beside it; or {WITH_MLX_BASE}",
    bakeable=False,
)
TURNED = Misfit((), "MLX has no layer that stores [in, out]", WITH_MLX_BASE, bakeable=False)
SHIFTED = Misfit(
    (), "MLX stores the norms of this model as weight + 1, and nothing shows which the adapter has", bakeable=False
)
OTHER_SHAPE = Misfit((), "mlx-lm loads no tensor that the base lacks, or has in another shape", bakeable=False)
CONVOLUTION = Misfit((), "MLX has the input channels of a convolution last", WITH_MLX_BASE, bakeable=False)


def misfits(adapter: Adapter, base: Checkpoint | None, options: Options) -> list[Misfit]:
    model, targets = MlxModel(None if base is None else base.tensors), adapter.targets()
    return [*grouped((name, _misfit(name, items, model)) for name, items in targets.items()), *_mixed(targets)]


def write(adapter: Adapter, base: Checkpoint | None, options: Options) -> Bundle:
    model = MlxModel(None if base is None else base.tensors)
    targets = Adapter(model.led(adapter.updates)).targets()
    updates = {name: targets[name] for name in sorted(targets, key=natural)}
    config: dict[str, Any] = {"model": adapter.base.name}
    tensors: dict[str, TensorRef] = {}
    notes: list[str] = []
    if any(item.update.kind == "replace" for item in adapter.updates):
        tensors = {name: _whole(items, model.tensors.get(name)) for name, items in updates.items()}
        config |= {"fine_tune_type": "full", "num_layers": -1}
    else:
        layers, notes = _low_rank(updates)
        for name, item in layers.items():
            tensors |= _parts(parent(name), item)
        config |= _parameters(layers, model.tensors)
    if doubles := sum(ref.dtype == "F64" for ref in tensors.values()):
        notes.append(f"{doubles} float64 tensors are rounded to float32: mlx-lm loads no larger floats")
    tensors = {name: folding.single(ref) for name, ref in tensors.items()}
    notes += _other_names(tensors, base)
    files: dict[str, Content] = {
        "adapter_config.json": document(dict(sorted(config.items()))),
        f"{FILE_STEM}.safetensors": Safetensors(tensors, {"format": "mlx"}),
    }
    return Bundle(files, tuple(notes))


def _other_names(tensors: Iterable[str], base: Checkpoint | None) -> Iterator[str]:
    of_mlx = base is not None and base.metadata.get("format") == "mlx"
    if not of_mlx and any(name.startswith(MULTIMODAL) for name in tensors):
        yield f"most models with names in {MULTIMODAL} have others in MLX; if mlx-lm refuses them, {WITH_MLX_BASE}"


# -- what does not fit ------------------------------------------------------------------------------------------------


def _misfit(name: str, items: Sequence[Targeted], model: MlxModel) -> Misfit | None:
    """Why mlx-lm can not hold the updates of one tensor."""
    renamed = model.renames(name)
    if not renamed and is_foreign(name):
        return EXPERTS
    kinds = {item.update.kind for item in items}
    if other := sorted(kinds - {"lora", "dora", "replace"}):
        return Misfit((), f"mlx-lm has LoRA, DoRA and whole tensors, no {other[0]} update")
    if "replace" in kinds:
        found = _misfit_whole(name, items, renamed, model)
    else:
        found = _misfit_layer(name, items, renamed)
    if found is None and renamed:
        return _misfit_move(items, model)
    return found


def _misfit_move(items: Sequence[Targeted], model: MlxModel) -> Misfit | None:
    """Whether updates of experts can go into MLX's stacks, and from there into this base again."""
    try:
        moved = model.led(items)
        if "replace" in {item.update.kind for item in items}:
            model.back(moved)  # its parts can not always be put together again
    except LoratoolError as error:
        why = f"MLX stacks the experts in other tensors, and they can not be moved: {error.problems[0].message}"
        return Misfit((), why, WITH_MLX_BASE, bakeable=items[0].update.kind != "replace")
    return None


def _misfit_whole(name: str, items: Sequence[Targeted], renamed: bool, model: MlxModel) -> Misfit | None:
    target = items[0].target
    if len(items) > 1 or target.rows is not None or target.expert is not None:
        return Misfit((), "mlx-lm replaces whole tensors only, and once")
    if may_be_shifted(name, model.base):
        return SHIFTED
    if model.base is not None and (name not in model.base or model.base[name].shape != target.shape):
        return OTHER_SHAPE
    if "conv" in name and len(target.shape) == 3 and target.shape[1] == 1 < target.shape[2]:
        return CONVOLUTION  # of single channels, [out, 1, width]: MLX has [out, width, 1]
    return None


def _misfit_layer(name: str, items: Sequence[Targeted], renamed: bool) -> Misfit | None:
    target = items[0].target
    if not renamed and (not name.endswith(".weight") or not parent(name)):
        return Misfit((), "mlx-lm adapts the weights of layers, no other parameters")
    if len(target.matrix) != 2:
        return Misfit((), "mlx-lm adapts matrices and stacks of them")
    if target.layout == "in_out" and not renamed:
        return TURNED
    for update in (item.update for item in items):
        if not isinstance(update, Dora):
            continue
        if not isinstance(update.direction, Lora):
            return Misfit((), f"mlx-lm has DoRA on LoRA only, not on {update.direction.kind}")
        if renamed or not target.covers_all:
            return Misfit((), "mlx-lm has DoRA of whole layers only, not of experts or ranges of rows")
        if update.axis != 0:
            return Misfit((), "mlx-lm takes DoRA's norm along another axis, for embeddings that of each token")
    return None


def _mixed(targets: Mapping[str, Sequence[Targeted]]) -> list[Misfit]:
    """An adapter is LoRA, or DoRA, or whole tensors: the rarer do not fit, nor does anything beside whole tensors."""
    of = {word: [name for name, items in targets.items() if _word(items) == word] for word in ("lora", "dora", "whole")}
    if of["whole"] and (low := of["lora"] + of["dora"]):
        why = f"mlx-lm has whole tensors in a full fine-tune only, without LoRA, and {of['whole'][0]} is one"
        return [Misfit(tuple(low), why)]
    if of["lora"] and of["dora"]:
        rarer, other = sorted((of["lora"], of["dora"]), key=len)
        word = "LoRA without a magnitude" if rarer is of["dora"] else "DoRA"
        return [Misfit(tuple(rarer), f"fine_tune_type is one for all layers, and {len(other)} others are {word}")]
    return []


def _word(items: Sequence[Targeted]) -> str:
    return {"lora": "lora", "dora": "dora", "replace": "whole"}.get(items[0].update.kind, "")


# -- tensors ----------------------------------------------------------------------------------------------------------


def _whole(items: Sequence[Targeted], stored: TensorRef | None) -> TensorRef:
    """The new tensor; where it is put together of experts, those without a new one are the base's."""
    parts = {item.target.expert: item.update.value for item in items if isinstance(item.update, Replace)}
    if None in parts:
        return parts[None]
    shape = items[0].target.shape
    places = [(value.reshape(1, *shape[1:]), (expert or 0, *(0 for _ in shape[1:]))) for expert, value in parts.items()]
    if len(parts) < shape[0]:
        assert stored is not None, "only a base leads to stacks"
        places.insert(0, (stored, (0,) * len(shape)))
    return folding.assembled(shape, places)


def _low_rank(layers: Mapping[str, list[Targeted]]) -> tuple[dict[str, Targeted], list[str]]:
    """One LoRA or DoRA of each tensor, all at one rank and scale; and what was done to that end."""
    found = {name: _one_layer(items) for name, items in layers.items()}
    notes = []
    if several := sum(len({item.target.expert for item in items}) < len(items) for items in layers.values()):
        notes.append(f"{several} tensors had several LoRAs: their factors are side by side, in one of a larger rank")
    if stacks := sum(any(item.target.expert is not None for item in items) for items in layers.values()):
        notes.append(f"updates of single experts are in {stacks} stacks; an expert without one has zeros")
    loras = [lora for item in found.values() if (lora := folding.low_rank(item.update)) is not None]
    if len({(folding.rank_of(lora), lora.factors.factor) for lora in loras}) > 1:
        even = folding.uniform(found.values())
        notes.append(folding.uniform_note(found.values(), even))
        found = dict(zip(found, even, strict=True))
    return found, notes


def _one_layer(items: Sequence[Targeted]) -> Targeted:
    first = items[0]
    if isinstance(first.update, Dora):
        direction = folding.low_rank(first.update)
        assert direction is not None, "the updates were checked"
        return replace(first, update=replace(first.update, direction=folding.without_core(direction)))
    return folding.merged_factors(items)


def _parts(module: str, item: Targeted) -> Iterator[tuple[str, TensorRef]]:
    """The tensors of one module."""
    lora = folding.low_rank(item.update)
    assert lora is not None, "the updates were checked"
    A, B = lora.A, lora.B  # [rank, in], [out, rank]; of experts with one more dimension in front
    if item.target.layout == "embedding" or is_embedding(module):
        A, B = B, A  # [tokens, rank], [rank, dim]
    elif not item.target.stacked:
        A, B = A.T, B.T  # [in, rank], [rank, out]
    yield f"{module}.lora_a", A
    yield f"{module}.lora_b", B
    if isinstance(item.update, Dora):
        yield f"{module}.m", item.update.magnitude  # [out], of an embedding [tokens]


def _parameters(layers: Mapping[str, Targeted], known: Collection[str]) -> dict[str, Any]:
    """The part of the config that says which modules to wrap, and how."""
    lora = folding.low_rank(next(iter(layers.values())).update)
    assert lora is not None, "the updates were checked"
    keys, num_layers = keys_and_layers([*map(parent, layers)], known)
    dora = any(isinstance(item.update, Dora) for item in layers.values())
    rank, scale = folding.rank_of(lora), lora.factors.factor
    return {
        "fine_tune_type": "dora" if dora else "lora",
        "num_layers": num_layers,
        "lora_parameters": {"rank": rank, "scale": scale, "dropout": 0.0, "keys": keys},
    }
