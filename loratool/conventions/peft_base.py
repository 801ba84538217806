"""What only the base can say of a PEFT module: the parameter it updates, its number of experts, how it lies there."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from loratool.conventions.choices import Choices
from loratool.conventions.orientation import CONV1D_NAMES, shown_layouts, square_layout
from loratool.conventions.peft_config import PeftConfig
from loratool.conventions.peft_names import Module
from loratool.errors import ChoiceNeeded, InvalidFile, Mismatch, Problem
from loratool.names import parent
from loratool.tensors import Shape, TensorRef


@dataclass
class BaseFacts:
    """The base's tensors, if they are known; `doubts` grows by what they alone could have settled."""

    base: Mapping[str, TensorRef] | None
    config: PeftConfig | None
    choices: Choices
    where: str
    doubts: list[str] = field(default_factory=list)

    @cached_property
    def parameters(self) -> Mapping[str, list[str]]:
        """The base's parameters by the module that owns them."""
        found: dict[str, list[str]] = defaultdict(list)
        for name in self.base or ():
            found[parent(name)].append(name.rpartition(".")[2])
        return found

    @cached_property
    def _shown(self) -> Mapping[str, set[str]]:
        return shown_layouts(self.base or {})

    def stored(self, name: str) -> TensorRef | None:
        """The base's tensor, if it is known; that a target is missing is for the plan to say."""
        return None if self.base is None else self.base.get(name)

    def parameter(self, module: Module, owner: str, A: TensorRef, B: TensorRef) -> str:
        """The parameter of `owner` (the base's name for the module) that factors belong to; keys name only modules."""
        targeted = self.config.parameters_of(module.name) if self.config else []
        below = self.parameters.get(owner, [])
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
        what = f"{module.name} could update any of {', '.join(choices)}: their shapes are alike"
        hint = "merge with PEFT, or rename the base's parameters"
        raise ChoiceNeeded(Problem("E-AMBIGUOUS", what, self.where, hint))

    def _is_stacked(self, name: str) -> bool:
        stored = self.stored(name)
        return stored is not None and len(stored.shape) == 3

    def experts(self, module: str, parameter: str, name: str, A: TensorRef, B: TensorRef) -> int | None:
        """The number of experts that share one pair of factors, or None for a plain matrix."""
        stored = self.stored(name)
        if stored is not None:
            if len(stored.shape) != 3 or len(A.shape) != 2:
                return None
            experts = stored.shape[0]
        else:
            rank = self.config.rank_of(f"{module}.{parameter}") if self.config else None
            if parameter == "weight" or not rank or A.shape[0] == rank:
                return None
            experts = A.shape[0] // rank
            if self.base is None:
                self.doubts.append(f"{module}.{parameter}: how the base orders its {experts} experts' matrices")
        if A.shape[0] % experts or A.shape[0] != B.shape[1]:
            what = f"{module}: factors {list(A.shape)}, {list(B.shape)} do not divide among {experts} experts"
            raise InvalidFile(Problem("E-SHAPE", what, self.where))
        return experts

    def layout(self, module: str, name: str, shape: Shape) -> str:
        """The layout of the base's tensor: "" or "in_out". `shape` is what the factors make, as [out, in...].

        PEFT's one `fan_in_fan_out` flag is that of the last module it wrapped, so it proves nothing where Conv1D and
        Linear mix: the base's shape decides, and for a square matrix what the base shows of its kind.
        """
        if given := self.choices.layout_of(module):
            return "in_out" if given == "in_out" else ""
        if len(shape) != 2:
            return ""
        stored = self.stored(name)
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
        assert self.base is not None
        if len(stored.shape) == 3:
            return self._expert_layout(module, name)
        layout = square_layout(name, flag, self.base, self._shown)
        if layout is None:
            leaf = module.rpartition(".")[2]
            what = f"{module} is square, and nothing shows whether the base stores it as [out, in] or [in, out]"
            hint = f"say --layout '*{leaf}=in_out' for a Conv1D, --layout '*{leaf}=out_in' for a Linear"
            raise ChoiceNeeded(Problem("E-LAYOUT", what, self.where, hint))
        return layout

    def _expert_layout(self, module: str, name: str) -> str:
        """Which side of experts' square matrices A belongs to: "" for the last dimension, "in_out" for the first.

        Versions of PEFT differ (peft/tuners/lora/layer.py, ParamWrapper): up to 0.18 A has the first dimension; 0.19.0
        gives it the last one if the module is transposed; since 0.19.1 the last one unless it is. Configs name their
        version since 0.18. Transposed experts (gpt-oss) are known by the biases beside them.
        """
        assert self.base is not None
        transposed = f"{name}_bias" in self.base
        version = self.config.version if self.config else None
        if version is None:
            leaf = module.rpartition(".")[2]
            what = f"{module} is square, and which version of PEFT wrote its factors is not known"
            hint = (
                f"give --config adapter_config.json, or say --layout '*{leaf}=in_out' (PEFT up to 0.18, or transposed"
                f" experts) or --layout '*{leaf}=out_in'"
            )
            raise ChoiceNeeded(Problem("E-LAYOUT", what, self.where, hint))
        if version < (0, 19, 0):
            return "in_out"
        first = not transposed if version < (0, 19, 1) else transposed
        return "in_out" if first else ""
