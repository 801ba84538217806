"""The page of error codes, printed from `loratool.explanations`: `python tests/error_page.py > docs/errors.md`."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from loratool.explanations import EXPLANATIONS


def page() -> Iterator[str]:
    yield "# Error codes"
    yield ""
    yield "Every error has a stable code, says what is wrong and where, and names what helps. `loratool explain CODE`"
    yield "shows the same as this page, which `python tests/error_page.py` prints. The rules that some stand for"
    yield "are in the [specification](../spec/FORMAT.md)."
    for entry in EXPLANATIONS.values():
        yield ""
        yield f"## {entry.code}"
        yield ""
        yield f"{entry.meaning} **What helps:** {entry.cure}"


if __name__ == "__main__":
    sys.stdout.write("\n".join(page()) + "\n")
