"""Every option and command that a message names exists where the message is shown."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

import loratool
from loratool.cli import COMMANDS, cli

PACKAGE = Path(loratool.__file__).parent
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]*")
QUOTED = re.compile(r"`loratool ([a-zA-Z]+)([^`]*)`")
VERB = re.compile(rf"\b({'|'.join(COMMANDS)})\b")
READING = {"merge", "verify", "unmerge", "inspect", "extract", "convert"}

WRITING = {"merge", "unmerge", "extract", "convert", "pin"}

# Which commands show the messages of a room; those of any other are shown by all that read adapters.
SHOWN_BY = {
    "plan": {"merge"},
    "changes": {"merge", "verify"},
    "requantise": {"merge"},
    "companions": {"merge"},
    "tokenizers": {"merge"},
    "merge": {"merge"},
    "tasks": {"merge", "unmerge"},
    "resume": {"merge"},
    "dispatch": {"merge"},
    "remote": {"merge"},
    "cluster": {"merge"},
    "survival": {"merge", "verify"},
    "undo": {"unmerge"},
    "unmerging": {"unmerge"},
    "convert": {"convert"},
    "folding": {"convert"},
    "extract": {"extract"},
    "verify": {"verify"},
    "comparing": {"verify"},
    "diagnosis": {"verify"},
    "receipt": {"merge", "unmerge", "status", "inspect", "verify"},
    "status": {"status"},
    "outputs": WRITING,
    "staging": WRITING,
    "repacked": {"merge", "unmerge"},
    "live": set(),  # a library's
}
FOREIGN = {"--outtype", "--scheduler-file", "--dequantize", "--backend", "--local", "--target"}  # llama.cpp, Dask, verl


def options_of(command: str) -> set[str]:
    """Its options, and its arguments as if they were some: a base that is an argument is given."""
    found = cli.get_command(click.Context(cli), command)
    assert found is not None
    return {name for param in found.params for name in (*param.opts, f"--{(param.name or '').replace('_', '-')}")}


OPTIONS = {command: options_of(command) for command in COMMANDS}


def texts(path: Path) -> Iterator[tuple[int, str]]:
    """Every string of a module that is no docstring, f-strings whole."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    inside = {id(child) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for child in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = [str(v.value) if isinstance(v, ast.Constant) else "{}" for v in node.values]
            yield node.lineno, "".join(parts)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inside | docstrings:
            yield node.lineno, node.value


def rooms() -> list[Path]:
    return [path for path in sorted(PACKAGE.rglob("*.py")) if "cli" not in path.relative_to(PACKAGE).parts]


def shown_by(path: Path) -> set[str]:
    relative = path.relative_to(PACKAGE)
    if relative.name.endswith(
        (
            "_write.py",
            "writing.py",
            "_write_products.py",
            "_places.py",
            "flat_keys.py",
            "base_names.py",
            "peft_about.py",
        )
    ):
        return {"convert"}
    return SHOWN_BY.get(relative.parts[0].removesuffix(".py"), READING)


@pytest.mark.parametrize("path", rooms(), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_what_a_message_names_exists_where_it_is_shown(path: Path) -> None:
    wrong = []
    for line, text in texts(path):
        for command, rest in QUOTED.findall(text):
            if (command != "COMMAND" and command not in COMMANDS) or not set(OPTION.findall(rest)) <= OPTIONS.get(
                command, set()
            ) | {"--help"}:
                wrong.append((line, f"loratool {command}{rest}"))
        bare = QUOTED.sub("", text)
        named = set(VERB.findall(bare)) | set(VERB.findall(text) if "`loratool" in text else [])
        for option in set(OPTION.findall(bare)) - FOREIGN - {bare}:  # code that looks for an option names nobody
            some = path.name == "explanations.py"  # whose texts hold for whatever command raises the code
            there = [option in OPTIONS[command] for command in (COMMANDS if some else shown_by(path))]
            if not (any(there) if some else there and all(there)) and not any(option in OPTIONS[c] for c in named):
                wrong.append((line, f"{option} in {text!r}"))
    assert not wrong, wrong


@pytest.mark.parametrize("path", rooms(), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_no_message_sends_a_user_of_the_command_line_to_a_library_call(path: Path) -> None:
    if path.relative_to(PACKAGE).parts[0] == "live":
        return  # there is no command for it
    calls = re.compile(rf"loratool\.({'|'.join(loratool.__all__)})\b")
    assert not [(line, text) for line, text in texts(path) if calls.search(text)]


def test_the_walk_sees_what_is_wrong(tmp_path: Path) -> None:
    module = tmp_path / "module.py"
    module.write_text('"""--not this."""\nx = f"give --base {1}"\ny = "`loratool merg x --alpha`"\n')
    assert [text for _, text in texts(module)] == ["give --base {}", "`loratool merg x --alpha`"]
