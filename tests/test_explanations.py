"""Every error code is explained, on the command line and on one page, and none is that does not exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from conftest import Cli
from error_page import page

import loratool
from loratool.explanations import EXPLANATIONS

ROOT = Path(__file__).parent.parent
CODE = re.compile(r'"(E-[A-Z][A-Z-]*[A-Z])"')


def codes_in_the_source() -> set[str]:
    files = [path for path in (ROOT / "loratool").rglob("*.py") if path.name != "explanations.py"]
    return {code for path in files for code in CODE.findall(path.read_text(encoding="utf-8"))}


def test_every_code_is_explained_and_no_other() -> None:
    assert codes_in_the_source() == set(EXPLANATIONS)


def test_every_code_of_the_specification_is_explained() -> None:
    assert set(re.findall(r"E-[A-Z][A-Z-]*[A-Z]", (ROOT / "spec" / "FORMAT.md").read_text())) <= set(EXPLANATIONS)


def test_the_page_is_what_the_source_says() -> None:
    assert (ROOT / "docs" / "errors.md").read_text(encoding="utf-8") == "\n".join(page()) + "\n", (
        "run: python tests/error_page.py > docs/errors.md"
    )


@pytest.mark.parametrize("spelling", ["E-ALPHA", "e-alpha", "alpha", "error[E-ALPHA]"])
def test_a_code_is_explained_however_it_is_spelt(cli: Cli, spelling: str) -> None:
    result = cli("explain", spelling)
    assert result.code == 0
    assert result.out.startswith("E-ALPHA: ")
    assert "--scaling" in result.out


def test_all_codes_are_listed(cli: Cli) -> None:
    text = cli("explain").out
    assert all(code in text for code in EXPLANATIONS)
    assert {entry["code"] for entry in cli("explain", "--json").json["codes"]} == set(EXPLANATIONS)


def test_an_unknown_code_has_near_ones(cli: Cli) -> None:
    result = cli("explain", "E-ALPHAS")
    assert result.code == 2
    assert "E-ALPHA" in result.err
    with pytest.raises(loratool.ChoiceNeeded, match="no error code"):
        loratool.explain("nonsense-entirely")
