"""The command line: each command parses its arguments, makes one library call, and prints the result."""

from __future__ import annotations

import difflib
import importlib
import os
import signal
import sys
import traceback

import click

from loratool.version import __version__

COMMANDS = {
    "inspect": "Show what an adapter or checkpoint is.",
    "extract": "Get the adapter out of a LoRA-wrapped checkpoint.",
    "convert": "Write an adapter in another convention.",
    "merge": "Merge adapters into a base checkpoint.",
    "unmerge": "Take merged adapters out again.",
    "verify": "Say whether a checkpoint is the base with these adapters merged in.",
    "status": "Show what was merged into a checkpoint.",
    "validate": "Check a native adapter file against the specification.",
    "explain": "Say what an error code means.",
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

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        near = difflib.get_close_matches(args[0], COMMANDS, 1) if args[0] not in COMMANDS else []
        if near:
            ctx.fail(f"No such command {args[0]!r}. Did you mean {near[0]!r}?")
        return super().resolve_command(ctx, args)

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
        sys.stdout.flush()
    except SystemExit as error:  # by a signal; with 1 click exits when the reader of its output is gone
        return _silenced(0) if error.code == 1 else int(error.code or 0)
    except BrokenPipeError:
        return _silenced(0)
    except OSError as error:
        output.complain("E-STDOUT", f"the output can not be printed: {error.strerror or error}")
        return _silenced(2)
    except Exception as error:
        if os.environ.get("LORATOOL_DEBUG"):
            traceback.print_exc()
        return output.report_bug(error, as_json)
    return code if isinstance(code, int) else 0


def _silenced(code: int) -> int:
    """Stdout is gone: flushing it at exit must not fail once more."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return code
