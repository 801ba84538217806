"""Writing PEFT's adapters of products: LOHA and LOKR, each a method of its own beside LORA.

The keys are those that `peft_kinds.py` reads; the scale is alpha / r with `r` and `alpha` of the config, per layer in
`rank_pattern` and `alpha_pattern`. PEFT makes its tensors from the config alone and then fills them, so that the config
has to lead to the shapes in the file: `use_effective_conv2d` to Tucker cores, and for LoKr `r`, `decompose_both` and
`decompose_factor` to where it cuts a dimension in two and which factor it keeps whole (`peft_lokr.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loratool import folding
from loratool.adapter import Adapter, Targeted
from loratool.bundle import Bundle
from loratool.checkpoint import Checkpoint
from loratool.conventions import peft_lokr
from loratool.conventions.peft_about import About
from loratool.conventions.peft_folder import INSIDE, PART_OF_A_TENSOR, Homes, folder, leaf
from loratool.conventions.peft_layout import pattern, plain_number, target_modules, usual
from loratool.conventions.writing import Misfit, Options, grouped
from loratool.names import modules, natural, parent
from loratool.tensors import Shape, TensorRef
from loratool.updates import Loha, Lokr, Lora, Replace, Scaling

_MATRICES = {"lora", "dora", "loha", "lokr"}
TITLES = {"loha": "LoHa", "lokr": "LoKr"}


def kind_of(adapter: Adapter) -> str | None:
    """``loha`` or ``lokr``, if all updates of matrices are of that kind; None where it takes a LORA adapter."""
    kinds = {item.update.kind for item in adapter.updates} & _MATRICES
    return kinds.pop() if len(kinds) == 1 and kinds <= TITLES.keys() else None


def misfits(adapter: Adapter, kind: str) -> list[Misfit]:
    targets = adapter.targets()
    layers = {parent(name) for name, items in targets.items() if any(item.update.kind == kind for item in items)}
    found = {name: _misfit(name, items, kind, layers) for name, items in targets.items()}
    if kind == "lokr":
        sound = {name: item.target.shape for name, item in _layers(adapter, kind).items() if found[name] is None}
        found |= peft_lokr.misfits(_lokrs(adapter), sound)
    return grouped(found.items())


def _misfit(name: str, items: Sequence[Targeted], kind: str, layers: set[str]) -> Misfit | None:
    """Why an adapter of this method can not hold the updates of one tensor."""
    title = TITLES[kind]
    mine = [item for item in items if item.update.kind == kind]
    if other := sorted({item.update.kind for item in items} - {kind, "replace"}):
        return Misfit((), f"a {title} adapter of PEFT has no {other[0]} update")
    if any(not item.target.covers_all for item in items):
        return PART_OF_A_TENSOR if not mine else Misfit((), f"PEFT has {title} of whole layers only")
    if not mine:
        return None
    target = mine[0].target
    if leaf(name) != "weight" or not parent(name) or target.layout or len(target.shape) > 4:
        return Misfit((), f"PEFT has {title} of Linear, Conv1d and Conv2d layers only")
    if len(mine) > 1:
        return Misfit((), f"PEFT has one {title} per layer")
    if any(parent(name).startswith(outer + ".") for outer in layers):
        return INSIDE
    return None


def write(adapter: Adapter, kind: str, base: Checkpoint | None, options: Options) -> Bundle:
    layers = _layers(adapter, kind)
    written = _lohas(layers) if kind == "loha" else _lokr_layers(adapter, layers)
    tensors = {key: ref for name in sorted(layers, key=natural) for key, ref in written.layers[name].tensors.items()}
    whole = {item.target.name: item.update.value for item in adapter.updates if isinstance(item.update, Replace)}
    wrapped = [parent(name) for name in layers]
    known = None if base is None else modules(base.tensors)
    about = About.of(adapter, kind.upper(), base, options)
    homes = Homes.of(whole, dict.fromkeys(wrapped, 1), base, about.saved)
    ranks = {pattern(parent(name)): layer.rank for name, layer in written.layers.items()}
    alphas = {pattern(parent(name)): layer.alpha for name, layer in written.layers.items()}
    rank, alpha = usual(ranks, 8), usual(alphas, 8)
    config = {
        "peft_type": kind.upper(),
        "inference_mode": True,
        "r": rank,
        "alpha": alpha,
        "rank_pattern": {pattern: value for pattern, value in ranks.items() if value != rank},
        "alpha_pattern": {pattern: value for pattern, value in alphas.items() if value != alpha},
        "init_weights": True,
        "target_modules": about.targets(wrapped, known) or target_modules(wrapped, known),
        "modules_to_save": [*homes.saved] or None,
        **written.config,
    }
    notes = [*_notes(kind, homes), *written.notes]
    if options.uniform:
        notes.append(folding.uniform_note((), ()))
    return folder(about, config, {**tensors, **homes.tensors}, notes)


def _notes(kind: str, homes: Homes) -> Iterator[str]:
    yield f"vLLM and others that load LoRA only do not load PEFT's {TITLES[kind]}"
    if homes.direct:
        why = "they are loaded into the base model itself, where no other adapter and no switching off undoes them"
        yield f"{len(homes.direct)} whole tensors ({homes.direct[0]} ...) are not in modules_to_save: {why}"


# -- layers -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Layer:
    """One layer as PEFT holds it: tensors by key, and what the config says of it."""

    tensors: Mapping[str, TensorRef]
    rank: int
    alpha: float


@dataclass(frozen=True)
class _Written:
    layers: Mapping[str, _Layer]  # by the tensor they change
    config: Mapping[str, Any]
    notes: Sequence[str]


def _layers(adapter: Adapter, kind: str) -> dict[str, Targeted]:
    return {item.target.name: item for item in adapter.updates if item.update.kind == kind}


def _alpha(scaling: Scaling, rank: int) -> float:
    """The alpha that gives an update's scale at a rank."""
    if scaling.rule == "alpha/rank" and scaling.rank == rank and scaling.alpha is not None:
        return plain_number(scaling.alpha)
    alpha = folding.by_rank(scaling.factor, rank).alpha
    assert alpha is not None
    return plain_number(alpha)


