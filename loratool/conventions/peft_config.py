"""PEFT's ``adapter_config.json``, checked once: what a merge needs of it, and what it must refuse."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from loratool.conventions.peft_fields import unknown
from loratool.conventions.peft_layers import parse_ranges
from loratool.conventions.peft_methods import why_not
from loratool.errors import ChoiceNeeded, InvalidFile, LoratoolError, Problem, Unsupported
from loratool.tensors import is_int, whole

# Initialisations that rewrite the base before training: the adapter is relative to a base that is not on any disk.
MUTATING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")
VARIANTS = {
    "use_qalora": "A acts on pooled inputs",
    "use_bdlora": "one factor is block-diagonal and stored compactly",
    "kasa_config": "the base is truncated and the delta has singular values",
    "arrow_config": "it routes between adapters at run time",
    "monteclora_config": "its factors are sampled",
    "velora_config": "its delta is not plain LoRA",
}
KINDS = ("LORA", "ADALORA", "LOHA", "LOKR", "IA3", "TRAINABLE_TOKENS")
# All that torchtune's export writes; PEFT itself writes every field it has.
_TORCHTUNE = {"r", "lora_alpha", "target_modules", "peft_type"}
BIASES = ("none", "all", "lora_only")
MAX_ROW = 2**53
# A repetition of something that repeats takes exponential time in Python's matcher. No module name needs one.
_NESTED_REPETITION = re.compile(r"\([^()]*(?:[+*]|\{\d*,\d*\})[^()]*\)\s*(?:[+*]|\{)")


@dataclass(frozen=True)
class PeftConfig:
    """The parts of an adapter_config that say what the tensors mean. Defaults are PEFT's own."""

    kind: str = "LORA"
    rank: int = 8  # AdaLoRA's is the one it starts from, `init_r`
    alpha: float = 8.0
    rank_said: bool = False  # whether rank and alpha stand in the file
    alpha_said: bool = False
    alpha_name: str = "lora_alpha"  # what the file calls it
    rule: str = "alpha/rank"
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    fan_in_fan_out: bool = False
    bias: str = "none"
    base_name: str = ""
    revision: str = ""  # of the base
    invocation: tuple[int, ...] = ()  # tokens after which an activated LoRA acts; () for one that always does
    version: tuple[int, int, int] | None = None  # of the PEFT that wrote it; None where a development version did
    from_torchtune: bool = False
    layer_replication: tuple[tuple[int, int], ...] = ()
    target_parameters: tuple[str, ...] = ()
    tokens: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # by module; "" is the input embedding
    feedforward: str | tuple[str, ...] | None = None  # (IA)^3's: a pattern for a whole name, or ends of names

    def alphas(self, module: str) -> list[float]:
        """The alphas of all patterns that match a module, in the order of the file; PEFT uses the first."""
        return [alpha for pattern, alpha in self.alpha_pattern.items() if _hit(pattern, module)]

    def rank_of(self, module: str) -> int:
        return next(iter(self.ranks(module)), self.rank)

    def ranks(self, module: str) -> list[int]:
        """The ranks of all patterns that match a module, in the order of the file; PEFT uses the first."""
        return [rank for pattern, rank in self.rank_pattern.items() if _hit(pattern, module)]

    def parameters_of(self, module: str) -> list[str]:
        """The parameters of a module that `target_parameters` names: ``mlp.experts.down_proj`` -> ``down_proj``."""
        named = [target.rpartition(".") for target in self.target_parameters]
        return [last for owner, _, last in named if module == owner or module.endswith("." + owner)]

    def is_feedforward(self, module: str) -> bool | None:
        """Whether (IA)^3 multiplies a module's inputs, as PEFT finds out; None if the config does not say."""
        if isinstance(self.feedforward, str):
            return re.fullmatch(self.feedforward, module) is not None
        return None if self.feedforward is None else module.endswith(self.feedforward)

    def tokens_of(self, module: str) -> tuple[int, ...]:
        """The rows of a module that were trained, in the order of the tensor's rows; () if the config has none."""
        for owner, rows in self.tokens.items():
            if owner in ("", module) or module.endswith("." + owner):
                return rows
        return ()


