"""loratool inspect"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

import loratool
from loratool.cli import options, output
from loratool.names import natural
from loratool.summary import Summary


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

    PATH is an adapter of any convention, a LoRA-wrapped checkpoint, a plain or a merged checkpoint.
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
        pairs.append(("touches", f"{output.count(len(fit.touched), 'tensor')}: {output.some(fit.touched)}"))
        for label, names in (("missing", fit.missing), ("wrong shape", fit.wrong_shape)):
            pairs.append((label, f"{len(names)}: {output.some(names)}" if names else ""))
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


def _print_groups(summary: Summary) -> None:
    rows = [(g.pattern, g.kind, str(g.count), g.rank, g.alpha, g.scale, f"{g.bytes:,}") for g in summary.groups]
    output.print_table(("target", "kind", "count", "rank", "alpha", "scale", "bytes"), rows, numeric=range(2, 7))


def _print_layers(summary: Summary) -> None:
    def text(value: float | None) -> str:
        return "-" if value is None else f"{value:g}"

    rows = [
        (
            layer.target + (f" [{layer.part}]" if layer.part else ""),
            layer.kind,
            "x".join(map(str, layer.shape)),
            text(layer.rank),
            text(layer.alpha),
            text(layer.scale),
            f"{layer.bytes:,}",
        )
        for layer in sorted(summary.layers, key=lambda layer: natural(layer.target))
    ]
    columns = ("target", "kind", "shape", "rank", "alpha", "scale", "bytes")
    output.print_table(columns, rows, numeric=range(2, 7))
