"""The command line: each command parses its arguments, makes one library call, and prints the result."""

from __future__ import annotations

import importlib
import os
import sys
import traceback

import click

from loratool.version import __version__

COMMANDS = {
    "inspect": "Show what an adapter or checkpoint is.",
    "extract": "Get the adapter out of a LoRA-wrapped checkpoint.",
    "merge": "Merge adapters into a base checkpoint.",
    "unmerge": "Take merged adapters out again.",
    "validate": "Check a native adapter file against the specification.",
}

EXIT_CODES = """Exit codes: 0 done; 1 the answer is no; 2 could not run (usage, input, disk); 101 a bug in loratool;
130 interrupted."""


class LazyGroup(click.Group):
    """Imports a command only when it is run, so that --help answers at once."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        command: click.Command = getattr(importlib.import_module(f"loratool.cli.{name}"), f"{name}_command")
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=LazyGroup, epilog=EXIT_CODES, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="loratool")
def cli() -> None:
    """Extract, inspect, merge and unmerge LoRA adapters, as files.

    \b
      loratool inspect adapter/
      loratool extract wrapped.pth -o my.lora.safetensors --alpha 16 --scaling alpha/rank
      loratool merge base/ my.lora.safetensors@0.8 -o merged/
      loratool unmerge merged/ my.lora.safetensors --base base/ -o restored/
    """


def main() -> None:
    """The entry point: runs a command and turns whatever happens into an exit code."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run the command line and return its exit code."""
    from loratool.cli import output

    as_json = "--json" in arguments
    try:
        cli.main(arguments, prog_name="loratool", standalone_mode=False)
    except output.known_errors() as error:
        return output.report_error(error, as_json)
    except click.exceptions.Exit as error:
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        return output.report_interrupt(as_json)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nobody reads on: flushing must not fail
        return 0
    except Exception as error:
        if os.environ.get("LORATOOL_DEBUG"):
            traceback.print_exc()
        return output.report_bug(error, as_json)
    return 0
