"""loratool status"""

from __future__ import annotations

from pathlib import Path

import click

import loratool
from loratool.cli import options, output


@click.command(
    "status",
    epilog="""\b
Examples:
  loratool status merged/
  loratool status merged/ --check --json""",
)
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--check", is_flag=True, help="Compare the digests of the merged tensors with those in the receipt.")
@options.progress
@options.as_json
@options.quiet
@click.pass_context
def status_command(ctx: click.Context, path: Path, check: bool, progress_as: str, as_json: bool, quiet: bool) -> None:
    """Show what was merged into a checkpoint, from its receipt.

    Exits with 1 where there is no receipt, or with --check, where a tensor is not the one that was written.
    """
    with output.progress(quiet or as_json, progress_as) as callback:
        found = loratool.status(path, check=check, progress=callback)
    if as_json:
        output.print_json("status", found.to_json(), ok=found.answer, version=2)
    elif not quiet:
        receipt = found.receipt
        if receipt is None:
            output.say(f"{path}: no receipt: loratool has merged nothing into it")
        else:
            merges = [
                ", ".join(f"{a.name}@{a.weight:g} ({a.digest[:19]}...)" for a in stage.adapters)
                for stage in receipt.stages
            ]
            checked = f"{found.checked:,} digests compared" if check else "not compared (--check)"
            output.facts(
                [
                    *[("earlier", adapters) for adapters in merges[:-1]],
                    ("merged", merges[-1]),
                    ("by", f"{receipt.tool}, dtype {receipt.dtype}"),
                    ("changed", output.count(len(receipt.tensors), "tensor")),
                    ("dropped", ", ".join(receipt.dropped)),
                    ("checked", checked),
                    (
                        "unproven",
                        output.count(found.unproven, "tensor") + " without a digest" if found.unproven else "",
                    ),
                ]
            )
            if found.changed:
                output.say(f"no: changed since the merge: {output.some(found.changed)}")
    if not found.answer:
        ctx.exit(1)
