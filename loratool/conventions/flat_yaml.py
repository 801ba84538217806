"""Single values at the top of a YAML file, for trainers that write their numbers down so.

Only lines ``key: value`` in the first column are looked at, and of those only the keys that are asked for: plain
numbers, true and false. What is nested below other keys can be any YAML.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from loratool.errors import InvalidFile, Problem

MAX_BYTES = 1_000_000
_KEY = re.compile(r"\w{1,100}")
_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")


@dataclass(frozen=True)
class FlatYaml:
    """The top-level lines of a file, by key; an empty text for a key whose value is nested below it."""

    path: Path
    lines: Mapping[str, str]

    def has(self, key: str) -> bool:
        return key in self.lines

    def whole(self, key: str) -> int:
        """A positive whole number."""
        text = self._text(key)
        if not re.fullmatch(r"0*[1-9]\d{0,8}", text):
            raise self._wrong(key, "a positive whole number")
        return int(text)

    def number(self, key: str) -> float:
        text = self._text(key)
        if not _NUMBER.fullmatch(text) or not math.isfinite(float(text)):
            raise self._wrong(key, "a number")
        return float(text)

    def flag(self, key: str) -> bool:
        if self._text(key) not in ("true", "false"):
            raise self._wrong(key, "true or false")
        return self._text(key) == "true"

    def _text(self, key: str) -> str:
        if key not in self.lines:
            raise InvalidFile(Problem("E-CONFIG", f"there is no {key} in it", str(self.path)))
        return self.lines[key]

    def _wrong(self, key: str, wanted: str) -> InvalidFile:
        return InvalidFile(Problem("E-CONFIG", f"{key} is {self.lines[key]!r:.80}, not {wanted}", str(self.path)))


def read_flat_yaml(path: Path) -> FlatYaml | None:
    """The file's top level, None if there is no such file. Raises InvalidFile if it is no text, or has a key twice."""
    if not path.is_file():
        return None
    try:
        if path.stat().st_size > MAX_BYTES:
            raise InvalidFile(Problem("E-LIMIT", f"more than {MAX_BYTES:,} bytes", str(path)))
        text = path.read_text(encoding="utf-8").removeprefix("\ufeff")
    except OSError as error:
        raise InvalidFile(Problem("E-READ", f"can not be read: {error.strerror or error}", str(path))) from error
    except UnicodeDecodeError as error:
        raise InvalidFile(Problem("E-CONFIG", f"not UTF-8: {error}", str(path))) from None
    lines: dict[str, str] = {}
    for line in text.splitlines():
        key, colon, value = line.partition(":")
        key = key.rstrip().strip("'\"")
        if not colon or not _KEY.fullmatch(key) or value[:1].strip():
            continue
        if key in lines:
            raise InvalidFile(Problem("E-CONFIG", f"{key} is in it twice", str(path)))
        lines[key] = value.partition(" #")[0].strip()
    return FlatYaml(path, lines)
