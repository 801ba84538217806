"""What the metadata in a safetensors header says of an adapter's scale. Every reader asks here.

    lora_alpha, alpha, network_alpha, ss_network_alpha        alpha, as text
    r, rank, lora_rank, network_dim, ss_network_dim           the rank it goes with
    transformer.lora_alpha, unet_lora_alpha, ...              the same of one component
    lora_adapter_metadata                                     LoraConfigs as JSON, components before their names

Trainers of diffusion models keep alpha nowhere else, and most loaders do not look. sd-scripts writes "Dynamic" or
"None" where a file has no single value, and in `ss_network_args` what holds for some layers only.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from loratool.checkpoint import Checkpoint
from loratool.container import strict_json
from loratool.conventions.diffusers_names import COMPONENTS, METADATA_KEY
from loratool.conventions.peft_config import PeftConfig, parse, refuse_unsupported
from loratool.errors import InvalidFile, LoratoolError, Problem, Unsupported

PLACE = "in the header"
# Two names for one part of a pipeline: trainers and files do not always use the same.
_ROLES = {
    **dict.fromkeys(("", "unet", "transformer", "prior", "model", "diffusion_model", "denoiser"), "denoiser"),
    **dict.fromkeys(("te", "te1", "text_encoder", "text_encoder_1", "clip_l"), "text_encoder"),
    **dict.fromkeys(("te2", "text_encoder_2", "clip_g"), "text_encoder_2"),
    **dict.fromkeys(("te3", "text_encoder_3", "t5xxl"), "text_encoder_3"),
}
_NAMES = sorted({*_ROLES, *COMPONENTS} - {""}, key=len, reverse=True)
_FIELD = re.compile(
    rf"(?:(?P<component>{'|'.join(map(re.escape, _NAMES))})[._])?"
    r"(?:(?P<alpha>(?:ss_)?(?:lora_|network_)*alpha)|(?P<rank>(?:ss_)?(?:lora_|network_)*(?:rank|r)|(?:ss_)?(?:lora|network)_dim)"
    r"|(?P<rslora>use_rslora|rs_?lora)|(?P<pattern>(?:alpha|rank)_pattern))"
)
_SILENT = {"", "none", "null", "dynamic"}


class Said(NamedTuple):
    """One statement of alpha, and where it stands.

    `rule` is what it means with a rank, None where only the user can know. A `broad` one is of many layers at once, so
    that single ones may have another; an `assumed` one is a default that holds where nothing else is said.
    """

    alpha: float
    where: str
    rule: str | None = "alpha/rank"
    broad: bool = False
    assumed: bool = False


class SaidRank(NamedTuple):
    """One statement of a rank, and where it stands."""

    rank: float
    where: str


def role_of(component: str) -> str:
    """One name for a component, however a trainer or a file spells it; "" is what a file of one model alone has."""
    return _ROLES.get(component, component)


def alpha_of(config: PeftConfig, module: str, place: str) -> Said:
    """What a PEFT config says of a module's alpha: its first pattern that matches, else its `lora_alpha`."""
    if alphas := config.alphas(module):
        return Said(alphas[0], f"alpha_pattern {place}", config.rule)
    return Said(config.alpha, f"{config.alpha_name} {place}", config.rule, assumed=not config.alpha_said)


def ranks_of(config: PeftConfig, module: str, place: str) -> list[SaidRank]:
    """The ranks that a PEFT config has for a module: of all its patterns that match, else its `r`, if that is there.

    PEFT uses the first pattern, and sorts them on saving: in training, any of them may have been the first.
    """
    if ranks := config.ranks(module):
        return [SaidRank(rank, f"rank_pattern {place}") for rank in ranks]
    return [SaidRank(config.rank, f"r {place}")] if config.rank_said else []


