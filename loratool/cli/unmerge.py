"""loratool unmerge"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

import loratool
from loratool.api import plan_of_unmerge
from loratool.cli import options, output
from loratool.cli.merge import print_plan
from loratool.merge import UnmergeReport


@click.command(
    "unmerge",
    epilog="""\b
Examples:
  loratool unmerge merged/ my.lora.safetensors --base base/ -o restored/
  loratool unmerge merged/ my.lora.safetensors --undo merged.undo.safetensors -o restored/
  loratool unmerge merged/ my.lora.safetensors -o restored/ --dry-run""",
)
@click.argument("merged", type=click.Path(path_type=Path))
@options.adapters
@options.out(
    "The checkpoint to write: a folder, or NAME.safetensors; where MERGED is a pickle, also NAME.pth, .pt or .bin."
)
@options.force
@click.option("--base", type=click.Path(path_type=Path), help="The base: its tensors are restored bit for bit.")
@click.option("--undo", type=click.Path(path_type=Path), help="The record of `merge --undo`: exact, without the base.")
@click.option("--exact", is_flag=True, help="Refuse (exit 1) unless the result is bit-exact.")
@options.reading
@options.resources
@options.dry_run
@options.progress
@options.as_json
@options.quiet
def unmerge_command(
    merged: Path,
    adapters: tuple[tuple[Path, float | None], ...],
    out: Path,
    force: bool,
    base: Path | None,
    undo: Path | None,
    exact: bool,
    given: dict[str, Any],
    threads: int | None,
    max_memory: int | None,
    device: str,
    dry_run: bool,
    progress_as: str,
    as_json: bool,
    quiet: bool,
) -> None:
    """Take merged adapters out of a checkpoint that `loratool merge` wrote.

    Its receipt knows the adapters, their weights and the base's digests. With --undo or --base the result is the base
    bit for bit; with neither the updates are subtracted, exact only up to rounding, and the output says how far.
    """
    choices: dict[str, Any] = {
        "base": base,
        "undo": undo,
        "exact": exact,
        "force": force,
        **given,
        "threads": threads,
        "max_memory": max_memory,
        "device": device,
    }
    if dry_run:
        print_plan(plan_of_unmerge(merged, adapters, out, **choices), as_json, quiet)
        return
    with output.progress(quiet or as_json, progress_as) as callback:
        report = loratool.unmerge(merged, adapters, out, **choices, progress=callback)
    if as_json:
        output.print_json("unmerge", report.to_json())
    elif not quiet:
        output.notes(report.plan.notes)
        for line in _verdict(report):
            output.say(line)


def _verdict(report: UnmergeReport) -> list[str]:
    what = f"{report.plan.out}: {report.restored} of {report.total} changed tensors are bit-equal to the base"
    if report.exact:
        return [f"{what}: exact, proven by their digests ({report.seconds:.2f} s)"]
    if report.plan.exact:
        return [f"{report.plan.out}: the given base, {report.seconds:.2f} s; the merge kept no digests to prove it by"]
    return [
        f"{what}: approximate, no element is off by more than {report.bound:.3g} ({report.seconds:.2f} s)",
        "  help: --base BASE, or the record of `merge --undo`, restores every bit",
    ]
