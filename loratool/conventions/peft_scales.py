"""The scale of a module in each of PEFT's methods: by its config, by the header, or by what the user says."""

from __future__ import annotations

from dataclasses import dataclass, field

from loratool.conventions import peft_kinds
from loratool.conventions.headers import alpha_of, ranks_of
from loratool.conventions.peft_config import PeftConfig
from loratool.conventions.peft_names import Module
from loratool.conventions.scales import Scales
from loratool.errors import InvalidFile, Problem
from loratool.updates import Scaling

PLACE = "of adapter_config.json"


@dataclass
class PeftScales:
    """`notes` grows by what PEFT does where its config can be read in two ways."""

    scales: Scales
    config: PeftConfig | None
    notes: list[str] = field(default_factory=list)

    def of(self, module: str, rank: int) -> Scaling:
        """alpha/r or alpha/sqrt(r), with the factors' rank; PEFT can not load an adapter whose config has another."""
        if self.config is None:
            return self.scales.of(module, rank)
        if len({*self.config.alphas(module)}) > 1:
            self.notes.append(f"{module}: several alpha_pattern entries match; the file's first is used, as PEFT does")
        self.scales.check_rank(module, rank, *ranks_of(self.config, module, PLACE))
        return self.scales.of(module, rank, alpha_of(self.config, module, PLACE))

    def lokr(self, module: str, rank: int | None) -> Scaling:
        """alpha/r. Where both factors of LoKr are whole, only the config has r; without it the scale is not known.

        The scale is then a bare one: in the file, a rank is one that the tensors show.
        """
        if rank is not None:
            return self.of(module, rank)
        if self.config is not None:
            if len({*self.config.ranks(module)}) > 1:
                self.notes.append(
                    f"{module}: several rank_pattern entries match; the file's first is used, as PEFT does"
                )
            said = alpha_of(self.config, module, PLACE)
            return Scaling("none", None, None, self.scales.of(module, self.config.rank_of(module), said).scale)
        given = self.scales.of(module, 1)
        return Scaling("none", None, None, given.scale if given.rule == "alpha" else None)

    def adalora(self, module: Module, rank: int) -> Scaling:
        """lora_alpha / (ranks it started with + 1e-5). A wrapped checkpoint has their number, a saved one's config."""
        stored = module.parts.get("ranknum")
        if stored is not None and stored.numel != 1:
            what = f"{module.name}: ranknum is {list(stored.shape)}"
            raise InvalidFile(Problem("E-SHAPE", what, self.scales.where))
        own = [] if self.config is None else [alpha_of(self.config, module.name, PLACE)]
        given = self.scales.of(module.name, rank, *own)
        if given.alpha is None or given.rule != "alpha/rank" or (stored is None and self.config is None):
            return Scaling("none", rank, None, None)
        start = float(stored.read()) if stored is not None else float(self.config.rank if self.config else rank)
        alpha = given.alpha if given.alpha > 0 else start
        return Scaling("none", rank, None, alpha / (start + peft_kinds.RANKNUM))
