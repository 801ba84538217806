"""loratool pin"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

import loratool
from loratool.cli import options, output


@click.command(
    "pin",
    epilog="""\b
Examples:
  loratool pin my.lora.safetensors --base base/ -o pinned.lora.safetensors
  loratool pin adapter/ --base base/ -o pinned.lora.safetensors""",
)
@click.argument("source", type=click.Path(path_type=Path), metavar="ADAPTER")
@click.option("--base", required=True, type=click.Path(path_type=Path), help="The base that it was trained on.")
@options.out("The native adapter to write, usually NAME.lora.safetensors.")
@options.force
@options.reading
@options.as_json
@options.quiet
def pin_command(
    source: Path, base: Path, out: Path, force: bool, given: dict[str, Any], as_json: bool, quiet: bool
) -> None:
    """Bind an adapter to a base: a native file with the digests of the tensors that it changes.

    From then on it is refused on any other base, and `merge --require-pinned` takes it. What it is bound to is what
    you give: make sure that this is the base it was trained on.
    """
    report = loratool.pin(source, out, base, force=force, **given)
    if as_json:
        output.print_json("pin", report.to_json())
    elif not quiet:
        output.notes(report.notes)
        known = output.count(len(report.adapter.base.tensors), "tensor")
        output.say(f"{out}: {output.count(len(report.adapter.updates), 'update')}, bound to {known} of {base}")
