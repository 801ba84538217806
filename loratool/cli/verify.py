"""loratool verify"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

import loratool
from loratool.cli import options, output
from loratool.verify import VerifyReport

WORST = 5  # tensors that are listed without --verbose


@click.command(
    "verify",
    epilog="""\b
Examples:
  loratool verify merged/ my.lora.safetensors --base base/
  loratool verify merged/ style/@0.8 task.lora.safetensors --base base/ --json
  loratool verify merged/ my.lora.safetensors --base base/ --sample""",
)
@click.argument("merged", type=click.Path(path_type=Path))
@options.adapters
@click.option("--base", required=True, type=click.Path(path_type=Path), help="The checkpoint that was merged into.")
@click.option(
    "--sample",
    is_flag=False,
    flag_value=0.05,
    type=click.FloatRange(0, 1, min_open=True),
    metavar="[SHARE]",
    help="Look only at this share of each tensor's rows [0.05 if none is given].",
)
@click.option("--ulps", default=1, show_default=True, type=click.IntRange(0), help="Accepted units in the last place.")
@click.option("--rounded-delta", is_flag=True, help="Accept a delta that was rounded before it was added.")
@options.reading
@click.option("--threads", type=click.IntRange(1), help="Workers [default: one per core, at most 8].")
@options.progress
@options.as_json
@options.quiet
@click.pass_context
def verify_command(
    ctx: click.Context,
    merged: Path,
    base: Path,
    adapters: tuple[tuple[Path, float | None], ...],
    sample: float | None,
    ulps: int,
    rounded_delta: bool,
    given: dict[str, Any],
    threads: int | None,
    progress_as: str,
    as_json: bool,
    quiet: bool,
) -> None:
    """Say whether MERGED is the base with these adapters merged in, by whatever tool.

    Every tensor is compared with the correctly rounded result. Exits with 1 if the answer is no, and says why: the
    scale that was really applied, a double merge, a layer that is missing, another base.
    """
    with output.progress(quiet or as_json, progress_as) as callback:
        report = loratool.verify(
            merged,
            base,
            adapters,
            sample=sample,
            ulps=ulps,
            rounded_delta=rounded_delta,
            threads=threads,
            progress=callback,
            **given,
        )
    if as_json:
        output.print_json("verify", report.to_json())
    elif not quiet:
        _print(report)
    if not report.answer:
        ctx.exit(1)


def _print(report: VerifyReport) -> None:
    output.notes(report.notes)
    for finding in report.findings:
        output.say(f"no: {finding.text}")
        output.say(f"  in: {output.some(finding.tensors)}")
    worst = sorted((check for check in report.tensors if check.wrong), key=lambda check: -check.wrong)[:WORST]
    if worst:
        rows = [(c.name, f"{c.ulps:g}", f"{c.differing:,}", f"{c.wrong:,}", f"{c.elements:,}") for c in worst]
        output.print_table(("tensor", "ulps", "differing", "wrong", "of elements"), rows, numeric=range(1, 5))
    differing, elements = report.counts
    targets = output.count(len(report.tensors), "changed tensor")
    others = output.count(report.untouched, "other") + (" is" if report.untouched == 1 else " are")
    output.say(
        f"{report.merged}: {'yes' if report.answer else 'no'}{', by a sample' if report.sample else ''}: {targets},"
        f" {report.ulps:g} units in the last place off at most, {differing:,} of {elements:,} elements not the nearest;"
        f" {others} the base's"
    )
    if report.answer and (line := output.survives(report.survival)):
        output.say(line)
