"""loratool explain"""

from __future__ import annotations

import click

from loratool.cli import options, output
from loratool.explanations import EXPLANATIONS, explain


@click.command(
    "explain",
    epilog="""\b
Examples:
  loratool explain E-ALPHA
  loratool explain""",
)
@click.argument("code", required=False)
@options.as_json
def explain_command(code: str | None, as_json: bool) -> None:
    """Say what an error code means and what helps; without CODE, list them all."""
    found = [*EXPLANATIONS.values()] if code is None else [explain(code)]
    if as_json:
        output.print_json("explain", {"codes": [entry.to_json() for entry in found]})
    elif code is None:
        output.print_table(("code", "meaning"), [(entry.code, entry.meaning) for entry in found])
    else:
        output.say(f"{found[0].code}: {found[0].meaning}")
        output.say(f"  help: {found[0].cure}")
