"""The files of a tokenizer and its chat template: whether two folders have the same, and which one an output needs.

Two tokenizers are the same to a model if they have the same tokens under the same numbers, the same chat template, and
the same tokens for beginning, end, padding and unknown; the rest is how a library saved them.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from loratool.checkpoint import read_json
from loratool.errors import InvalidFile, Problem
from loratool.names import listed

VOCABULARIES = (
    "tokenizer.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.json", "vocab.txt",
    "tekken.json", "*.tiktoken",
)  # fmt: skip
TEMPLATES = ("chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja")
OTHERS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt")
ROLES = ("bos_token", "eos_token", "pad_token", "unk_token")


def is_tokenizers(name: Path) -> bool:
    """Whether a file, relative to its folder, belongs to a tokenizer."""
    return _is_one_of(name, (*VOCABULARIES, *TEMPLATES, *OTHERS))


@dataclass(frozen=True)
class Tokenizer:
    """The tokenizer files of one folder, by names relative to it."""

    folder: Path
    files: tuple[Path, ...]

    @classmethod
    def of(cls, folder: Path) -> Tokenizer:
        found = [*folder.iterdir(), *folder.glob("additional_chat_templates/*.jinja")] if folder.is_dir() else []
        names = (path.relative_to(folder) for path in found if path.is_file())
        return cls(folder, tuple(sorted(name for name in names if is_tokenizers(name))))

    def __bool__(self) -> bool:
        return bool(self.files)

    @property
    def whole(self) -> bool:
        """Whether it can stand alone: its vocabulary is there."""
        return any(_is_one_of(name, VOCABULARIES) for name in self.files)

    def differs(self, other: Tokenizer) -> str:
        """What a model would see of it that is not as in `other`; "" if nothing. What is absent here is as there."""
        if all(self._has_bytes_of(other, name) for name in self.files):
            return ""
        if self._tokens_differ(other):
            return "tokens"
        if self.template is not None and self.template != other.template:
            return "chat template"
        roles = [role for role, token in self.roles.items() if token != other.roles.get(role)]
        return roles[0] if roles else ""

    @cached_property
    def added(self) -> dict[str, int]:
        """Tokens that were added to the vocabulary, with their numbers."""
        found: dict[str, int] = {}
        for entry in _list(self._json("tokenizer.json").get("added_tokens")):
            if isinstance(entry, dict) and type(entry.get("id")) is int:
                found[str(entry.get("content"))] = entry["id"]
        for token, number in self._json("added_tokens.json").items():
            if type(number) is int:
                found[token] = number
        decoder = self._json("tokenizer_config.json").get("added_tokens_decoder")
        for number, entry in decoder.items() if isinstance(decoder, dict) else ():
            if isinstance(entry, dict) and str(number).isdigit():
                found[str(entry.get("content"))] = int(number)
        return found

    @cached_property
    def vocabulary(self) -> dict[str, int] | None:
        """All tokens with their numbers; None where only a library could tell them."""
        model = self._json("tokenizer.json").get("model")
        vocab = model.get("vocab") if isinstance(model, dict) else None
        if isinstance(vocab, list):  # Unigram: tokens with their scores, in order
            vocab = {str(entry[0]): number for number, entry in enumerate(vocab) if _list(entry)}
        elif vocab is None and self._has("vocab.json"):
            vocab = self._json("vocab.json")
        elif vocab is None and self._has("vocab.txt"):
            lines = (self.folder / "vocab.txt").read_text(encoding="utf-8", errors="replace").splitlines()
            vocab = {token: number for number, token in enumerate(lines)}
        if not isinstance(vocab, dict):
            return None
        return {**{token: number for token, number in vocab.items() if type(number) is int}, **self.added}

    @property
    def last(self) -> tuple[str, int] | None:
        """The token with the largest number, as far as files show it."""
        known = self.vocabulary or self.added
        return max(known.items(), key=lambda entry: entry[1], default=None)

    @cached_property
    def template(self) -> object:
        """The chat template, or several by name; None if there is none."""
        if self._has("chat_template.jinja"):
            return (self.folder / "chat_template.jinja").read_text(encoding="utf-8", errors="replace")
        return self._json("chat_template.json").get("chat_template") or self._json("tokenizer_config.json").get(
            "chat_template"
        )

    @cached_property
    def roles(self) -> dict[str, str]:
        found = {}
        for document in (self._json("special_tokens_map.json"), self._json("tokenizer_config.json")):
            for role in ROLES:
                value = document.get(role)
                value = value.get("content") if isinstance(value, dict) else value
                if isinstance(value, str):
                    found[role] = value
        return found

    def _tokens_differ(self, other: Tokenizer) -> bool:
        mine, theirs = self.vocabulary, other.vocabulary
        if mine is not None and theirs is not None:
            return mine != theirs
        known = theirs if theirs is not None else other.added
        return any(known.get(token) != number for token, number in self.added.items())

    def _has(self, name: str) -> bool:
        return Path(name) in self.files

    def _json(self, name: str) -> dict[str, Any]:
        return self._documents.get(name, {})

    @cached_property
    def _documents(self) -> dict[str, dict[str, Any]]:
        """The JSON files; one that is no object says nothing."""
        found = {}
        for name in self.files:
            if name.suffix == ".json":
                try:
                    found[name.as_posix()] = read_json(self.folder / name)
                except InvalidFile:
                    continue
        return found

    def _has_bytes_of(self, other: Tokenizer, name: Path) -> bool:
        one, two = self.folder / name, other.folder / name
        if name not in other.files or one.stat().st_size != two.stat().st_size:
            return False
        return one.read_bytes() == two.read_bytes()


@dataclass(frozen=True)
class Chosen:
    """The tokenizer of an output: `files` are taken from elsewhere, by name; `gone` are the base's that do not stay."""

    origin: str = ""  # what it is called; "" for the base's
    files: Mapping[Path, Path] = field(default_factory=dict)
    gone: frozenset[Path] = frozenset()
    notes: tuple[str, ...] = ()
    problems: tuple[Problem, ...] = ()


