"""What of an interrupted merge can be kept: finished files, named in a journal and verified before they are trusted."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3

from loratool import staging
from loratool.errors import InvalidFile
from loratool.layout import Copy, OutputFile, raw
from loratool.plan import Plan
from loratool.survival import Survival
from loratool.tensors import TensorRef
from loratool.undoing import Written
from loratool.version import TOOL

FILE_NAME = "journal"  # in the scratch folder, beside the output


@dataclass(frozen=True)
class Kept:
    """A finished file of an interrupted run, and what is known of its computed tensors."""

    path: Path
    written: Mapping[str, Written]


def fingerprint(plan: Plan) -> str:
    """What must be equal for two runs to write the same bytes: adapters, weights, inputs, layout, version."""
    document = {
        key: value for key, value in plan.to_json().items() if key not in ("memory_bound", "threads", "device", "notes")
    }
    inputs = [[str(state.path), state.size, state.mtime] for state in plan.inputs]
    return blake3(json.dumps([TOOL, document, inputs], sort_keys=True).encode()).hexdigest()


class Journal:
    """Names each file of an output, with what is known of its computed tensors, when its last task is done."""

    def __init__(self, path: Path, plan: Plan) -> None:
        self.path = path
        self.lock = threading.Lock()
        self.left = {file.name: len(file.tasks) for file in plan.files}
        self.found: dict[str, dict[str, Written]] = {file.name: {} for file in plan.files}
        self.first_line = json.dumps({"plan": fingerprint(plan)}) + "\n"
        path.write_text(self.first_line, encoding="utf-8")

    def task_done(self, file: str, written: Mapping[str, Written]) -> None:
        """Called by the worker that did it, so that a kill loses no finished file."""
        with self.lock:
            self.left[file] -= 1
            self.found[file].update(written)
            if not self.left[file]:
                self._add(file)

    def file_done(self, file: str, written: Mapping[str, Written]) -> None:
        """All of a file at once: it was kept, or others have written it."""
        with self.lock:
            self.found[file].update(written)
            self._add(file)

    def _add(self, file: str) -> None:
        """Add a line. One that a kill cuts short is not read again."""
        line = json.dumps({"file": file, "tensors": {name: list(found) for name, found in self.found[file].items()}})
        with self.path.open("a", encoding="utf-8") as journal:
            journal.write(line + "\n")


@contextmanager
def kept_files(plan: Plan) -> Iterator[dict[str, Kept]]:
    """The verified files of interrupted runs of this very plan, by name; what is left of those runs goes at the end."""
    with ExitStack() as stack:
        found: dict[str, Kept] = {}
        for scratch in stack.enter_context(staging.abandoned(plan.out)):
            for file in plan.files:
                entry = _entries(scratch / FILE_NAME, fingerprint(plan)).get(file.name)
                path = (scratch if plan.single else scratch / plan.out.name) / file.name
                if entry is not None and path.is_file() and _is_right(path, file, entry):
                    found[file.name] = Kept(path, entry)
        yield found


def _entries(journal: Path, wanted: str) -> dict[str, dict[str, Written]]:
    """The finished files of a journal; none if it is of another plan."""
    try:
        first, *lines = journal.read_text(encoding="utf-8").splitlines(keepends=True)
        if json.loads(first) != {"plan": wanted}:
            return {}
        whole = [json.loads(line) for line in lines if line.endswith("\n")]
        return {
            line["file"]: {
                name: Written(before, after, float(bound), Survival(*survival), bool(changed))
                for name, (before, after, bound, survival, changed) in line["tensors"].items()
            }
            for line in whole
        }
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _is_right(path: Path, file: OutputFile, written: Mapping[str, Written]) -> bool:
    """Whether a file is what the plan would write; one that can not be read is not."""
    try:
        return _is_equal(path, file, written)
    except InvalidFile as error:
        if error.where == str(path):
            return False
        raise


def _is_equal(path: Path, file: OutputFile, written: Mapping[str, Written]) -> bool:
    """Whether a file is, byte for byte, what the plan would write: header, copies, and the digests of the rest, which
    must have been computed from the very tensors that are there now."""
    if path.stat().st_size != file.size or not _equal(raw(path, 0, len(file.header)), iter([memoryview(file.header)])):
        return False
    for task in file.tasks:
        if isinstance(task, Copy):
            if not _equal(raw(path, task.offset, task.nbytes), task.source.chunks()):
                return False
        else:
            known, original = written.get(task.tensor.name), task.tensor.original
            if known is None or known.before != (original.digest() if original else None):
                return False
            if raw(path, task.offset, task.nbytes).digest() != known.after:
                return False
    return True


def _equal(mine: TensorRef, theirs: Iterator[memoryview]) -> bool:
    """Whether two streams of bytes, cut alike or not, are the same."""
    left, right = blake3(), blake3()
    for chunk in mine.chunks():
        left.update(chunk)
    for chunk in theirs:
        right.update(chunk)
    return left.digest() == right.digest()
