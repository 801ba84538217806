"""The table of conventions in the README, from the code: ``python tests/convention_table.py`` prints it."""

from __future__ import annotations

from loratool.conventions import CONVENTIONS, writers


def table() -> str:
    rows = ["| convention | what it is | read | write | kinds | compared with |", "|---|---|---|---|---|---|"]
    for convention in CONVENTIONS:
        write = "yes" if convention.NAME in writers() else "-"
        kinds = ", ".join(convention.KINDS)
        rows.append(f"| `{convention.NAME}` | {convention.TITLE} | yes | {write} | {kinds} | {convention.TESTED} |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    print(table(), end="")  # noqa: T201