def chosen_config(
    given: Mapping[str, Any] | None, own: Mapping[str, Any] | None, where: str
) -> Mapping[str, Any] | None:
    """The adapter's own config, or the user's for one that has none. Raises ChoiceNeeded where there are two."""
    if given is not None and own is not None:
        what = "--config is given, and the adapter has an adapter_config.json of its own"
        raise ChoiceNeeded(Problem("E-OPTION", what, where, "leave --config out, or correct the adapter's own"))
    return own if own is not None else given


def parse(document: Mapping[str, Any], where: str) -> PeftConfig:
    """Check the fields that are used, all of them. Raises InvalidFile with every one that is wrong."""
    problems: list[Problem] = []

    def need(good: bool, name: str, what: str) -> bool:
        if not good:
            message = f"adapter_config: {name} is {document.get(name)!r:.80}, not {what}"
            problems.append(Problem("E-CONFIG", message, where, "take the file that the trainer wrote"))
        return good

    def get(name: str, default: Any) -> Any:
        """A field, with PEFT's default where it is absent or null."""
        value = document.get(name)
        return default if value is None else value

    kind = document.get("peft_type", "LORA")
    rank_name = "init_r" if kind == "ADALORA" else "r"
    alpha_name = "alpha" if kind in ("LOHA", "LOKR") else "lora_alpha"
    document = {
        **document,
        **{name: _wholes(document[name]) for name in (rank_name, "rank_pattern") if name in document},
    }
    if rank_name in document:
        need(_is_rank(document[rank_name]), rank_name, "a whole number above 0")
    if alpha_name in document:
        need(_is_number(document[alpha_name]), alpha_name, "a finite number")
    for name in ("use_rslora", "fan_in_fan_out"):
        need(isinstance(get(name, False), bool), name, "true or false")
    need(get("bias", "none") in BIASES, "bias", f"one of {', '.join(BIASES)}")
    ranks, alphas = ({}, {}) if kind == "ADALORA" else (get("rank_pattern", {}), get("alpha_pattern", {}))
    # AdaLoRA's rank_pattern says which ranks are left; those are the ones in the file.
    for name, patterns, check, what in (
        ("rank_pattern", ranks, _is_rank, "ranks"),
        ("alpha_pattern", alphas, _is_number, "numbers"),
    ):
        if need(isinstance(patterns, dict) and all(map(check, patterns.values())), name, f"an object of {what}"):
            problems += [p for pattern in patterns if (p := _bad_pattern(pattern, name, where)) is not None]
    parameters = get("target_parameters", [])
    need(_is_list(parameters, str), "target_parameters", "a list of names")
    tokens_name = "trainable_token_indices" if document.get("trainable_token_indices") is not None else "token_indices"
    tokens = get(tokens_name, {})
    tokens = tokens if isinstance(tokens, dict) else {"": tokens}
    need(all(_is_rows(rows) for rows in tokens.values()), tokens_name, "different row numbers, from 0")
    invocation = document.get("alora_invocation_tokens")
    if invocation is not None:
        good = (
            _is_list(invocation, int) and bool(invocation) and all(is_int(token) and token >= 0 for token in invocation)
        )
        need(good and kind == "LORA", "alora_invocation_tokens", "token numbers from 0, of a LORA")
    feedforward = document.get("feedforward_modules")
    if isinstance(feedforward, str):
        problems += [p for p in [_bad_pattern(feedforward, "feedforward_modules", where)] if p is not None]
    elif feedforward is not None:
        need(_is_list(feedforward, str), "feedforward_modules", "a pattern or a list of names")
    layers: tuple[tuple[int, int], ...] = ()
    try:
        layers = parse_ranges(document.get("layer_replication"), where)
    except LoratoolError as error:
        problems += error.problems
    if problems:
        raise InvalidFile(problems)
    return PeftConfig(
        kind=kind,
        rank=document.get(rank_name, 12 if kind == "ADALORA" else 8),
        alpha=float(document.get(alpha_name, 8)),
        rank_said=rank_name in document,
        alpha_said=alpha_name in document,
        alpha_name=alpha_name,
        rule="alpha/sqrt(rank)" if get("use_rslora", False) and kind == "LORA" else "alpha/rank",
        rank_pattern=ranks,
        alpha_pattern={pattern: float(alpha) for pattern, alpha in alphas.items()},
        fan_in_fan_out=get("fan_in_fan_out", False),
        bias=get("bias", "none"),
        base_name=str(get("base_model_name_or_path", "")),
        revision=str(get("revision", "")),
        invocation=tuple(invocation or ()),
        version=_version(document.get("peft_version")),
        from_torchtune={*document} - {"base_model_name_or_path"} == _TORCHTUNE,
        layer_replication=layers,
        target_parameters=tuple(parameters),
        tokens={module: tuple(rows) for module, rows in tokens.items()},
        feedforward=tuple(feedforward) if isinstance(feedforward, list) else feedforward,
    )


