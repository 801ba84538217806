"""The public face: what is exported, documented, and typed."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
from convention_table import table

import loratool

ROOT = Path(__file__).parent.parent
PUBLIC = {name: getattr(loratool, name) for name in loratool.__all__ if name != "__version__"}


def test_all_is_what_there_is() -> None:
    """Every name that the package defines or re-exports, but for its own modules."""
    found = {
        name for name, value in vars(loratool).items() if name[0] != "_" and not isinstance(value, types.ModuleType)
    }
    assert sorted(loratool.__all__) == loratool.__all__
    assert found | {"__version__"} == {*loratool.__all__}


def test_the_version_is_one() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", loratool.__version__)
    assert (ROOT / "loratool" / "version.py").read_text().count(loratool.__version__) == 1


@pytest.mark.parametrize("name", PUBLIC)
def test_everything_public_is_documented(name: str) -> None:
    value = PUBLIC[name]
    documented = inspect.cleandoc(value.__doc__ or "")
    assert documented, name
    assert not documented.startswith(f"{name}("), f"{name} only has what dataclass and NamedTuple make up"


@pytest.mark.parametrize("name", [name for name, value in PUBLIC.items() if inspect.isfunction(value)])
def test_options_are_keywords(name: str) -> None:
    """What is not an input or the output can not be given by position, so that it may grow."""
    parameters = inspect.signature(PUBLIC[name]).parameters.values()
    for parameter in parameters:
        optional = parameter.default is not parameter.empty
        assert optional == (parameter.kind is parameter.KEYWORD_ONLY), parameter


@pytest.mark.parametrize("name", [name for name, value in PUBLIC.items() if inspect.isclass(value)])
def test_errors_are_of_one_family(name: str) -> None:
    value = PUBLIC[name]
    if issubclass(value, Exception):
        assert issubclass(value, loratool.LoratoolError)
        assert value(loratool.Problem("E-X", "message", "where", "hint")).exit_code in (1, 2)


def test_an_error_says_what_where_and_what_next() -> None:
    first = loratool.Problem("E-ONE", "it is wrong", "a/file", "make it right", "R-001")
    error = loratool.Mismatch([first, loratool.Problem("E-TWO", "that too")])
    assert str(error) == "E-ONE: it is wrong (R-001)\n  in a/file\n  help: make it right\nE-TWO: that too"
    assert (error.code, error.message, error.where, error.hint) == ("E-ONE", "it is wrong", "a/file", "make it right")
    assert len(error.problems) == 2


def test_a_typed_client_is_checked(tmp_path: Path) -> None:
    """With the package's own types; torch's are left out, they take a minute."""
    config = tmp_path / "mypy.ini"
    config.write_text(
        "[mypy]\nstrict = true\n[mypy-torch.*]\nfollow_imports = skip\n[mypy-loratool.*]\nfollow_imports = silent\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "mypy", f"--config-file={config}", f"--cache-dir={tmp_path / 'cache'}",
         str(ROOT / "tests" / "typing_client.py")],
        capture_output=True, text=True, check=False, cwd=tmp_path, env={**os.environ, "MYPYPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_package_is_marked_as_typed() -> None:
    assert (ROOT / "loratool" / "py.typed").exists()


def test_the_table_of_conventions_in_the_readme_is_the_code_s() -> None:
    assert table() in (ROOT / "README.md").read_text(encoding="utf-8")
