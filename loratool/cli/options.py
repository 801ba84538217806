"""Arguments that several commands share, and how their text becomes values."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from loratool import outputs

F = TypeVar("F", bound=Callable[..., Any])


Context = click.Context
Parameter = click.Parameter


def weighted(ctx: Context, param: Parameter, values: tuple[str, ...]) -> tuple[tuple[Path, float | None], ...]:
    """``PATH`` or ``PATH@WEIGHT``. A path that exists as it stands is a path, whatever it contains."""
    return tuple(_weighted_path(value) for value in values)


def _weighted_path(value: str) -> tuple[Path, float | None]:
    path, at, weight = value.rpartition("@")
    if not at or Path(value).exists():
        return Path(value), None
    try:
        number = float(weight)
    except ValueError:
        raise click.BadParameter(f"{value!r} does not exist, and {weight!r} is not a weight") from None
    if not path or not math.isfinite(number):
        raise click.BadParameter(f"{value!r} needs a path before the @, and a finite weight after it")
    return Path(path), number


def _patterns(ctx: Context, param: Parameter, values: tuple[str, ...]) -> dict[str, str]:
    """``VALUE`` for every layer, or ``PATTERN=VALUE`` for those whose name matches; what is for all goes last."""
    pairs = [value.rpartition("=") for value in values]
    found = {pattern if equals else "*": text for pattern, equals, text in pairs}
    return dict(sorted(found.items(), key=lambda pair: pair[0] == "*"))


def _alphas(ctx: Context, param: Parameter, values: tuple[str, ...]) -> dict[str, float] | None:
    try:
        found = {pattern: float(text) for pattern, text in _patterns(ctx, param, values).items()}
    except ValueError as error:
        raise click.BadParameter(f"not a number: {error}") from None
    if wrong := [value for value in found.values() if not math.isfinite(value)]:
        raise click.BadParameter(f"{wrong[0]} is not a finite number")
    return found or None


def _place(ctx: Context, param: Parameter, value: str | None) -> Path | None:
    """An output's path. Typed with a slash behind it, it is meant to be a folder."""
    return None if value is None else outputs.place(value)


def existing_path(function: F) -> F:
    return click.argument("path", type=click.Path(path_type=Path))(function)


def adapters(function: F) -> F:
    return click.argument("adapters", nargs=-1, required=True, callback=weighted, metavar="ADAPTER[@WEIGHT]...")(
        function
    )


def alpha(function: F) -> F:
    return click.option(
        "--alpha",
        multiple=True,
        callback=_alphas,
        metavar="[PATTERN=]X",
        help="Alpha, for all layers or for those whose name matches a shell pattern; may be repeated.",
    )(function)


def out(help: str) -> Callable[[F], F]:
    return click.option("-o", "--out", required=True, type=click.Path(), callback=_place, help=help)


base_out = click.option(
    "--base-out", type=click.Path(), callback=_place, help="Also write the clean base checkpoint, as a folder."
)


def force(function: F) -> F:
    return click.option("--force", is_flag=True, help="Replace an output that is there, once the new one is complete.")(
        function
    )


def layout(function: F) -> F:
    return click.option(
        "--layout",
        multiple=True,
        callback=_patterns,
        metavar="PATTERN=LAYOUT",
        help="How the base stores square matrices that nothing else settles: in_out (Conv1D) or out_in (Linear).",
    )(function)


def component(function: F) -> F:
    return click.option(
        "--component",
        multiple=True,
        metavar="NAME",
        help="Only these parts (unet, te, te1, ...) of a kohya or LyCORIS adapter; may be repeated.",
    )(function)


def map(function: F) -> F:
    return click.option(
        "--map",
        multiple=True,
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="Rules that lead the adapters' names to the base's (JSON), instead of the built-in ones; may be repeated.",
    )(function)


def enable_lora(function: F) -> F:
    return click.option(
        "--enable-lora",
        multiple=True,
        callback=_patterns,
        metavar="[PATTERN=]DIGITS",
        help="Which blocks of a packed matrix were trained, where shapes do not tell: 101 is the first and third.",
    )(function)


already_merged = click.option(
    "--already-merged",
    is_flag=True,
    help="loralib: the model was saved in eval mode, so its weights hold the delta; --base-out subtracts it again.",
)


_READING = (
    alpha,
    click.option("--scaling", metavar="RULE", help="What alpha means: alpha/rank, alpha, or alpha/sqrt(rank)."),
    click.option("--config", type=click.Path(path_type=Path), help="A PEFT adapter_config.json with rank and alpha."),
    click.option("--from", "convention", metavar="NAME", help="The convention to read, where several match."),
    click.option("--adapter", metavar="NAME", help="Which adapter, where a file holds several."),
    layout,
    enable_lora,
    already_merged,
    component,
    map,
    click.option("--only", multiple=True, metavar="PATTERN", help="Read only these keys or targets; may be repeated."),
    click.option("--skip", multiple=True, metavar="PATTERN", help="Leave these keys or targets out; may be repeated."),
)
READING = (
    "alpha",
    "scaling",
    "config",
    "convention",
    "adapter",
    "layout",
    "enable_lora",
    "already_merged",
    "component",
    "map",
    "only",
    "skip",
)


def reading(function: Callable[..., None]) -> Callable[..., None]:
    """The options that say what an adapter's file leaves open; the command gets them as one mapping, `given`."""

    @functools.wraps(function)
    def command(**params: Any) -> None:
        function(given={name: params.pop(name) for name in READING}, **params)

    decorated: Callable[..., None] = command
    for option in reversed(_READING):
        decorated = option(decorated)
    return decorated


def _bytes(ctx: Context, param: Parameter, value: str | None) -> int | None:
    """``300MB``, ``2GB``, or a plain number of bytes."""
    if value is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)b?", value.strip().lower())
    if match is None:
        raise click.BadParameter(f"{value!r} is not a size like 300MB")
    return int(float(match[1]) * 1000 ** " kmgt".index(match[2] or " "))


def resources(function: F) -> F:
    threads = click.option("--threads", type=click.IntRange(1), help="Workers [default: one per core, at most 8].")
    memory = click.option(
        "--max-memory",
        callback=_bytes,
        metavar="SIZE",
        help="Memory for the work, beside the interpreter and torch, like 300MB.",
    )
    device = click.option("--device", default="cpu", show_default=True, help="What computes: cpu, cuda or cuda:N.")
    return threads(memory(device(function)))


progress = click.option(
    "--progress",
    "progress_as",
    type=click.Choice(["auto", "json"]),
    default="auto",
    show_default=True,
    help="json: one JSON object a line on stderr, for programs; auto: a bar on a terminal.",
)
as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
quiet = click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors.")
dry_run = click.option("--dry-run", is_flag=True, help="Check everything and show the plan; write nothing.")
