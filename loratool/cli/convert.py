"""loratool convert"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

import loratool
from loratool import conventions
from loratool.cli import options, output


@click.command(
    "convert",
    epilog="""\b
Examples:
  loratool convert my.lora.safetensors --to peft -o adapter-folder/
  loratool convert adapter/ --to native -o converted.lora.safetensors --base base/
  loratool convert my.lora.safetensors --to peft --uniform -o for-vllm/""",
)
@click.argument("source", type=click.Path(path_type=Path), metavar="ADAPTER")
@click.option("--to", required=True, type=click.Choice([*conventions.writers()]), help="The convention to write.")
@options.out("The adapter to write: a file or a folder, as the convention has it.")
@options.force
@click.option("--base", type=click.Path(path_type=Path), help="The adapter's base, for what only it can tell.")
@click.option("--uniform", is_flag=True, help="One rank and one scale for all LoRA updates, for consumers like vLLM.")
@click.option(
    "--as",
    "as_component",
    default="",
    metavar="NAME",
    help="The pipeline's part it is for: unet, te1 ...",
)
@click.option("--task-type", default="", metavar="TASK", help="PEFT's name of the task: CAUSAL_LM, SEQ_CLS ...")
@click.option("--base-name", default="", metavar="ID", help="The base's published id, as owner/model; never a path.")
@click.option("--revision", default="", metavar="REV", help="The revision of the base under that id.")
@click.option("--bake", is_flag=True, help="Write what does not fit as whole merged tensors (with --base).")
@click.option("--pin", is_flag=True, help="Note the digests of the base's tensors (--to native, with --base).")
@options.reading
@options.as_json
@options.quiet
def convert_command(
    source: Path,
    to: str,
    out: Path,
    force: bool,
    base: Path | None,
    uniform: bool,
    as_component: str,
    task_type: str,
    base_name: str,
    revision: str,
    bake: bool,
    pin: bool,
    given: dict[str, Any],
    as_json: bool,
    quiet: bool,
) -> None:
    """Write an adapter in another convention.

    Every delta stays what it is. What the other convention can not hold is refused by name, before anything is
    written, or baked in with --bake.
    """
    report = loratool.convert(
        source,
        out,
        to,
        base=base,
        uniform=uniform,
        as_component=as_component,
        task_type=task_type,
        base_name=base_name,
        revision=revision,
        bake=bake,
        pin=pin,
        force=force,
        **given,
    )
    if as_json:
        output.print_json("convert", report.to_json())
    elif not quiet:
        output.notes(report.notes)
        updates, parameters = output.count(len(report.adapter.updates), "update"), report.adapter.parameters
        output.say(f"{out}: {updates}, {parameters:,} parameters, from {report.convention} to {report.to}")
