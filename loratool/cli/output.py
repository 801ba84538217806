"""How results, errors and progress look. Data goes to stdout, everything else to stderr."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, TextIO

import click

from loratool.errors import LoratoolError, Problem
from loratool.survival import Survival, total

if TYPE_CHECKING:
    from loratool.workers import Progress

SHOWN_PROBLEMS = 3  # of one code
PROGRESS_AFTER = 0.5  # seconds: a quick command shows no bar
PROGRESS_EVERY = 0.1  # seconds between two lines of --progress json


def print_json(command: str, document: dict[str, Any], *, ok: bool = True, version: int = 1) -> None:
    """The one JSON document of a command. Its bytes do not depend on the terminal.

    `ok` is whether the answer is yes, where the command answers a question; it did its work in any case. `version` is
    that of the document's schema.
    """
    _print_document({"schema": f"loratool.{command}/{version}", "ok": ok, **document})


def _print_document(document: dict[str, Any]) -> None:
    emit(json.dumps(document, indent=2, allow_nan=False))


def emit(text: str, *, error: bool = False, colour: bool | None = None) -> None:
    """Print. A reader that is gone changes nothing: the command ends with the exit code that it would have had."""
    try:
        click.echo(text, err=error, color=colour)
    except OSError as failure:
        if not error and not isinstance(failure, BrokenPipeError):
            raise
        silence(sys.stderr if error else sys.stdout)


def silence(stream: TextIO) -> None:
    """Send to nowhere what is still to be printed: flushing it at the end must not fail once more."""
    with suppress(OSError):  # what has no file behind it
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def flush() -> None:
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        silence(sys.stdout)


def printable(text: str) -> str:
    """Text from a file, without what could drive a terminal: control and invisible characters are escaped."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def say(text: str, *, error: bool = False) -> None:
    emit(printable(text), error=error)


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], numeric: Sequence[int] = ()) -> None:
    """A table: as wide as the terminal, unwrapped in a pipe."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    terminal = sys.stdout.isatty()
    console = Console(width=None if terminal else 100_000, highlight=False)
    gap = 2 if console.width >= 100 else 1
    table = Table(box=None, pad_edge=False, padding=(0, gap, 0, 0), header_style="bold")
    for number, column in enumerate(columns):
        right = number in numeric
        table.add_column(column, justify="right" if right else "left", overflow="fold", no_wrap=right)
    cells = [[printable(cell) for cell in row] for row in rows]
    others = sum(gap + max(map(len, column)) for column in [*zip(columns, *cells, strict=True)][1:])
    for name, *rest in cells:
        table.add_row(*map(Text, (_folded(name, console.width - others), *rest)))
    with console.capture() as capture:
        console.print(table)
    lines = (line.rstrip() for line in capture.get().splitlines())
    emit("\n".join(lines))


def _folded(name: str, width: int) -> str:
    """A dotted name on as many lines as it needs, broken after dots."""
    lines = [""]
    for part in re.split(r"(?<=\.)", name):
        if lines[-1].strip() and len(lines[-1]) + len(part) > width:
            lines.append("  ")
        lines[-1] += part
    return "\n".join(lines)


def facts(pairs: Sequence[tuple[str, str]]) -> None:
    """Aligned ``name  value`` lines; empty values are left out."""
    width = max(len(name) for name, _ in pairs)
    for name, value in pairs:
        if value:
            say(f"{name:<{width}}  {value}")


def notes(lines: Sequence[str]) -> None:
    for line in lines:
        say(f"note: {line}")


def count(number: int, noun: str) -> str:
    """``1 update``, ``36 updates``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def some(names: Sequence[str]) -> str:
    """``a, b, ... (17 in all)``."""
    return ", ".join(names[:2]) + (f", ... ({len(names)} in all)" if len(names) > 2 else "")


def survives(found: Mapping[str, Survival]) -> str:
    """How much of a change is left after rounding; "" where there is none."""
    share, moved = total(found).share, total(found).moved_share
    if share is None or moved is None:
        return ""
    return f"{share:.1%} of the change survives rounding, {moved:.1%} of its elements moved"