@dataclass(frozen=True)
class Header:
    """The statements of a file's header, by component as it spells them; under "" what it says of the whole file."""

    alphas: Mapping[str, list[Said]] = field(default_factory=dict)
    ranks: Mapping[str, list[SaidRank]] = field(default_factory=dict)
    configs: Mapping[str, PeftConfig] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)  # of `configs`: what they are called in messages
    uneven: bool = False  # some layers were trained with numbers of their own

    @classmethod
    def of(cls, source: Checkpoint) -> Header:
        """Raises InvalidFile for an alpha that is no number, Unsupported for a config that no merge can follow."""
        where = str(source.path)
        args = training_args(source)
        flags = [*args.items(), *((name, value) for name, value in source.metadata.items() if _is(name, "rslora"))]
        rslora = any(_is(name, "rslora") and str(value).lower() == "true" for name, value in flags)
        alphas: dict[str, list[Said]] = defaultdict(list)
        ranks: dict[str, list[SaidRank]] = defaultdict(list)
        problems: list[Problem] = []
        for name, text in source.metadata.items():
            if (match := _FIELD.fullmatch(name)) is None or text.strip().lower() in _SILENT:
                continue
            component, place = match["component"] or "", f"{name} {PLACE}"
            number = _number(text)
            if match["alpha"] and number is None:
                what = f"{name} {PLACE} is {text!r:.80}, not a number"
                hint = "write the alpha that was meant into it"
                problems.append(Problem("E-CONFIG", what, where, hint))
            elif match["alpha"] and number is not None:
                rule = "alpha/sqrt(rank)" if rslora else "alpha/rank"
                alphas[component].append(Said(number, place, rule, broad=True))
            elif match["rank"] and number is not None and number >= 1:
                ranks[component].append(SaidRank(number, place))
            elif match["pattern"] and text.strip() != "{}":
                what = f"{name} {PLACE}: alphas and ranks of single layers are read from {METADATA_KEY} only"
                problems.append(Problem("E-UNSUPPORTED", what, where, "save it with diffusers, which writes that"))
        if problems:
            raise InvalidFile(problems)
        configs, labels = _configs(source)
        own = {str(name).rpartition("_")[2] for name in args}
        return cls(alphas, ranks if alphas else {}, configs, labels, bool(own & {"alpha", "alphas", "dim", "dims"}))

    def said_of(self, component: str, module: str) -> list[Said]:
        """All that is said of the alpha of a component's module, the most precise first."""
        found = [said for name in _names_for(component, self.alphas) for said in self.alphas[name]]
        for name in _names_for(component, self.configs)[:1]:
            found = [alpha_of(self.configs[name], module, self.labels[name]), *found]
        return found

    def ranks_said_of(self, component: str, module: str) -> list[SaidRank]:
        """What a config in the header says of the rank of a component's module."""
        names = _names_for(component, self.configs)[:1]
        return [said for name in names for said in ranks_of(self.configs[name], module, self.labels[name])]


def documents(source: Checkpoint) -> dict[str, dict[str, Any]] | None:
    """The LoraConfigs of `lora_adapter_metadata`, by component as it is written there; None without that entry."""
    text = source.metadata.get(METADATA_KEY)
    if not text:
        return None
    where = str(source.path)
    document = strict_json(text, where, "E-CONFIG", "")
    if not isinstance(document, dict):
        raise InvalidFile(Problem("E-CONFIG", f"{METADATA_KEY} is not a JSON object", where))
    found: dict[str, dict[str, Any]] = defaultdict(dict)
    for name, value in document.items():
        first, dot, rest = name.partition(".")
        if not dot and name in COMPONENTS and isinstance(value, dict):
            found[name] |= value
        elif dot and first in COMPONENTS:
            found[first][rest] = value
        else:
            found[""][name] = value
    return dict(found)


def _configs(source: Checkpoint) -> tuple[dict[str, PeftConfig], dict[str, str]]:
    configs: dict[str, PeftConfig] = {}
    labels: dict[str, str] = {}
    problems: list[Problem] = []
    for component, document in (documents(source) or {}).items():
        where = f"{source.path}: {METADATA_KEY}{f' of {component}' if component else ''}"
        try:
            refuse_unsupported(document, where, base_inside=False, kinds=("LORA",))
            configs[component] = config = parse(document, where)
            if config.invocation:
                what = "alora_invocation_tokens is set: diffusers knows no adapter that acts after tokens only"
                problems.append(Problem("E-CONDITIONAL", what, where))
            labels[component] = f"of {METADATA_KEY} {PLACE}"
        except LoratoolError as error:
            problems += error.problems
    if problems:
        raise Unsupported(problems)
    return configs, labels


def _names_for(component: str, names: Iterable[str]) -> list[str]:
    """The names under which something is said of a component: its own, else others for the same, and "" for all."""
    known = [*names]
    same = [name for name in known if name and role_of(name) == role_of(component)]
    own = [component] if component and component in known else same
    return [*own, *([""] if "" in known else [])]


def _is(name: str, kind: str) -> bool:
    match = _FIELD.fullmatch(name)
    return match is not None and match[kind] is not None


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def training_args(source: Checkpoint) -> Mapping[str, Any]:
    """sd-scripts' network arguments out of the metadata: what a user typed, never more than the tensors say."""
    try:
        found = json.loads(source.metadata.get("ss_network_args", "{}"))
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
