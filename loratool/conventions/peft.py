"""PEFT's saved adapter: ``adapter_model.safetensors`` (or .bin) beside ``adapter_config.json``.

Keys are ``base_model.model.`` + module path + a part: ``.lora_A.weight`` [rank, in], ``.lora_B.weight`` [out, rank],
``.lora_embedding_A`` [rank, tokens], ``.lora_embedding_B`` [dim, rank], ``.lora_magnitude_vector``, and whole tensors
for trained heads and biases. Rank and alpha may differ per module (`rank_pattern`, `alpha_pattern`). PEFT's
`peft/tuners/lora/` and `peft/utils/save_and_load.py` are the reference; every line here is tested against it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from loratool.adapter import Adapter, BaseIdentity, Target, Targeted
from loratool.checkpoint import Checkpoint
from loratool.conventions import peft_write
from loratool.conventions.choices import Choices
from loratool.conventions.orientation import CONV1D_NAMES, square_layout
from loratool.conventions.peft_config import MAX_ROW, PeftConfig, parse, refuse_unsupported
from loratool.errors import ChoiceNeeded, InvalidFile, LoratoolError, Mismatch, Problem, Unsupported
from loratool.format import is_native
from loratool.names import modules, natural, parent, prefix_rule
from loratool.tensors import Computed, Shape, TensorRef
from loratool.updates import Add, Dora, Lora, Replace, ReplaceRows, Scaling

if TYPE_CHECKING:
    import torch

NAME = "peft"
TITLE = "PEFT adapter"
PREFIX, FILE_STEM = peft_write.PREFIX, peft_write.FILE_STEM
misfits, write = peft_write.misfits, peft_write.write

# What follows the module path. Whole tensors (`.weight`, `.bias`, parameters of any name) have none of these.
_PART = re.compile(
    r"^(?P<module>.*?)\.?(?P<part>lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_embedding_A|lora_embedding_B"
    r"|lora_magnitude_vector|token_adapter\.trainable_tokens_delta|trainable_tokens_delta"
    r"|token_adapter\.base_layer\.weight)$"
)
# The same parts with the adapter's name in them, as a wrapped model's state dict has them.
WRAPPED_PART = re.compile(
    r"^(?P<before>(?:.*\.)?(?:lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector"
    r"|trainable_tokens_delta|(?P<saved>modules_to_save)))\.(?P<adapter>(?!weight$|bias$)[^.]+)"
    r"(?P<after>\.(?(saved).+|(?:weight|bias)))?$"
)
# Parts of other methods, and of LoRA variants whose delta is another formula.
_FOREIGN = re.compile(
    r"\.(lora_E|lora_ranknum|hada_\w+|lokr_\w+|ia3_\w|vera_\w+|oft_\w+|lora_diag\w*|boft_\w+|lora_[A-Z]\w*)\b"
)


def detect(source: Checkpoint) -> bool:
    if is_wrapped(source.tensors):
        return False  # hand-dumped or wrapped: the adapter's name is still in the keys
    if is_native(source.metadata):
        return False
    if source.shards[0].path.stem == FILE_STEM and "peft_type" in (_side_config(source) or {}):
        return True
    return any(name.startswith(PREFIX) and _PART.match(name) for name in source.tensors)


def is_wrapped(names: Iterable[str]) -> bool:
    """Whether adapter names are in the keys. `modules_to_save.NAME` alone is no sign: PEFT saves it in folders too."""
    matches = (WRAPPED_PART.match(name) for name in names)
    return any(match is not None and not match["saved"] for match in matches)


def read(source: Checkpoint, choices: Choices, base: Mapping[str, TensorRef] | None) -> Adapter:
    config = choices.config or _side_config(source)
    parsed = None
    if config is not None:
        refuse_unsupported(config, str(source.path), base_inside=False)
        parsed = parse(config, str(source.path))
    parts = {name.removeprefix(PREFIX): ref for name, ref in source.tensors.items()}
    adapter = PeftReader(parts, parsed, choices, base, str(source.path)).adapter()
    return replace(adapter, provenance={"convention": NAME}, notes=(*source.notes, *adapter.notes))


def unwrap(source: Checkpoint, choices: Choices) -> Mapping[str, TensorRef]:
    return {}


def _side_config(source: Checkpoint) -> dict[str, Any] | None:
    """The config beside the weights: of a folder, or of a file under PEFT's own name. Any other may be a stranger's."""
    own = source.path.is_dir() or source.path.stem == FILE_STEM
    return source.side_json("adapter_config.json") if own else None


@dataclass
class _Module:
    """The parts that were saved for one wrapped module.

    `depth` counts wrappers inside it (MoE parameters nest); `nested` is whether it lies inside another wrapped module.
    """

    name: str
    depth: int = 0
    nested: bool = False
    parts: dict[str, TensorRef] = field(default_factory=dict)


@dataclass
class PeftReader:
    """Turns keys of the saved form into updates. Wrapped checkpoints are brought into the saved form first."""

    parts: Mapping[str, TensorRef]
    config: PeftConfig | None
    choices: Choices
    base: Mapping[str, TensorRef] | None
    where: str
    notes: list[str] = field(default_factory=list)
    doubts: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    rename: Callable[[str], str] = str  # the base's name for one of the adapter's modules; known once keys are sorted

    def adapter(self) -> Adapter:
        wrapped, whole = self._sort()
        if not wrapped and not whole:
            raise InvalidFile(Problem("E-EMPTY", "no adapter tensor in it", self.where))
        self.choices.check_used([module.name for module in wrapped], self.where)
        self.rename = self._match(wrapped, whole)
        if self.base is not None:  # a whole tensor in the adapter is what its deltas were trained on
            self.base = {**self.base, **{self._renamed(name): ref for name, ref in whole.items()}}
        updates = [item for module in self._split_tokens(wrapped, whole) for item in self._guarded(module)]
        updates += [self._replacement(name, ref) for name, ref in whole.items()]
        if self.problems:
            raise Mismatch(self.problems)
        # Replacements come before the deltas on top of them (an embedding that was resized, then trained).
        updates.sort(key=lambda item: (natural(item.target.name), item.update.role != "replace"))
        name = BaseIdentity(self.config.base_name if self.config else "")
        return Adapter(tuple(updates), name, notes=tuple(self.notes), doubts=tuple(self.doubts))

    # -- keys ---------------------------------------------------------------------------------------------------------

    def _sort(self) -> tuple[list[_Module], dict[str, TensorRef]]:
        """Keys by module, and whole tensors by the base's name for them."""
        found: dict[tuple[str, int], _Module] = {}
        whole: dict[str, TensorRef] = {}
        for key, ref in self.parts.items():
            match = _PART.match(key)
            if match:
                module = _without_layers(match["module"])
                part = match["part"].removeprefix("token_adapter.")
                found.setdefault((module.name, module.depth), module).parts[part] = ref
            elif foreign := _FOREIGN.search("." + key):
                self.problems.append(
                    Problem(
                        "E-UNSUPPORTED",
                        f"tensor {ref.name!r}: {foreign[1]} belongs to a method that is not supported",
                        self.where,
                        "merge it with PEFT",
                    )
                )
            elif (trained := _trained_copy(key, self.parts)) is not None:
                # bias="all" saves a trained head's bias three times; modules_to_save has the trained one.
                self.notes.append(f"{ref.name}: {trained} is the trained copy, this one is not used")
            else:
                whole[key.replace(".base_layer.", ".").replace(".modules_to_save.", ".")] = ref
        if self.problems:
            raise Unsupported(self.problems)
        return list(found.values()), whole

    def _match(self, wrapped: list[_Module], whole: Mapping[str, TensorRef]) -> Callable[[str], str]:
        """The rule that turns the adapter's module names into the base's."""
        wanted = ({parent(name) for name in whole} | {module.name for module in wrapped}) - {""}
        rename, notes = prefix_rule(wanted, wanted if self.base is None else modules(self.base), self.where)
        self.notes += notes
        return rename

    def _split_tokens(self, wrapped: list[_Module], whole: dict[str, TensorRef]) -> Iterator[_Module]:
        """Resolve what is stored twice: an embedding saved whole (resized) together with trained rows of it."""
        for module in wrapped:
            resized = module.parts.pop("base_layer.weight", None)
            if resized is not None and "trainable_tokens_delta" in module.parts:
                rows = module.parts.pop("trainable_tokens_delta")
                whole[f"{module.name}.weight"] = _patched(
                    resized, rows, self._token_indices(module.name, rows, resized.shape[0])
                )
            elif resized is not None:
                whole[f"{module.name}.weight"] = resized
            if module.parts:
                yield module

    # -- one module ---------------------------------------------------------------------------------------------------

    def _guarded(self, module: _Module) -> list[Targeted]:
        """The updates of a module; its problem joins the others instead of ending the reading."""
        try:
            return list(self._updates(module))
        except LoratoolError as error:
            self.problems += error.problems
            return []

    def _updates(self, module: _Module) -> Iterator[Targeted]:
        parts = dict(module.parts)
        if (rows := parts.pop("trainable_tokens_delta", None)) is not None:
            yield self._token_rows(module, rows)
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

    def _embedding(self, module: _Module, A: TensorRef, B: TensorRef, magnitude: TensorRef | None) -> Targeted:
        """PEFT: delta = (B @ A).T with A [rank, tokens], B [dim, rank]. Here the table is [tokens, dim]."""
        if len(A.shape) != 2 or len(B.shape) != 2 or not A.numel or not B.numel:
            what = f"{module.name}: lora_embedding_A is {list(A.shape)}, lora_embedding_B {list(B.shape)}"
            raise InvalidFile(Problem("E-SHAPE", what, self.where))
        scaling = self._scaling(module.name, B.shape[1])
        target = Target(self._tensor(module), (A.shape[1], B.shape[0]), layout="embedding")
        update: Lora | Dora = Lora(B.T, A.T, scaling)
        if magnitude is not None:
            update = Dora(update, magnitude.reshape(magnitude.numel), axis=1)  # PEFT's norm is over the tokens
        return Targeted(target, update)

    def _linear(
        self, module: _Module, A: TensorRef, B: TensorRef, bias: TensorRef | None, magnitude: TensorRef | None
    ) -> Iterator[Targeted]:
        if not A.numel or not B.numel:
            what = f"{module.name}: lora_A is {list(A.shape)}, lora_B {list(B.shape)}: nothing in them"
            hint = "gather the parameters before saving (DeepSpeed ZeRO-3 saves them empty)"
            raise InvalidFile(Problem("E-EMPTY", what, self.where, hint))
        if len(A.shape) < 2 or len(A.shape) != len(B.shape) or any(dim != 1 for dim in B.shape[2:]):
            raise InvalidFile(
                Problem("E-SHAPE", f"{module.name}: lora_A is {list(A.shape)}, lora_B {list(B.shape)}", self.where)
            )
        parameter = self._parameter(module, A, B)
        name = self.rename(module.name) + "." + parameter
        stored = self._stored(name)
        experts = self._experts(module, parameter, A, B, stored)
        if experts is not None:
            yield self._moe(module, parameter, name, A, B, experts, stored)
            return
        out, rank, *_ = B.shape
        B = B.reshape(out, rank)
        scaling = self._scaling(module.name if parameter == "weight" else f"{module.name}.{parameter}", rank)
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
                    f"{module.name} looks like a grouped convolution: lora_A is"
                    f" {list(A.shape)}, lora_B {list(B.shape)}",
                    self.where,
                    "PEFT refuses it too",
                )
            )
        layout = self._layout(module.name, name, (out, *A.shape[1:]))
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

    def _lora_bias(self, module: _Module, weight: str, bias: TensorRef, scaling: Scaling) -> Targeted:
        name = f"{parent(weight)}.bias"
        # A bare scale: the bias has no rank of its own.
        return Targeted(Target(name, bias.shape), Add(bias, Scaling("none", None, None, scaling.scale)))

    def _moe(
        self,
        module: _Module,
        parameter: str,
        name: str,
        A: TensorRef,
        B: TensorRef,
        experts: int,
        stored: TensorRef | None,
    ) -> Targeted:
        """PEFT's ParamWrapper: A [rank*experts, a] is expert-major, B [b, rank*experts] rank-major.

        delta[e] = B.view(b, rank, experts)[:, :, e] @ A.view(experts, rank, a)[e], laid out [b, a] or transposed.
        """
        rank = A.shape[0] // experts
        scaling = self._scaling(f"{module.name}.{parameter}", rank)
        a, b = A.shape[1], B.shape[0]
        A3 = A.reshape(experts, rank, a)
        B3 = B.reshape(b, rank, experts).permute(2, 0, 1)  # [experts, b, rank]
        layout = self._layout(f"{module.name}.{parameter}", name, (b, a))
        if layout == "in_out":
            A3, B3 = B3.permute(0, 2, 1), A3.permute(0, 2, 1)
            a, b = b, a
        return Targeted(Target(name, (experts, b, a), experts=experts, layout=layout), Lora(A3, B3, scaling))

    def _token_rows(self, module: _Module, rows: TensorRef) -> Targeted:
        """Trained rows replace those of the table, despite their name; the config has their numbers, in any order."""
        name = self._tensor(module)
        stored = self._stored(name)
        indices = self._token_indices(module.name, rows, stored.shape[0] if stored else None)
        order = sorted(range(len(indices)), key=indices.__getitem__)
        index, values = _row_numbers([indices[i] for i in order]), rows
        if order != list(range(len(order))):
            values = TensorRef(rows.name, rows.dtype, rows.shape, Computed(lambda: rows.read()[order]), rows.shape)
        tokens = stored.shape[0] if stored is not None else max(indices) + 1  # at least
        return Targeted(Target(name, (tokens, rows.shape[1]), layout="embedding"), ReplaceRows(index, values))

    def _replacement(self, name: str, ref: TensorRef) -> Targeted:
        return Targeted(Target(self._renamed(name), ref.shape), Replace(ref))

    def _renamed(self, name: str) -> str:
        owner, _, last = name.rpartition(".")
        return f"{self.rename(owner)}.{last}" if owner else last

    # -- what the config says -----------------------------------------------------------------------------------------

    def _scaling(self, module: str, rank: int) -> Scaling:
        """alpha/r or alpha/sqrt(r). The rank is the tensors': PEFT sorts patterns on saving, so hits change."""
        if self.config is None:
            return self.choices.scaling_of(module, rank)
        alphas = self.config.alphas(module)
        if len(set(alphas)) > 1:
            self.notes.append(f"{module}: several alpha_pattern entries match; the file's first is used, as PEFT does")
        return Scaling.by(self.config.rule, alphas[0] if alphas else self.config.alpha, rank)

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

    # -- what the base says -------------------------------------------------------------------------------------------

    def _stored(self, name: str) -> TensorRef | None:
        """The base's tensor, if it is known; that a target is missing is for the plan to say."""
        return None if self.base is None else self.base.get(name)

    def _tensor(self, module: _Module) -> str:
        return f"{self.rename(module.name)}.weight"

    def _parameter(self, module: _Module, A: TensorRef, B: TensorRef) -> str:
        """The parameter that a module's factors belong to; keys name only the module."""
        owner = self.rename(module.name)
        targeted = self.config.parameters_of(module.name) if self.config else []
        below = [name.removeprefix(owner + ".") for name in self.base or () if parent(name) == owner]
        if not below:
            choices = targeted or ["weight"]
        elif self.base is None or "weight" in below:
            return "weight"
        else:
            # Without target_parameters, only torch's attention has another name for its weight; a wrapped checkpoint
            # without its config may have stacked experts.
            likely = (
                {"in_proj_weight"} if self.config else {last for last in below if self._is_stacked(f"{owner}.{last}")}
            )
            choices = [last for last in below if last in (targeted or likely | {"in_proj_weight"})]
            sizes = {A.shape[1], B.shape[0]}
            choices = [last for last in choices if set(self.base[f"{owner}.{last}"].shape[-2:]) == sizes]
        if len(choices) == 1:
            return choices[0]
        if len(choices) == 2 and not below:
            # Nested wrappers: the innermost is the module's first registered parameter, gate_up before down.
            if self.base is None:
                self.doubts.append(f"{module.name}: which of {', '.join(choices)} it updates")
            return sorted(choices, key=lambda last: "down" in last)[0 if module.depth else 1]
        if not choices:
            return "weight"  # a target the base does not have
        raise ChoiceNeeded(
            Problem(
                "E-AMBIGUOUS",
                f"{module.name} could update any of {', '.join(choices)}: their shapes are alike",
                self.where,
                "merge with PEFT, or rename the base's parameters",
            )
        )

    def _is_stacked(self, name: str) -> bool:
        stored = self._stored(name)
        return stored is not None and len(stored.shape) == 3

    def _experts(
        self, module: _Module, parameter: str, A: TensorRef, B: TensorRef, stored: TensorRef | None
    ) -> int | None:
        """The number of experts that share one pair of factors, or None for a plain matrix."""
        if stored is not None:
            if len(stored.shape) != 3 or len(A.shape) != 2:
                return None
            experts = stored.shape[0]
        else:
            rank = self.config.rank_of(f"{module.name}.{parameter}") if self.config else None
            if parameter == "weight" or not rank or A.shape[0] == rank:
                return None
            experts = A.shape[0] // rank
            if self.base is None:
                self.doubts.append(f"{module.name}.{parameter}: how the base orders its {experts} experts' matrices")
        if A.shape[0] % experts or A.shape[0] != B.shape[1]:
            raise InvalidFile(
                Problem(
                    "E-SHAPE",
                    f"{module.name}: factors {list(A.shape)}, {list(B.shape)} do not divide among {experts} experts",
                    self.where,
                )
            )
        return experts

    def _layout(self, module: str, name: str, shape: Shape) -> str:
        """The layout of the base's tensor: "" or "in_out". `shape` is what the factors make, as [out, in...].

        PEFT's one `fan_in_fan_out` flag is that of the last module it wrapped, so it proves nothing where Conv1D and
        Linear mix: the base's shape decides, and for a square matrix what the base shows of its kind.
        """
        if given := self.choices.layout_of(module):
            return "in_out" if given == "in_out" else ""
        if len(shape) != 2:
            return ""
        stored = self._stored(name)
        flag = self.config is not None and self.config.fan_in_fan_out
        if stored is None:
            if flag or module.rpartition(".")[2] in CONV1D_NAMES:
                self.doubts.append(f"{module}: whether the base stores it as [out, in] or [in, out]")
            return "in_out" if flag else ""
        dims = stored.shape[-2:]
        if dims not in (shape, shape[::-1]):
            what = f"{module}: the factors make {list(shape)}, the base has {list(stored.shape)}"
            raise Mismatch(Problem("E-SHAPE", what, self.where, "is this the adapter's base?"))
        if shape[0] != shape[1]:
            return "" if dims == shape else "in_out"
        layout = None if self.base is None else square_layout(name, flag, self.base)
        if layout is None:
            leaf = module.rpartition(".")[2]
            what = f"{module} is square, and nothing shows whether the base stores it as [out, in] or [in, out]"
            hint = f"say --layout '*{leaf}=in_out' for a Conv1D, --layout '*{leaf}=out_in' for a Linear"
            raise ChoiceNeeded(Problem("E-LAYOUT", what, self.where, hint))
        return layout