def _has_kernel(shape: Shape) -> bool:
    """Whether a layer can have a Tucker core in PEFT: a convolution whose kernel is not 1."""
    return any(size != 1 for size in shape[2:])


def _core(mid: TensorRef, shape: Shape) -> TensorRef:
    """PEFT's core [rank, rank, height, width]; that of a 1-d convolution has a width of 1."""
    return mid.reshape(*mid.shape, 1) if len(shape) == 3 else mid


def _cores(cores: Mapping[str, bool], shapes: Mapping[str, Shape]) -> tuple[bool, list[str]]:
    """`use_effective_conv2d`, from which layers have a Tucker core; and a note on those that lose theirs.

    PEFT has a core in every convolution whose kernel is not 1, or in none.
    """
    able = [core for name, core in cores.items() if _has_kernel(shapes[name])]
    stay = bool(able) and all(able)
    lost = sum(cores.values()) - (len(able) if stay else 0)
    why = "PEFT has them in all convolutions with a kernel or in none"
    return stay, [f"{lost} Tucker cores are multiplied in, in float32: {why}"] if lost else []


def _lohas(layers: Mapping[str, Targeted]) -> _Written:
    shapes = {name: item.target.shape for name, item in layers.items()}
    lohas = {name: item.update for name, item in layers.items() if isinstance(item.update, Loha)}
    stay, notes = _cores({name: update.mid1 is not None for name, update in lohas.items()}, shapes)
    made = {name: _loha(parent(name), update, shapes[name], stay) for name, update in lohas.items()}
    return _Written(made, {"use_effective_conv2d": stay}, notes)


