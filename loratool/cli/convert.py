"""loratool convert"""

from __future__ import annotations

from pathlib import Path

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
@click.option("--base", type=click.Path(path_type=Path), help="The adapter's base, for what only it can tell.")
@click.option("--uniform", is_flag=True, help="One rank and one scale for all LoRA updates, for consumers like vLLM.")
@click.option("--bake", is_flag=True, help="Write what does not fit as whole merged tensors (with --base).")
@options.alpha
@click.option("--scaling", metavar="RULE", help="What alpha means: alpha/rank, alpha, or alpha/sqrt(rank).")
@click.option("--config", type=click.Path(path_type=Path), help="A PEFT adapter_config.json with rank and alpha.")
@click.option("--from", "convention", metavar="NAME", help="The convention to read, where several match.")
@click.option("--adapter", metavar="NAME", help="Which adapter, where the file holds several.")
@options.layout
@options.component
@options.enable_lora
@options.already_merged
@options.as_json
@options.quiet
def convert_command(
    source: Path,
    to: str,
    out: Path,
    base: Path | None,
    uniform: bool,
    bake: bool,
    alpha: dict[str, float] | None,
    scaling: str | None,
    config: Path | None,
    convention: str | None,
    adapter: str | None,
    layout: dict[str, str],
    component: tuple[str, ...],
    enable_lora: dict[str, str],
    already_merged: bool,
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
        bake=bake,
        alpha=alpha,
        scaling=scaling,
        config=config,
        convention=convention,
        adapter=adapter,
        layout=layout,
        component=component,
        enable_lora=enable_lora,
        already_merged=already_merged,
    )
    if as_json:
        output.print_json("convert", report.to_json())
    elif not quiet:
        output.notes(report.notes)
        updates, parameters = output.count(len(report.adapter.updates), "update"), report.adapter.parameters
        output.say(f"{out}: {updates}, {parameters:,} parameters, from {report.convention} to {report.to}")
