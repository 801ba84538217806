"""PEFT's saved adapter: ``adapter_model.safetensors`` (or .bin) beside ``adapter_config.json``.

Keys are ``base_model.model.`` + module path + a part: ``.lora_A.weight`` [rank, in], ``.lora_B.weight`` [out, rank],
``.lora_embedding_A`` [rank, tokens], ``.lora_embedding_B`` [dim, rank], ``.lora_magnitude_vector``, those of LoHa, LoKr
and AdaLoRA (`peft_kinds`), and whole tensors for trained heads and biases. Rank and alpha may differ per module
(`rank_pattern`, `alpha_pattern`). PEFT's `peft/tuners/` and `peft/utils/save_and_load.py` are the reference; every line
here is tested against it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from loratool.adapter import Adapter, BaseIdentity, Target, Targeted
from loratool.checkpoint import Checkpoint
from loratool.conventions import peft_components, peft_ia3, peft_kinds, torchtune
from loratool.conventions.architecture import model_type_of
from loratool.conventions.choices import Choices
from loratool.conventions.peft_base import BaseFacts
from loratool.conventions.peft_config import MAX_ROW, PeftConfig, chosen_config, parse, refuse_unsupported
from loratool.conventions.peft_folder import FILE_STEM
from loratool.conventions.peft_layers import replicate
from loratool.conventions.peft_names import PART, PREFIX, Module, is_wrapped, saved_name, sort_keys
from loratool.conventions.peft_scales import PeftScales
from loratool.conventions.peft_tokens import patched, reordered, row_numbers
from loratool.conventions.scales import Scales
from loratool.conventions.unknown_keys import alike
from loratool.errors import ChoiceNeeded, InvalidFile, LoratoolError, Mismatch, Problem, Unsupported
from loratool.format import is_native
from loratool.names import modules, natural, parent, prefix_rule
from loratool.tensors import Shape, TensorRef
from loratool.updates import Add, Dora, Lora, Replace, ReplaceRows, Scaling

NAME = "peft"
TITLE = "PEFT adapter"
KINDS = ("lora", "dora", "loha", "lokr", "scale", "replace", "add", "replace_rows")
TESTED = "peft 0.21.2"
OPTIONS = ("uniform", "task_type", "base_name", "revision")
SUFFIXES: tuple[str, ...] = ()
ASKS = ("alpha", "scaling", "config", "layout")
CONDITIONS = ("tokens",)
misfits, write = peft_components.misfits, peft_components.write


def detect(source: Checkpoint) -> bool:
    if is_wrapped(source.tensors):
        return False  # hand-dumped or wrapped: the adapter's name is still in the keys
    if is_native(source.metadata) or torchtune.has_factors(source.tensors):
        return False  # torchtune's own file lies beside the same config
    if source.shards[0].path.stem == FILE_STEM and "peft_type" in (_side_config(source) or {}):
        return True
    return any(name.startswith(PREFIX) and PART.match(name) for name in source.tensors)


def read(source: Checkpoint, choices: Choices, base: Mapping[str, TensorRef] | None) -> Adapter:
    config = chosen_config(choices.config, _side_config(source), str(source.path))
    parsed = None
    if config is not None:
        refuse_unsupported(config, str(source.path), base_inside=False)
        parsed = parse(config, str(source.path))
    parts: dict[str, TensorRef] = {}
    for name, ref in source.tensors.items():
        if (same := parts.setdefault(saved_name(name), ref)) is not ref:
            what = f"{name} and {same.name} both stand for {saved_name(name)}"
            raise InvalidFile(Problem("E-DUPLICATE", what, str(source.path), "keep one of them"))
    adapter = PeftReader(parts, parsed, Scales(source, choices), base).adapter()
    return replace(adapter, provenance={"convention": NAME}, notes=(*source.notes, *adapter.notes))


def unwrap(source: Checkpoint, choices: Choices) -> Mapping[str, TensorRef]:
    return {}


def is_bare(source: Checkpoint) -> bool:
    """Whether a file holds factors under PEFT's names and nothing else, without its prefix: dumped by hand."""
    names = [*source.tensors]
    return any(name.endswith(".lora_A.weight") for name in names) and all(map(PART.match, names))