def _loha(module: str, update: Loha, shape: Shape, stay: bool) -> _Layer:
    """(w1_a @ w1_b) * (w2_a @ w2_b): w_a [out, rank], w_b [rank, in * kernel]; with cores t, w_a is [rank, out]."""
    one = Lora(update.A1, update.B1, update.factors, update.mid1)
    two = Lora(update.A2, update.B2, update.factors, update.mid2)
    if not (stay and _has_kernel(shape)):
        one, two = folding.without_core(one), folding.without_core(two)
    rank, tensors = folding.rank_of(one), {}  # the same of both
    for number, half in enumerate((one, two), 1):
        if half.mid is not None:
            tensors[f"{module}.hada_t{number}"] = _core(half.mid, shape)
        tensors[f"{module}.hada_w{number}_a"] = half.B if half.mid is None else half.B.T
        tensors[f"{module}.hada_w{number}_b"] = half.A.reshape(rank, half.A.numel // rank)
    return _Layer(tensors, rank, _alpha(update.factors, rank))


def _lokrs(adapter: Adapter) -> dict[str, Lokr]:
    return {item.target.name: item.update for item in adapter.updates if isinstance(item.update, Lokr)}


def _lokr_layers(adapter: Adapter, layers: Mapping[str, Targeted]) -> _Written:
    lokrs, shapes = _lokrs(adapter), {name: item.target.shape for name, item in layers.items()}
    factor, both, forms = peft_lokr.plan(lokrs, shapes)
    stay, notes = _cores({name: lokrs[name].mid2 is not None for name, form in forms.items() if form.right}, shapes)
    made = {name: _lokr(parent(name), lokrs[name], shapes[name], form, stay) for name, form in forms.items()}
    if multiplied := sum(form.multiplied for form in forms.values()):
        why = "PEFT's r and decompose_both do not allow it to be of low rank"
        notes.append(f"{multiplied} factors of low rank are written whole, multiplied in float32: {why}")
    return _Written(made, {"use_effective_conv2d": stay, "decompose_both": both, "decompose_factor": factor}, notes)


def _lokr(module: str, update: Lokr, shape: Shape, form: peft_lokr.Form, stay: bool) -> _Layer:
    """kron(w1, w2): w1 [a, c] or w1_a [a, rank] @ w1_b [rank, c]; w2 [b, d, kernel] or of w2_a, w2_b and perhaps t2."""
    rank, tensors = form.rank, {}
    if update.w1 is not None:
        tensors["lokr_w1"] = update.w1
    else:
        assert update.A1 is not None and update.B1 is not None, "a factor is whole or a product"
        left = Lora(update.A1, update.B1, update.factors)
        if form.left:
            left = folding.padded(left, rank)
            tensors |= {"lokr_w1_a": left.B, "lokr_w1_b": left.A}
        else:
            tensors["lokr_w1"] = folding.multiplied(left)
    if update.w2 is not None:
        tensors["lokr_w2"] = update.w2
    else:
        assert update.A2 is not None and update.B2 is not None, "a factor is whole or a product"
        right = Lora(update.A2, update.B2, update.factors, update.mid2)
        if not form.right:
            tensors["lokr_w2"] = folding.multiplied(right)
        elif update.mid2 is not None and stay and _has_kernel(shape):
            right = folding.padded(right, rank)
            assert right.mid is not None, "padding keeps a core"
            tensors |= {"lokr_w2_a": right.B.T, "lokr_w2_b": right.A, "lokr_t2": _core(right.mid, shape)}
        else:
            right = folding.padded(folding.without_core(right), rank)
            tensors |= {"lokr_w2_a": right.B, "lokr_w2_b": right.A.reshape(rank, right.A.numel // rank)}
    return _Layer({f"{module}.{key}": ref for key, ref in tensors.items()}, rank, _alpha(update.factors, rank))
