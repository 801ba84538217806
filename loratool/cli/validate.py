"""loratool validate"""

from __future__ import annotations

from pathlib import Path

import click

import loratool
from loratool.cli import options, output


@click.command(
    "validate",
    epilog="""\b
Examples:
  loratool validate my.lora.safetensors
  loratool validate my.lora.safetensors --json""",
)
@click.argument("file", type=click.Path(path_type=Path))
@options.as_json
@options.quiet
@click.pass_context
def validate_command(ctx: click.Context, file: Path, as_json: bool, quiet: bool) -> None:
    """Check a native adapter file against the specification, values included.

    Names every rule that the file breaks; exits with 1 if there is one.
    """
    findings = loratool.validate(file)
    if as_json:
        found = [finding.to_json() for finding in findings]
        output.print_json("validate", {"path": str(file), "findings": found}, ok=not found, version=2)
    elif findings:
        output.print_table(("rule", "code", "finding"), [(f.rule, f.code, f.message) for f in findings])
        output.say(f"{file}: {output.count(len(findings), 'finding')}; the rules are in spec/FORMAT.md")
    elif not quiet:
        output.say(f"{file}: valid")
    if findings:
        ctx.exit(1)
