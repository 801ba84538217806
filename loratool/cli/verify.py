"""loratool verify"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

import loratool
from loratool.applied import Applied
from loratool.claims import Claim
from loratool.cli import options, output
from loratool.diagnosis import apart
from loratool.names import listed
from loratool.verify import VerifyReport

WORST = 5  # tensors that are listed without --verbose
EXIT = {"yes": 0, "no": 1, "can-not-tell": 3}
WORDS = {"yes": "yes", "no": "no", "can-not-tell": "can not tell"}


def _given(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> object:
    if not values:
        raise click.UsageError(
            "which adapters were merged? They are arguments, as in `loratool verify merged/ my.lora.safetensors@0.8"
            " --base base/`; --adapter only says which one of several in a file",
            ctx,
        )
    return options.weighted(ctx, param, values)


@click.command(
    "verify",
    epilog="""\b
Examples:
  loratool verify merged/ my.lora.safetensors --base base/
  loratool verify merged/ style/@0.8 task.lora.safetensors --base base/ --json
  loratool verify merged/ my.lora.safetensors --base base/ --sample""",
)
@click.argument("merged", type=click.Path(path_type=Path))
@click.argument("adapters", nargs=-1, callback=_given, metavar="ADAPTER[@WEIGHT]...")
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
    weight that was really applied, a double merge, a layer that is missing, another base. Exits with 3 if nothing can
    tell: the change is so small that its right merge is the base, bit for bit.
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
        output.print_json("verify", report.to_json(), ok=report.answer, version=2)
    elif not quiet:
        _print(report)
    ctx.exit(EXIT[report.verdict])


def _print(report: VerifyReport) -> None:
    output.notes(report.notes)
    output.notes([f"{listed(remark.tensors)}: {remark.text}" for remark in report.remarks])
    if report.claim is not None:
        output.say(_claimed(report.claim))
    for finding in report.findings:
        output.say(f"no: {finding.text}")
        if finding.tensors:
            output.say(f"  in: {output.some(finding.tensors)}")
    worst = sorted((check for check in report.tensors if check.bad), key=lambda check: -check.differing)[:WORST]
    if worst:
        rows = [(c.name, f"{c.error:.2g}", f"{c.differing:,}", f"{c.wrong:,}", f"{c.elements:,}") for c in worst]
        output.print_table(("tensor", "error", "differing", "wrong", "of elements"), rows, numeric=range(1, 5))
    for applied in report.applied:
        output.say(f"{applied.name}: asked with weight {applied.asked:g}, {_measured(applied)}")
    differing, elements = report.counts
    targets = output.count(len(report.tensors), "changed tensor")
    others = output.count(report.untouched, "other") + (" is" if report.untouched == 1 else " are")
    answer = WORDS[report.verdict] + (", by a sample" if report.sample else "")
    output.say(
        f"{report.merged}: {answer}: {targets}, {differing:,} of {elements:,} elements not the nearest,"
        f" {_off(report.error)}; {others} the base's"
    )
    if report.answer and (line := output.survives(report.survival)):
        output.say(line)


def _claimed(claim: Claim) -> str:
    """What the receipt says."""
    what = ", ".join(f"{adapter.name}@{adapter.weight:g}" for adapter in claim.adapters)
    if claim.agrees:
        return f"its receipt says the same: {what}"
    return f"its receipt says something else{f' ({what})' if what else ''}: {'; '.join(claim.differences)}"


def _measured(applied: Applied) -> str:
    """The weight that was found, and how many tensors it was found in."""
    where = output.count(applied.tensors, "tensor")
    if not applied.told:
        return f"which does not show in any of {where}: its change is less than the dtype can hold"
    if applied.weight is None:
        return f"what was merged can not be told ({where})"
    few = applied.lowest != applied.highest
    ends = (applied.lowest or 0.0, applied.highest or 0.0)
    spread = f" in most ({apart(ends[0], applied.asked)} to {apart(ends[1], applied.asked)})" if few else ""
    return f"merged with {apart(applied.weight, applied.asked)}{spread} ({where})"


def _off(error: float) -> str:
    return "none off" if not error else f"off by {error:.1e} of its row's largest at most"