def size(nbytes: int) -> str:
    """``90.9 MB (90,868,376 bytes)``."""
    if nbytes < 1000:
        return f"{nbytes} bytes"
    power = min((len(str(nbytes)) - 1) // 3, 4)
    return f"{nbytes / 1000**power:.3g} {'kMGT'[power - 1]}B ({nbytes:,} bytes)"


@contextmanager
def progress(quiet: bool, how: str = "auto") -> Iterator[Callable[[Progress], None] | None]:
    """A progress callback that draws a bar in bytes, on a terminal only and only if the work takes a while.

    With "json" it prints lines for programs instead, `quiet` or not.
    """
    if how == "json":
        yield _progress_lines()
        return
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
    task = bar.add_task("", total=None)
    started = 0.0

    def show(step: Progress) -> None:
        nonlocal started
        started = started or time.monotonic()  # of the writing: imports and checks are not progress
        bar.update(task, description=printable(step.what), completed=step.done, total=step.total)
        if not bar.live.is_started and time.monotonic() - started > PROGRESS_AFTER:
            bar.start()

    try:
        yield show
    finally:
        bar.stop()


def _progress_lines() -> Callable[[Progress], None]:
    """Prints steps as JSON, a line each: not more than a reader can use, and always the last one."""
    last = -PROGRESS_EVERY

    def show(step: Progress) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < PROGRESS_EVERY and step.done < step.total:
            return
        last = now
        line = json.dumps({"schema": "loratool.progress/1", **step._asdict()})
        with suppress(OSError):  # a reader that is gone does not end the work
            click.echo(line, err=True)

    return show


def report_error(error: LoratoolError | click.ClickException, as_json: bool) -> int:
    """Print an error, and return its exit code: what and where, why, and what helps."""
    if isinstance(error, LoratoolError):
        problems, code, usage = error.problems, error.exit_code, ""
    elif type(error).__name__ == "NoArgsIsHelpError":
        emit(error.format_message(), error=True)
        return 2
    else:
        context = error.ctx if isinstance(error, click.UsageError) else None
        hint = f"see `{context.command_path if context else 'loratool'} --help`"
        problems, code = (Problem("E-USAGE", error.format_message(), hint=hint),), 2
        usage = context.get_usage() if context else ""
    if as_json:
        _print_failure(problems)
        return code
    shown: Counter[str] = Counter()
    for problem in problems:
        shown[problem.code] += 1
        if shown[problem.code] <= SHOWN_PROBLEMS:
            rule = f" ({problem.rule})" if problem.rule else ""
            complain(problem.code, problem.message + rule, problem.where, problem.hint)
    for name, number in shown.items():
        if number > SHOWN_PROBLEMS:
            say(f"and {number - SHOWN_PROBLEMS} more {name} ({number} in all); --json lists them", error=True)
    if usage:
        emit(usage, error=True)
    return code


def complain(code: str, message: str, where: str = "", hint: str = "") -> None:
    """One problem on stderr, in up to three lines."""
    head = click.style(f"error[{code}]", fg="red", bold=True) if _colour_wanted() else f"error[{code}]"
    emit(f"{head}: {printable(message)}", error=True, colour=_colour_wanted())
    if where:
        say(f"  in: {where}", error=True)
    if hint:
        say(f"  help: {hint}", error=True)


def _colour_wanted() -> bool:
    """https://no-color.org and its opposite, for stderr; rich does the same for tables."""
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return False
    return bool(os.environ.get("FORCE_COLOR")) or sys.stderr.isatty()


def _print_failure(problems: Sequence[Problem]) -> None:
    document = {
        "schema": "loratool.error/1",
        "ok": False,
        "error": problems[0].to_json(),
        "problems": [problem.to_json() for problem in problems],
    }
    _print_document(document)


def report_interrupt(as_json: bool) -> int:
    problem = Problem("E-INTERRUPTED", "interrupted; nothing unfinished was left behind")
    if as_json:
        _print_failure([problem])
    else:
        say(problem.message, error=True)
    return 130


def report_bug(error: Exception, as_json: bool) -> int:
    what = f"a bug in loratool, sorry: {type(error).__name__}: {error}"
    problem = Problem("E-BUG", what, hint="LORATOOL_DEBUG=1 shows the traceback; please report it")
    if as_json:
        _print_failure([problem])
    else:
        complain(problem.code, problem.message, hint=problem.hint)
    return 101