class Rows(NamedTuple):
    """The vocabulary of a base and of the weights that are merged from it: rows of their embeddings."""

    before: int
    after: int


def choose(base: Path, adapters: Mapping[str, Path], wanted: str, rows: Rows | None) -> Chosen:
    """Which tokenizer an output gets: the base's, or that of an adapter's folder, by the adapter's name.

    `wanted` is "base", "adapter", a folder, or "" for what the weights need: the adapter's, where that has other
    tokens, another chat template or other special tokens than the base's. `rows` are None where they are not known.
    """
    own = Tokenizer.of(base)
    brought = {name: found for name, folder in adapters.items() if (found := Tokenizer.of(folder))}
    if wanted == "base":
        return _checked(own, "", rows, ())
    if wanted and wanted != "adapter":
        given = Tokenizer.of(Path(wanted))
        if not given:
            what = f"there is no tokenizer in {wanted}"
            return Chosen(problems=(Problem("E-TOKENIZER", what, wanted, "--tokenizer-from base takes the base's"),))
        return _taken(own, given, wanted, rows, "asked for")
    if wanted and not brought:
        what = "no adapter brings a tokenizer"
        return Chosen(problems=(Problem("E-TOKENIZER", what, hint="leave out --tokenizer-from, or give a folder"),))
    for (name, one), (other, two) in _pairs(brought):
        if why := (one.differs(two) or two.differs(one)):
            what = f"the tokenizers of {name} and {other} are not the same: {why}"
            hint = f"--tokenizer-from base, or one of the folders: --tokenizer-from {one.folder}"
            return Chosen(problems=(Problem("E-TOKENIZER", what, hint=hint),))
    if not brought:
        return _checked(own, "", rows, ())
    name, first = next(iter(brought.items()))
    why = "asked for" if wanted else f"its {reason} differ" if (reason := first.differs(own)) else ""
    if not why:
        return _checked(own, "", rows, ())
    return _taken(own, first, name, rows, why)


def _taken(own: Tokenizer, given: Tokenizer, origin: str, rows: Rows | None, why: str) -> Chosen:
    files = {name: given.folder / name for name in given.files}
    gone = frozenset(own.files) - files.keys() if given.whole else frozenset[Path]()
    note = f"tokenizer and chat template are those of {origin} ({why}): {listed(map(str, given.files))}"
    if gone:
        note += f"; without the base's {listed(sorted(map(str, gone)))}"
    done = _checked(given if given.whole else own, origin, rows, (note,))
    return Chosen(origin, files, gone, done.notes, done.problems)


def _checked(used: Tokenizer, origin: str, rows: Rows | None, notes: Sequence[str]) -> Chosen:
    """A tokenizer against the number of rows that the merged embedding has."""
    if rows is None or (not origin and rows.after <= rows.before) or (last := used.last) is None:
        return Chosen(origin, notes=tuple(notes))
    if origin and last[1] >= rows.after:
        what = f"the tokenizer has a token {last[0]!r} with number {last[1]}, the merged vocabulary {rows.after} rows"
        hint = "--tokenizer-from base, if the tokens were not trained; otherwise the adapter lacks its embeddings"
        return Chosen(origin, problems=(Problem("E-TOKENIZER", what, origin, hint),))
    if last[1] < rows.before < rows.after:
        what = f"the vocabulary grew from {rows.before} to {rows.after} rows, and no token of the tokenizer is in them"
        notes = (*notes, f"{what}: --tokenizer-from FOLDER takes the one that was trained with")
    return Chosen(origin, notes=tuple(notes))


def _pairs(brought: Mapping[str, Tokenizer]) -> Iterator[tuple[tuple[str, Tokenizer], tuple[str, Tokenizer]]]:
    """The first with each of the others: sameness is transitive."""
    (first, *others) = [*brought.items()] or [("", Tokenizer(Path(), ()))]
    yield from ((first, other) for other in others)


def _is_one_of(name: Path, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name.as_posix(), pattern) for pattern in patterns)


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []
