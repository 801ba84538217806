"""loratool inspect"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

import loratool
from loratool.cli import options, output
from loratool.names import listed, natural
from loratool.partial import Unplaced, reasons
from loratool.summary import Summary

SHOWN_BESIDE = 8  # files of a folder
SHOWN_TENSORS = 4
SHOWN_PROBLEMS = 5


@click.command(
    "inspect",
    epilog="""\b
Examples:
  loratool inspect my.lora.safetensors
  loratool inspect adapter/ --base base/ --layers""",
)
@options.existing_path
@click.option("--base", type=click.Path(path_type=Path), help="A base checkpoint: which of its tensors would change?")
@click.option("--layers", is_flag=True, help="One row per update instead of one per group.")
@options.reading
@options.as_json
def inspect_command(
    path: Path,
    base: Path | None,
    layers: bool,
    given: dict[str, Any],
    as_json: bool,
) -> None:
    """Show what an adapter or checkpoint is, from its headers.

    PATH is an adapter of any convention, a LoRA-wrapped checkpoint, a plain or a merged checkpoint. What can not be
    placed is listed with the reason, and the exit code is 0 all the same: looking worked.
    """
    summary = loratool.inspect(path, base=base, **given)
    if as_json:
        output.print_json("inspect", summary.to_json())
        return
    output.facts(_facts(summary))
    if summary.layers:
        output.say("")
        (_print_layers if layers else _print_groups)(summary)
    output.notes(summary.notes)
    _print_problems(summary)


def _facts(summary: Summary) -> list[tuple[str, str]]:
    version = f", format {summary.format_version}" if summary.format_version else ""
    header = (
        "" if summary.header_bytes is None else f" = header {summary.header_bytes:,} + data {summary.tensor_bytes:,}"
    )
    pairs = [
        ("path", summary.path),
        ("what", f"{summary.title}{version}" if summary.convention else summary.what),
        (
            "on disk",
            f"{output.size(summary.file_bytes)}{header}" + (f" in {summary.files} files" * (summary.files > 1)),
        ),
        ("tensors", f"{summary.tensors:,} with {summary.parameters:,} parameters"),
        ("dtypes", ", ".join(f"{dtype} x {count}" for dtype, count in summary.dtypes.items())),
    ]
    pairs.append(("quantised", _methods(summary.quantised)))
    if summary.layers:
        updates = output.count(len(summary.layers), "update")
        sizes = f"{summary.adapter_parameters:,} parameters, {summary.adapter_bytes:,} bytes"
        pairs.append(("adapter", f"{updates}, {sizes}"))
        known = f"pinned by the digests of {output.count(summary.base_digests, 'tensor')}"
        known = known if summary.base_digests else "not pinned: no digests in the file"
        revision = f"revision {summary.base_revision}" if summary.base_revision else ""
        named = (summary.base_name, revision, summary.base_architecture, known)
        pairs.append(("base", ", ".join(filter(None, named))))
        pairs.append(("acts", f"{summary.condition}: it can not be merged" if summary.condition else ""))
        pairs += _info(summary)
    if summary.fit:
        fit = summary.fit
        pairs.append(("of base", f"{fit.path}: {fit.share:.2%} of its {fit.bytes:,} bytes"))
        pairs.append(("quantised", _methods(fit.quantised)))
        pairs.append(("touches", f"{output.count(len(fit.touched), 'tensor')}: {output.some(fit.touched)}"))
        for label, names in (("missing", fit.missing), ("wrong shape", fit.wrong_shape)):
            pairs.append((label, f"{len(names)}: {output.some(names)}" if names else ""))
    pairs.append(("beside", listed((file.name for file in summary.beside), SHOWN_BESIDE)))
    if summary.receipt:
        merged = ", ".join(f"{a.name}@{a.weight:g} ({a.digest[:15]}...)" for a in summary.receipt.adapters)
        pairs.append(("merged", f"{merged} by {summary.receipt.tool}, {len(summary.receipt.tensors)} tensors changed"))
    return pairs


def _info(summary: Summary) -> list[tuple[str, str]]:
    """What the adapter says of itself, short: --json has it whole."""
    info = dict(summary.info)
    texts = ("title", "description", "license", "source", "weight")
    shown: list[tuple[str, Any]] = [(name, info.pop(name)) for name in texts if name in info]
    shown += [(name, ", ".join(info.pop(name))) for name in ("triggers", "authors") if _are_texts(info.get(name))]
    pairs = [(name, f"{value!s:.200}".replace("\n", " ")) for name, value in shown]
    more = [*info, *summary.metadata]
    return [*pairs, ("also says", output.some(more))] if more else pairs


def _are_texts(value: object) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(item, str) for item in value)


def _methods(found: Mapping[str, int]) -> str:
    return ", ".join(f"{output.count(count, 'weight')} as {method}" for method, count in found.items())


def _print_problems(summary: Summary) -> None:
    """Why it can not be used as it is: on stdout, because that is what was asked for."""
    unplaced = dict(reasons(summary.unplaced))
    for problem in summary.problems[:SHOWN_PROBLEMS]:
        output.say(f"problem[{problem.code}]: {problem.message}" + (f" ({problem.rule})" if problem.rule else ""))
        if tensors := unplaced.pop(problem.message, []):
            output.say(f"  not placed: {_tensors(tensors)}")
        if problem.hint:
            output.say(f"  help: {problem.hint}")
    if len(summary.problems) > SHOWN_PROBLEMS:
        output.say(f"and {len(summary.problems) - SHOWN_PROBLEMS} more problems; --json lists them")
    told = {problem.message for problem in summary.problems}
    for reason, tensors in unplaced.items():
        if reason not in told:
            output.say(f"not placed: {_tensors(tensors)}: {reason}")


def _tensors(tensors: Sequence[Unplaced]) -> str:
    shown = (f"{tensor.name} {tensor.dtype} {list(tensor.shape)}" for tensor in tensors)
    return f"{output.count(len(tensors), 'tensor')}, {listed(shown, SHOWN_TENSORS)}"


def _print_groups(summary: Summary) -> None:
    several = bool(summary.adapters)
    rows = [
        (g.pattern, *([g.adapter] if several else []), g.kind, str(g.count), g.rank, g.alpha, g.scale, f"{g.bytes:,}")
        for g in summary.groups
    ]
    columns = ("target", *(["adapter"] if several else []), "kind", "count", "rank", "alpha", "scale", "bytes")
    output.print_table(columns, rows, numeric=range(2 + several, 7 + several))


def _print_layers(summary: Summary) -> None:
    def text(value: float | None) -> str:
        return "-" if value is None else f"{value:g}"

    several = bool(summary.adapters)
    rows = [
        (
            layer.target + (f" [{layer.part}]" if layer.part else ""),
            *([layer.adapter] if several else []),
            layer.kind,
            "x".join(map(str, layer.shape)),
            text(layer.rank),
            text(layer.alpha),
            text(layer.scale),
            f"{layer.bytes:,}",
        )
        for layer in sorted(summary.layers, key=lambda layer: natural(layer.target))
    ]
    columns = ("target", *(["adapter"] if several else []), "kind", "shape", "rank", "alpha", "scale", "bytes")
    output.print_table(columns, rows, numeric=range(2 + several, 7 + several))
