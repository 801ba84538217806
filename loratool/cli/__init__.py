"""The command line: each command parses its arguments, makes one library call, and prints the result."""

from __future__ import annotations

import difflib
import importlib
import os
import signal
import sys
import traceback
from typing import Any, TextIO

import click

from loratool.version import __version__

COMMANDS = {
    "inspect": "Show what an adapter or checkpoint is.",
    "extract": "Get the adapter out of a LoRA-wrapped checkpoint.",
    "convert": "Write an adapter in another convention.",
    "pin": "Bind an adapter to the base it was trained on.",
    "merge": "Merge adapters into a base checkpoint.",
    "unmerge": "Take merged adapters out again.",
    "verify": "Say whether a checkpoint is the base with these adapters merged in.",
    "status": "Show what was merged into a checkpoint.",
    "validate": "Check a native adapter file against the specification.",
    "explain": "Say what an error code means.",
}

EXIT_CODES = """Exit codes: 0 done, or yes; 1 the answer is no; 2 could not run (usage, input, disk); 3 nothing can tell
(verify); 101 a bug in loratool; 130 interrupted."""


class LazyGroup(click.Group):
    """Imports a command only when it is run, so that --help answers at once."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        command: click.Command = getattr(importlib.import_module(f"loratool.cli.{name}"), f"{name}_command")
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        near = difflib.get_close_matches(args[0], COMMANDS, 1) if args[0] not in COMMANDS else []
        if near:
            ctx.fail(f"No such command {args[0]!r}. Did you mean {near[0]!r}?")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command. click takes every broken pipe for that of its output, and would end with a quiet 0."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError as error:
            sys.stdout.flush()  # fails again where it is the reader of a help text that is gone
            raise RuntimeError(f"a connection broke: {error}") from error

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
    # A scheduler's request to stop unwinds like Ctrl-C: staging folders are removed on the way.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    for name, number in (("stdout", 1), ("stderr", 2)):
        if getattr(sys, name) is None:  # closed by the shell; a file to write would get its number
            setattr(sys, name, _nowhere(number))
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run the command line and return its exit code."""
    from loratool.cli import output
    from loratool.errors import LoratoolError

    words = arguments[: arguments.index("--")] if "--" in arguments else arguments
    as_json = "--json" in words
    try:
        try:
            code = cli.main(arguments, prog_name="loratool", standalone_mode=False)  # an early exit returns its code
        except (LoratoolError, click.ClickException) as error:
            code = output.report_error(error, as_json)
        except (KeyboardInterrupt, click.Abort):
            code = output.report_interrupt(as_json)
        output.flush()
    except SystemExit as error:  # by a signal; with 1 click exits when the reader of a help text is gone
        if error.code != 1:
            return int(error.code or 0)
        output.silence(sys.stdout)
        return 0
    except OSError as error:
        output.complain("E-STDOUT", f"the output can not be printed: {error.strerror or error}")
        output.silence(sys.stdout)
        return 2
    except Exception as error:
        if os.environ.get("LORATOOL_DEBUG"):
            traceback.print_exc()
        return output.report_bug(error, as_json)
    return code if isinstance(code, int) else 0


def _nowhere(number: int) -> TextIO:
    """What takes a closed stream's place, under the number that it had."""
    found = os.open(os.devnull, os.O_WRONLY)
    if found != number:
        os.dup2(found, number)
        os.close(found)
    return open(number, "w", encoding="utf-8", closefd=False)  # a number is no path; for ever