def _trained_copy(key: str, keys: Container[str]) -> str | None:
    """The key of the trained head tensor that `key` is another copy of, if the file has both."""
    plain = re.sub(r"\.(original_module|modules_to_save\.[^.]+|modules_to_save)(?=\.)", "", key, count=1)
    return plain if plain != key and plain in keys else None


def _without_layers(path: str) -> _Module:
    """A module's own path, without the `base_layer` segments that wrapping put into it."""
    segments = path.split(".")
    inner = len(segments)
    while inner and segments[inner - 1] == "base_layer":
        inner -= 1
    own = [segment for segment in segments[:inner] if segment != "base_layer"]
    return _Module(".".join(own), len(segments) - inner, nested=len(own) < inner)


def _patched(table: TensorRef, rows: TensorRef, indices: list[int]) -> TensorRef:
    """A stored table with some of its rows replaced."""

    def make() -> torch.Tensor:
        tensor = table.read().clone()  # [tokens, dim]
        tensor[indices] = rows.read(tensor.dtype)
        return tensor

    return TensorRef(table.name, table.dtype, table.shape, Computed(make), table.shape)


def _row_numbers(indices: list[int]) -> TensorRef:
    """Row numbers of a config as an int64 tensor [k]."""

    def make() -> torch.Tensor:
        import torch

        return torch.tensor(indices, dtype=torch.int64)

    shape = (len(indices),)
    return TensorRef("trainable_token_indices", "I64", shape, Computed(make), shape)