def refuse_unsupported(
    document: Mapping[str, Any], where: str, *, base_inside: bool, kinds: Collection[str] = KINDS
) -> None:
    """Refuse, by name, what a merge of A and B alone would get wrong. Raises Unsupported.

    An initialisation that rewrote the base does no harm where the rewritten base is in the same file.
    """
    problems = []
    kind = document.get("peft_type", "LORA")
    if kind not in kinds:
        why, helps = why_not(kind)
        problems.append(Problem("E-UNSUPPORTED", f"peft_type {kind!s:.40} is not supported: {why}", where, helps))
    init = document.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(MUTATING_INITS) and not base_inside:
        what = f"init_lora_weights is {init!r}: it changed the base before training, so the base on disk is another one"
        hint = (
            "save it again with PEFT's save_pretrained(path_initial_model_for_weight_conversion=...), which makes a"
            " plain LoRA of it; or extract it, with the base inside, from the wrapped checkpoint"
        )
        problems.append(Problem("E-UNSUPPORTED", what, where, hint))
    problems += [
        Problem("E-UNSUPPORTED", f"{key} is set: {why}", where, "merge it with PEFT's merge_and_unload()")
        for key, why in VARIANTS.items()
        if document.get(key)
    ]
    hint = "if it is about training only, take it out of the config; otherwise let the PEFT that wrote it merge it"
    problems += [
        Problem("E-UNSUPPORTED", f"{key} is {document[key]!r:.80}: no field of PEFT that is known", where, hint)
        for key in unknown(document)
    ]
    if problems:
        raise Unsupported(problems)


def _version(text: object) -> tuple[int, int, int] | None:
    """PEFT has written its version since 0.18; a development version may be on either side of a change."""
    if text is None:
        return (0, 17, 0)
    match = re.match(r"(\d{1,6})\.(\d{1,6})\.(\d{1,6})(?!\.?dev)", str(text))
    return None if match is None else (int(match[1]), int(match[2]), int(match[3]))


def _wholes(value: Any) -> Any:
    """Ranks that some program wrote as 4.0 as whole numbers; what is none stays as it is."""
    return {key: whole(item) for key, item in value.items()} if isinstance(value, dict) else whole(value)


def _is_rank(value: object) -> bool:
    return is_int(value) and 1 <= value <= 2**31  # type: ignore[operator]  # is_int has looked


def _is_number(value: object) -> bool:
    return (
        isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**1000 and math.isfinite(value)
    )


def _is_list(value: object, kind: type) -> bool:
    return isinstance(value, list) and all(isinstance(item, kind) for item in value)


def _is_rows(value: object) -> bool:
    if not isinstance(value, list) or not value:
        return False
    return all(is_int(row) and 0 <= row < MAX_ROW for row in value) and len(set(value)) == len(value)


def _bad_pattern(pattern: str, name: str, where: str) -> Problem | None:
    if _NESTED_REPETITION.search(pattern):
        return Problem("E-CONFIG", f"{name}: {pattern!r:.80} repeats a repetition", where, "name the modules plainly")
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        return Problem("E-CONFIG", f"{name}: {pattern!r:.80} is not a regular expression: {error}", where)
    return None


def _hit(pattern: str, module: str) -> bool:
    """PEFT's own match: the pattern is a regular expression for the end of the module's name."""
    return re.match(rf"(.*\.)?({pattern})$", module) is not None
