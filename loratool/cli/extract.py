"""loratool extract"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

import loratool
from loratool.cli import options, output


@click.command(
    "extract",
    epilog="""\b
Examples:
  loratool extract wrapped.pth -o my.lora.safetensors --alpha 16 --scaling alpha/rank
  loratool extract wrapped.pth -o my.lora.safetensors --config adapter_config.json --base-out base/""",
)
@click.argument("wrapped", type=click.Path(path_type=Path))
@options.out("The adapter file to write, usually NAME.lora.safetensors.")
@options.force
@options.reading
@click.option("--base", type=click.Path(path_type=Path), help="The base, where the file holds no base weights.")
@options.base_out
@options.progress
@options.as_json
@options.quiet
def extract_command(
    wrapped: Path,
    out: Path,
    force: bool,
    given: dict[str, Any],
    base: Path | None,
    base_out: Path | None,
    progress_as: str,
    as_json: bool,
    quiet: bool,
) -> None:
    """Get the adapter out of a LoRA-wrapped checkpoint, as a native file bound to its base.

    A wrapped checkpoint stores the factors but not alpha: give --alpha and --scaling, or --config.
    """
    with output.progress(quiet or as_json, progress_as) as callback:
        report = loratool.extract(
            wrapped,
            out,
            **given,
            base=base,
            base_out=base_out,
            force=force,
            progress=callback,
        )
    if as_json:
        output.print_json("extract", report.to_json())
    elif not quiet:
        output.notes(report.adapter.notes)
        updates, parameters = output.count(len(report.adapter.updates), "update"), report.adapter.parameters
        output.say(f"{out}: {updates}, {parameters:,} parameters, out of a {report.title}")
        if base_out is not None:
            output.say(f"{base_out}: the clean base")
