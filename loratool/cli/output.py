"""How results, errors and progress look. Data goes to stdout, everything else to stderr."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from loratool.errors import LoratoolError, Problem

if TYPE_CHECKING:
    from loratool.merge import Progress

SHOWN_PROBLEMS = 10
PROGRESS_AFTER = 0.5  # seconds: a quick command shows no bar


def known_errors() -> tuple[type[Exception], ...]:
    return (LoratoolError, click.ClickException)


def print_json(command: str, document: dict[str, Any]) -> None:
    """The one JSON document of a command. Its bytes do not depend on the terminal."""
    click.echo(json.dumps({"schema": f"loratool.{command}/1", "ok": True, **document}, indent=2, ensure_ascii=False))


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], numeric: Sequence[int] = ()) -> None:
    """A table: as wide as the terminal, unwrapped in a pipe."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    terminal = sys.stdout.isatty()
    console = Console(width=None if terminal else 100_000, soft_wrap=not terminal, highlight=False)
    table = Table(box=SIMPLE_HEAD if terminal else None, pad_edge=False, header_style="bold")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number in numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    if terminal:
        console.print(table)
    else:  # no trailing blanks for `cut` and `diff` to trip over
        with console.capture() as capture:
            console.print(table)
        click.echo("\n".join(line.rstrip() for line in capture.get().splitlines()))


def facts(pairs: Sequence[tuple[str, str]]) -> None:
    """Aligned ``name  value`` lines; empty values are left out."""
    width = max(len(name) for name, _ in pairs)
    for name, value in pairs:
        if value:
            click.echo(f"{name:<{width}}  {value}")


def notes(lines: Sequence[str]) -> None:
    for line in lines:
        click.echo(f"note: {line}")


def size(nbytes: int) -> str:
    """``90.9 MB (90,868,376 bytes)``."""
    if nbytes < 1000:
        return f"{nbytes} bytes"
    power = min((len(str(nbytes)) - 1) // 3, 4)
    return f"{nbytes / 1000**power:.3g} {'kMGT'[power - 1]}B ({nbytes:,} bytes)"


@contextmanager
def progress(quiet: bool) -> Iterator[Callable[[Progress], None] | None]:
    """A progress callback that draws a bar in bytes, on a terminal only and only if the work takes a while."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TransferSpeedColumn
    from rich.progress import Progress as Bar

    bar = Bar(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    started = time.monotonic()
    task = bar.add_task("", total=None)

    def show(step: Progress) -> None:
        if not bar.live.is_started and time.monotonic() - started > PROGRESS_AFTER:
            bar.start()
        bar.update(task, description=step.what, completed=step.done, total=step.total)

    try:
        yield show
    finally:
        bar.stop()


def report_error(error: Exception, as_json: bool) -> int:
    """Print an error, and return its exit code: what and where, why, and what helps."""
    if isinstance(error, click.ClickException):
        usage = error.ctx.get_usage() if isinstance(error, click.UsageError) and error.ctx else ""
        problems: Sequence[Problem] = [Problem("E-USAGE", error.format_message(), hint=_usage_hint(error))]
        code = 2
    else:
        assert isinstance(error, LoratoolError)
        problems, code, usage = error.problems, error.exit_code, ""
    if as_json:
        _print_failure(problems)
        return code
    for problem in problems[:SHOWN_PROBLEMS]:
        rule = f" ({problem.rule})" if problem.rule else ""
        click.echo(click.style(f"error[{problem.code}]", fg="red", bold=True) + f": {problem.message}{rule}", err=True)
        if problem.where:
            click.echo(f"  in: {problem.where}", err=True)
        if problem.hint:
            click.echo(f"  help: {problem.hint}", err=True)
    if len(problems) > SHOWN_PROBLEMS:
        click.echo(f"and {len(problems) - SHOWN_PROBLEMS} more problems; --json lists them all", err=True)
    if usage:
        click.echo(usage, err=True)
    return code


def _usage_hint(error: click.ClickException) -> str:
    context = error.ctx if isinstance(error, click.UsageError) else None
    return f"see `{context.command_path} --help`" if context else "see `loratool --help`"


def _print_failure(problems: Sequence[Problem]) -> None:
    document = {
        "schema": "loratool.error/1",
        "ok": False,
        "error": problems[0].to_json(),
        "problems": [problem.to_json() for problem in problems],
    }
    click.echo(json.dumps(document, indent=2, ensure_ascii=False))


def report_interrupt(as_json: bool) -> int:
    problem = Problem("E-INTERRUPTED", "interrupted; nothing was left behind")
    if as_json:
        _print_failure([problem])
    else:
        click.echo(problem.message, err=True)
    return 130


def report_bug(error: Exception, as_json: bool) -> int:
    problem = Problem(
        "E-BUG",
        f"a bug in loratool, sorry: {type(error).__name__}: {error}",
        hint="LORATOOL_DEBUG=1 shows the traceback; please report it",
    )
    if as_json:
        _print_failure([problem])
    else:
        click.echo(f"error[{problem.code}]: {problem.message}\n  help: {problem.hint}", err=True)
    return 101
