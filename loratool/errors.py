"""Every error a user can meet.

LoratoolError             base of all; carries one or more Problems
├── InvalidFile           the bytes are not what their format says they are
├── Unsupported           well-formed, but loratool can not do the right thing with it
├── ChoiceNeeded          the files leave something open (alpha, convention, adapter name): an option decides
├── Mismatch              adapter, base and merged checkpoint do not belong together
│   └── NoSuchTensor      a name that is not there; a KeyError too, for those who treat a checkpoint as a mapping
├── OutputRefused         the output can not be written, or is there already
├── Closed                used after it was closed; a ValueError too, as of any file
└── AnswerIsNo            the question was understood and the answer is no (exit code 1)

A `Problem` is one fact: what is wrong, where, why it matters, and what helps. One error may carry many: a plan
reports all it found at once.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong.

    `code` is stable (``E-...``) and listed in ``spec/FORMAT.md`` or the README; `rule` is the spec's MUST id, where
    one is broken.
    """

    code: str
    message: str
    where: str = ""
    hint: str = ""
    rule: str = ""

    def to_json(self) -> dict[str, str]:
        return asdict(self)

    def __str__(self) -> str:
        rule = f" ({self.rule})" if self.rule else ""
        where = f"\n  in {self.where}" if self.where else ""
        hint = f"\n  help: {self.hint}" if self.hint else ""
        return f"{self.code}: {self.message}{rule}{where}{hint}"


class LoratoolError(Exception):
    """Base of every error raised for a user's input. `code`, `message`, `where`, `hint` are the first problem's."""

    exit_code = 2

    def __init__(self, problems: Problem | Iterable[Problem]) -> None:
        self.problems = (problems,) if isinstance(problems, Problem) else tuple(problems)
        super().__init__("\n".join(map(str, self.problems)))

    @property
    def code(self) -> str:
        return self.problems[0].code

    @property
    def message(self) -> str:
        return self.problems[0].message

    @property
    def where(self) -> str:
        return self.problems[0].where

    @property
    def hint(self) -> str:
        return self.problems[0].hint


class InvalidFile(LoratoolError):
    """A file breaks its own format: truncated, contradictory, duplicated, dangerous."""


class Unsupported(LoratoolError):
    """The input is understood and refused, because a merge of it would be wrong."""


class ChoiceNeeded(LoratoolError):
    """The files do not say, and loratool does not guess."""


class Mismatch(LoratoolError):
    """Adapter, base and merged checkpoint do not fit each other."""


class NoSuchTensor(Mismatch, KeyError):
    """There is no tensor of this name."""

    __str__ = Exception.__str__  # a KeyError shows its message in quotes


class Closed(LoratoolError, ValueError):
    """It was closed, and is used."""


class OutputRefused(LoratoolError):
    """The output exists already, or can not be written."""


class AnswerIsNo(LoratoolError):
    """What was asked for is not possible with what was given, e.g. an exact unmerge without the base."""

    exit_code = 1
