"""loratool merge"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import click

import loratool
from loratool.changes import DTYPES
from loratool.cli import options, output
from loratool.cluster import dask_executor
from loratool.names import natural
from loratool.plan import Plan


@click.command(
    "merge",
    epilog="""\b
Examples:
  loratool merge base/ my.lora.safetensors -o merged/
  loratool merge base/ my.lora.safetensors -o merged/ --undo merged.undo.safetensors
  loratool merge model.pth my.lora.safetensors -o merged.pth
  loratool merge base/ style/@0.8 task.lora.safetensors@0.5 -o merged/ --dry-run""",
)
@click.argument("base", type=click.Path(path_type=Path))
@options.adapters
@options.out(
    "The checkpoint to write: a folder, or NAME.safetensors; where the base is a pickle, also NAME.pth, .pt or .bin."
)
@options.force
@click.option(
    "--dtype",
    type=click.Choice([*DTYPES], case_sensitive=False),
    default="keep",
    show_default=True,
    help="The dtype to write floating-point tensors in.",
)
@click.option("--allow-new", is_flag=True, help="Let adapters add tensors the base lacks, or resize them.")
@click.option("--require-pinned", is_flag=True, help="Refuse adapters without digests of their base.")
@click.option("--onto-merged", is_flag=True, help="Take a base that is itself the result of a merge.")
@click.option("--allow-unchanged", is_flag=True, help="Write the output even if no tensor changes.")
@click.option(
    "--tokenizer-from",
    metavar="base|adapter|FOLDER",
    default="",
    help="Whose tokenizer and chat template to write; without it, what the weights need.",
)
@click.option("--as", "form", type=click.Choice(["pth"]), help="Write a pickle, as the base is one.")
@click.option("--undo", type=click.Path(path_type=Path), help="Also write the record that makes unmerge exact.")
@click.option("--no-digests", is_flag=True, help="Leave digests of the changed tensors out of the receipt.")
@click.option(
    "--reproducible", is_flag=True, help="Round to the same bits on every machine; takes about twice as long."
)
@click.option("--link", is_flag=True, help="Hard-link files that no adapter touches, instead of copying them.")
@click.option("--resume", is_flag=True, help="Keep the finished files of an interrupted run, once verified.")
@click.option(
    "--dask",
    metavar="ADDRESS",
    help="Let a Dask cluster do the work: HOST:PORT of its scheduler, or its scheduler file.",
)
@options.reading
@options.resources
@options.dry_run
@options.progress
@options.as_json
@options.quiet
def merge_command(
    base: Path,
    adapters: tuple[tuple[Path, float | None], ...],
    out: Path,
    force: bool,
    dtype: str,
    allow_new: bool,
    allow_unchanged: bool,
    require_pinned: bool,
    onto_merged: bool,
    tokenizer_from: str,
    form: str | None,
    undo: Path | None,
    no_digests: bool,
    reproducible: bool,
    link: bool,
    resume: bool,
    dask: str | None,
    given: dict[str, Any],
    threads: int | None,
    max_memory: int | None,
    device: str,
    dry_run: bool,
    progress_as: str,
    as_json: bool,
    quiet: bool,
) -> None:
    """Merge adapters into a base checkpoint: W + sum of weight * scale * BA, rounded once.

    ADAPTERs are of any convention, each with a weight (1 if none is given). Tensor names, dtypes and shards stay
    the base's. config.json is edited where the weights need it, the tokenizer is the one they need, and a receipt of
    the merge is written beside them.
    """
    choices: dict[str, Any] = {
        "dtype": dtype,
        "allow_new": allow_new,
        "allow_unchanged": allow_unchanged,
        "require_pinned": require_pinned,
        "onto_merged": onto_merged,
        "tokenizer_from": tokenizer_from,
        "undo": undo,
        "digests": not no_digests,
        "reproducible": reproducible,
        "link": link,
        "resume": resume,
        "force": force,
        "form": form or "",
        **given,
        "threads": threads,
        "max_memory": max_memory,
        "device": device,
    }
    if dry_run:
        print_plan(loratool.plan(base, adapters, out, **choices), as_json, quiet)
        return
    if dask is not None and threads is not None:
        raise click.UsageError("--threads is for workers on this machine; those of --dask have their own number")
    cluster = nullcontext() if dask is None else dask_executor(dask)
    with cluster as executor, output.progress(quiet or as_json, progress_as) as callback:
        report = loratool.merge(base, adapters, out, **choices, progress=callback, executor=executor)
    if as_json:
        output.print_json("merge", report.to_json())
    elif not quiet:
        plan = report.plan
        output.notes([*plan.notes, *report.notes])
        changed = f"{report.changed} of {sum(len(file.tensors) for file in plan.files)} tensors changed"
        output.say(f"{out}: {changed}, {output.size(plan.nbytes)} written in {report.seconds:.2f} s")
        if line := output.survives(report.survival):
            output.say(line)
        if undo is not None:
            output.say(f"{undo}: undo record, {output.size(undo.stat().st_size)}")


def print_plan(plan: Plan, as_json: bool, quiet: bool) -> None:
    """A plan as JSON, or as a few lines and a table of what would change."""
    document = plan.to_json()
    if as_json:
        output.print_json("plan", document)
    if as_json or quiet:
        return
    exact = "" if plan.verb == "merge" else " (exact)" if plan.exact else " (approximate: no base, no undo record)"
    output.facts(
        [
            ("plan", f"{plan.verb} {plan.source} -> {plan.out}{exact}"),
            ("adapters", ", ".join(f"{a.name}@{a.weight:g}" for a in plan.adapters)),
            ("changes", f"{document['tensors_changed']} of {document['tensors_total']} tensors; the others are copied"),
            ("writes", f"{output.size(plan.nbytes)} in {output.count(len(plan.files), 'file')}"),
            ("undo", f"{plan.undo}, bit for bit" if plan.undo else ""),
            ("copies", ", ".join(document["companions"])),
            ("dtype", plan.dtype if plan.dtype != "keep" else "as stored, computed wider and rounded once"),
            ("memory", f"at most {output.size(plan.memory)} beside torch, for {output.count(plan.threads, 'thread')}"),
        ]
    )
    how = "converted" if plan.verb == "merge" else "from the record" if plan.record else "from the base"
    rows = [
        (
            change["tensor"],
            "x".join(map(str, change["shape"])),
            change["dtype"],
            ", ".join(f"{u['kind']}@{u['weight']:g}" for u in change["updates"]) or how,
        )
        for change in sorted(document["changes"], key=lambda change: natural(change["tensor"]))
    ]
    output.say("")
    output.print_table(("tensor", "shape", "dtype", "updates"), rows)
    output.notes(plan.notes)
    output.say("nothing was written (--dry-run)")