def _side_config(source: Checkpoint) -> dict[str, Any] | None:
    """The config beside the weights: of a folder, or of a file under PEFT's own name. Any other may be a stranger's."""
    own = source.path.is_dir() or source.path.stem == FILE_STEM
    return source.side_json("adapter_config.json") if own else None


@dataclass
class PeftReader:
    """Turns keys of the saved form into updates. Wrapped checkpoints are brought into the saved form first."""

    parts: Mapping[str, TensorRef]
    config: PeftConfig | None
    sources: Scales
    base: Mapping[str, TensorRef] | None
    notes: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    rename: Callable[[str], str] = str  # the base's name for one of the adapter's modules; known once keys are sorted

    def __post_init__(self) -> None:
        self.choices, self.where = self.sources.choices, self.sources.where
        self.facts = BaseFacts(self.base, self.config, self.choices, self.where)
        self.scales = PeftScales(self.sources, self.config, self.notes)

    def adapter(self) -> Adapter:
        keys = sort_keys(self.parts, self.where)
        wrapped, whole = keys.modules, keys.whole
        self.notes += keys.notes
        if not wrapped and not whole:
            raise InvalidFile(Problem("E-EMPTY", "no adapter tensor in it", self.where))
        copies = self._replicated()
        self.rename = self._match(wrapped, whole)
        self.choices.check_used([name for module in wrapped for name in self._names(module)], self.where)
        self.problems += self._torchtunes_rows(wrapped)
        updates = [Targeted(Target(name, ref.shape), Replace(ref)) for name, ref in copies.items()]
        if self.base is not None:  # a whole tensor in the adapter is what its deltas were trained on
            self.base = {**self.base, **{self._renamed(name): ref for name, ref in whole.items()}}
            self.facts = replace(self.facts, base=self.base)
        updates += [item for module in self._split_tokens(wrapped, whole) for item in self._guarded(module)]
        updates = [item for item in updates if not self._replaced_anyway(item, whole)]
        updates += [self._replacement(name, ref) for name, ref in whole.items()]
        self.problems += self.sources.contradictions()
        if self.problems:
            raise Mismatch(self.problems)
        self.sources.check()
        self.notes += self.sources.notes()
        # Replacements come before the deltas on top of them (an embedding that was resized, then trained).
        updates.sort(key=lambda item: (natural(item.target.name), item.update.role != "replace"))
        config = self.config or PeftConfig()
        when = {"tokens": [*config.invocation]} if config.invocation else {}
        base = BaseIdentity(config.base_name, revision=config.revision)
        return Adapter(tuple(updates), base, notes=tuple(self.notes), doubts=tuple(self.facts.doubts), when=when)

    def _names(self, module: Module) -> list[str]:
        """What a pattern of the user's can match: the module, and its parameters where those are adapted one by one."""
        owner = self.rename(module.name)
        below = self.facts.parameters.get(owner, [])
        return [module.name, *(f"{module.name}.{last}" for last in below if last not in ("weight", "bias"))]

    def _replicated(self) -> Mapping[str, TensorRef]:
        """Makes the base the longer stack that the adapter was trained on; its tensors that are copies of others."""
        if self.config is None or not self.config.layer_replication:
            return {}
        if self.base is None:
            self.facts.doubts.append("which of the base's layers its layer_replication repeats")
            return {}
        grown = replicate(self.base, self.config.layer_replication, self.where)
        self.base = grown.base
        self.facts = replace(self.facts, base=self.base)
        self.notes.append(grown.note)
        return grown.copies

    def _replaced_anyway(self, item: Targeted, whole: Mapping[str, TensorRef]) -> bool:
        """Whether a copied layer's tensor was trained as a whole, so that the adapter has it itself."""
        return item.update.kind == Replace.kind and item.target.name in {self._renamed(name) for name in whole}

    # -- keys ---------------------------------------------------------------------------------------------------------

    def _match(self, wrapped: list[Module], whole: Mapping[str, TensorRef]) -> Callable[[str], str]:
        """The rule that turns the adapter's module names into the base's."""
        wanted = ({parent(name) for name in whole} | {module.name for module in wrapped}) - {""}
        rename, notes = prefix_rule(wanted, wanted if self.base is None else modules(self.base), self.where)
        self.notes += notes
        return rename

    def _split_tokens(self, wrapped: list[Module], whole: dict[str, TensorRef]) -> Iterator[Module]:
        """Resolve what is stored twice: an embedding saved whole (resized) together with trained rows of it."""
        for module in wrapped:
            resized = module.parts.pop("base_layer.weight", None)
            if resized is not None and "trainable_tokens_delta" in module.parts:
                rows = module.parts.pop("trainable_tokens_delta")
                whole[f"{module.name}.weight"] = patched(
                    resized, rows, self._token_indices(module.name, rows, resized.shape[0])
                )
            elif resized is not None:
                whole[f"{module.name}.weight"] = resized
            if module.parts:
                yield module

    # -- one module ---------------------------------------------------------------------------------------------------

    def _guarded(self, module: Module) -> list[Targeted]:
        """The updates of a module; its problem joins the others instead of ending the reading."""
        try:
            return list(self._updates(module))
        except LoratoolError as error:
            self.problems += error.problems
            return []

    def _updates(self, module: Module) -> Iterator[Targeted]:
        parts = dict(module.parts)
        if (rows := parts.pop("trainable_tokens_delta", None)) is not None:
            yield self._token_rows(module, rows)
        if others := {kind for part in parts if (kind := peft_kinds.kind_of(part)) != "LORA"}:
            yield from self._other_method(module, parts, *sorted(others))
            return
        embedding = parts.pop("lora_embedding_A", None), parts.pop("lora_embedding_B", None)
        linear = parts.pop("lora_A.weight", None), parts.pop("lora_B.weight", None)
        bias, magnitude = parts.pop("lora_B.bias", None), parts.pop("lora_magnitude_vector", None)
        if (embedding[0] is None) != (embedding[1] is None) or (linear[0] is None) != (linear[1] is None):
            raise InvalidFile(Problem("E-COMPONENTS", f"{module.name} has only one of the two factors", self.where))
        if embedding[0] is not None and embedding[1] is not None:
            yield self._embedding(module, embedding[0], embedding[1], magnitude)
        elif linear[0] is not None and linear[1] is not None:
            yield from self._linear(module, linear[0], linear[1], bias, magnitude)
        elif bias is not None or magnitude is not None:
            raise InvalidFile(
                Problem("E-COMPONENTS", f"{module.name} has a bias or magnitude but no factors", self.where)
            )

    def _other_method(self, module: Module, parts: Mapping[str, TensorRef], *kinds: str) -> Iterator[Targeted]:
        """A module of LoHa, LoKr, AdaLoRA or (IA)^3."""
        kind = kinds[0]
        if self.config is not None and self.config.kind != kind:
            what = f"{module.name} has parts of {kind}, the adapter_config is of {self.config.kind}"
            raise InvalidFile(Problem("E-CONFIG", what, self.where, "is it this adapter's own config?"))
        name = self._tensor(module)
        saved = peft_kinds.Saved(module.name, parts, self.facts.stored(name), self.where)
        if kind == "ADALORA":
            lora = peft_kinds.adalora(saved, lambda rank: self.scales.adalora(module, rank))
            if lora is None:
                self.notes.append(f"{module.name}: training left no rank of it, nothing changes")
                return
            yield self._oriented(module.name, name, lora)
        elif kind == "LOHA":
            loha, shape = peft_kinds.loha(saved, lambda rank: self.scales.of(module.name, rank))
            yield Targeted(Target(name, shape), loha)
        elif kind == "IA3":
            yield from peft_ia3.updates(saved, name, self.facts)
        else:
            lokrs, shape = peft_kinds.lokr(saved, lambda rank: self.scales.lokr(module.name, rank))
            yield from (Targeted(Target(name, shape), lokr) for lokr in lokrs)

    def _oriented(self, module: str, name: str, lora: Lora) -> Targeted:
        """A Lora of [out, in...] turned where the base stores [in, out]."""
        shape: Shape = (lora.B.shape[0], *lora.A.shape[1:])
        layout = self.facts.layout(module, name, shape)
        if layout == "in_out":
            lora, shape = Lora(lora.B.T, lora.A.T, lora.factors), shape[::-1]
        return Targeted(Target(name, shape, layout=layout), lora)

    def _embedding(self, module: Module, A: TensorRef, B: TensorRef, magnitude: TensorRef | None) -> Targeted:
        """PEFT: delta = (B @ A).T with A [rank, tokens], B [dim, rank]. Here the table is [tokens, dim]."""
        if len(A.shape) != 2 or len(B.shape) != 2 or not A.numel or not B.numel:
            what = f"{module.name}: lora_embedding_A is {list(A.shape)}, lora_embedding_B {list(B.shape)}"
            raise InvalidFile(Problem("E-SHAPE", what, self.where))
        scaling = self.scales.of(module.name, B.shape[1])
        target = Target(self._tensor(module), (A.shape[1], B.shape[0]), layout="embedding")
        update: Lora | Dora = Lora(B.T, A.T, scaling)
        if magnitude is not None:
            update = Dora(update, magnitude.reshape(magnitude.numel), axis=1)  # PEFT's norm is over the tokens
        return Targeted(target, update)

    def _linear(
        self, module: Module, A: TensorRef, B: TensorRef, bias: TensorRef | None, magnitude: TensorRef | None
    ) -> Iterator[Targeted]:
        if not A.numel or not B.numel:
            what = f"{module.name}: lora_A is {list(A.shape)}, lora_B {list(B.shape)}: nothing in them"
            hint = "gather the parameters before saving (DeepSpeed ZeRO-3 saves them empty)"
            raise InvalidFile(Problem("E-EMPTY", what, self.where, hint))
        if len(A.shape) < 2 or len(A.shape) != len(B.shape) or any(dim != 1 for dim in B.shape[2:]):
            hint = ""
            if max(len(A.shape), len(B.shape)) == 3:
                hint = "factors of three dimensions are one expert's after the other (Tinker's): let its tool merge it;"
                hint += f" --skip '*{alike(module.name)}' leaves them out, if the model can do without"
            what = f"{module.name}: lora_A is {list(A.shape)}, lora_B {list(B.shape)}"
            raise InvalidFile(Problem("E-SHAPE", what, self.where, hint))
        parameter = self.facts.parameter(module, self.rename(module.name), A, B)
        name = self.rename(module.name) + "." + parameter
        stored = self.facts.stored(name)
        experts = self.facts.experts(module.name, parameter, name, A, B)
        if experts is not None:
            yield self._moe(module, parameter, name, A, B, experts)
            return
        out, rank, *_ = B.shape
        B = B.reshape(out, rank)
        scaling = self.scales.of(module.name if parameter == "weight" else f"{module.name}.{parameter}", rank)
        if module.nested:
            # nn.MultiheadAttention's out_proj: PEFT 0.21 adds its delta twice, in forward and merge alike, so this is
            # what was trained (peft/tuners/lora/layer.py, MultiheadAttention.merge).
            self.notes.append(
                f"{module.name}: PEFT applies this delta twice (MultiheadAttention), and so does the merge"
            )
            scaling = Scaling("none", rank, None, None if scaling.scale is None else 2 * scaling.scale)
        if A.shape[0] != rank or (stored is not None and len(A.shape) > 2 and stored.shape[1:2] != A.shape[1:2]):
            raise Unsupported(
                Problem(
                    "E-UNSUPPORTED",
                    f"{module.name} looks like a grouped convolution: lora_A {list(A.shape)}, lora_B {list(B.shape)}",
                    self.where,
                    f"merge without: --skip '*{alike(module.name)}'",
                )
            )
        layout = self.facts.layout(module.name, name, (out, *A.shape[1:]))
        update: Lora | Dora
        if layout == "in_out":
            update, axis = Lora(B.T, A.T, scaling), 1
            shape: Shape = (A.shape[1], out)
        else:
            update, axis = Lora(A, B, scaling), 0
            shape = (out, *A.shape[1:])
        if magnitude is not None:
            update = Dora(update, magnitude.reshape(magnitude.numel), axis)
        yield Targeted(Target(name, shape, layout=layout), update)
        if bias is not None:
            yield self._lora_bias(module, name, bias, scaling)

    def _lora_bias(self, module: Module, weight: str, bias: TensorRef, scaling: Scaling) -> Targeted:
        name = f"{parent(weight)}.bias"
        # A bare scale: the bias has no rank of its own.
        return Targeted(Target(name, bias.shape), Add(bias, Scaling("none", None, None, scaling.scale)))

    def _moe(self, module: Module, parameter: str, name: str, A: TensorRef, B: TensorRef, experts: int) -> Targeted:
        """PEFT's ParamWrapper: A [rank*experts, a] is expert-major, B [b, rank*experts] rank-major.

        delta[e] = B.view(b, rank, experts)[:, :, e] @ A.view(experts, rank, a)[e], laid out [b, a] or transposed.
        """
        rank = A.shape[0] // experts
        scaling = self.scales.of(f"{module.name}.{parameter}", rank)
        a, b = A.shape[1], B.shape[0]
        A3 = A.reshape(experts, rank, a)
        B3 = B.reshape(b, rank, experts).permute(2, 0, 1)  # [experts, b, rank]
        layout = self.facts.layout(f"{module.name}.{parameter}", name, (b, a))
        if layout == "in_out":
            A3, B3 = B3.permute(0, 2, 1), A3.permute(0, 2, 1)
            a, b = b, a
        return Targeted(Target(name, (experts, b, a), experts=experts, layout=layout), Lora(A3, B3, scaling))

    def _token_rows(self, module: Module, rows: TensorRef) -> Targeted:
        """Trained rows replace those of the table, despite their name; the config has their numbers, in any order."""
        name = self._tensor(module)
        stored = self.facts.stored(name)
        indices = self._token_indices(module.name, rows, stored.shape[0] if stored else None)
        order = sorted(range(len(indices)), key=indices.__getitem__)
        index, values = row_numbers([indices[i] for i in order]), rows
        if order != list(range(len(order))):
            values = reordered(rows, order)
        tokens = stored.shape[0] if stored is not None else max(indices) + 1  # at least
        return Targeted(Target(name, (tokens, rows.shape[1]), layout="embedding"), ReplaceRows(index, values))

    def _replacement(self, name: str, ref: TensorRef) -> Targeted:
        return Targeted(Target(self._renamed(name), ref.shape), Replace(ref))

    def _renamed(self, name: str) -> str:
        owner, _, last = name.rpartition(".")
        return f"{self.rename(owner)}.{last}" if owner else last

    # -- what the config says -----------------------------------------------------------------------------------------

    def _token_indices(self, module: str, rows: TensorRef, tokens: int | None) -> list[int]:
        """Which rows of a table [tokens, dim] were trained: only the config says so, in any order."""
        indices = self.config.tokens_of(module) if self.config else ()
        if not indices:
            what = f"which rows of {module} were trained is not stored in the tensors"
            raise ChoiceNeeded(Problem("E-CONFIG", what, self.where, "give --config adapter_config.json"))
        if len(rows.shape) != 2 or len(indices) != rows.shape[0] or max(indices) >= (tokens or MAX_ROW):
            what = (
                f"{module}: {len(indices)} trained rows up to {max(indices)}, for {list(rows.shape)} of {tokens} tokens"
            )
            raise InvalidFile(Problem("E-CONFIG", what, self.where, "is this the adapter's own config, and its base?"))
        return list(indices)

    def _tensor(self, module: Module) -> str:
        return f"{self.rename(module.name)}.weight"

    def _torchtunes_rows(self, modules: list[Module]) -> Iterator[Problem]:
        """torchtune's export reorders the rows of lora_B of q_proj and k_proj, for Llama's rotary embeddings.

        It leaves their magnitudes as they were, and does it for Qwen as well, whose weights have no such order
        (torchtune/models/convert_weights.py, tune_to_peft_adapter_weights). Its config is four fields of PEFT's: one
        that is written by hand looks the same.
        """
        if self.config is None or not self.config.from_torchtune or self.choices.convention == NAME:
            return
        reordered = [module for module in modules if module.name.endswith(("q_proj", "k_proj"))]
        model = model_type_of(self.base) if self.base is not None else ""
        if any("lora_magnitude_vector" in module.parts for module in reordered):
            what = "torchtune exports lora_B with its rows in another order than lora_magnitude_vector"
        elif reordered and model in torchtune.PLAIN:
            what = f"torchtune exports lora_B in Llama's order of rows, which {model} does not have"
        else:
            return
        hint = "merge the adapter_model.pt beside it; if torchtune did not write it, --from peft takes it as it is"
        count = f"{len(reordered)} module{'s' * (len(reordered) != 1)}, {reordered[0].name} the first"
        what = f"its adapter_config.json has the fields of torchtune's exports alone, and {what}: {count}"
        yield Problem("E-UNSUPPORTED", what, self.where, hint)
