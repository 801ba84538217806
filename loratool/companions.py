"""What an output has beside its weights: the base's files, a config that fits the weights, the tokenizer they need.

A merged model is not the base: what is said of the base (its model card) is kept apart. All of it is decided here, with
what an unmerge needs to take it back.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from blake3 import blake3

from loratool import configs, requantise, tokenizers
from loratool.checkpoint import Checkpoint, read_json
from loratool.configs import Edit, Editor, Weights, as_text
from loratool.conventions.peft_folder import FILE_STEM
from loratool.errors import InvalidFile, Problem
from loratool.layout import NewTensor
from loratool.names import listed
from loratool.receipt import Receipt, Replaced
from loratool.tensors import reading
from loratool.tokenizers import Rows

CONFIG, CARD = "config.json", "README.md"
KEPT = 256 << 10  # bytes of a file that a receipt keeps


@dataclass(frozen=True)
class Companions:
    """The files of an output beside its weights, by names relative to it.

    `written` are those with a content of their own, `taken` those that are copied from a place of another name or
    folder; every other is the source's file of the same name. `edits` are those of configs, by their names, and
    `tokenizer` the folder or adapter that the tokenizer is of, "" for the source's. `replaced` is what a receipt says
    of files that are not the base's any more.
    """

    names: tuple[Path, ...] = ()
    written: Mapping[Path, bytes] = field(default_factory=dict)
    taken: Mapping[Path, Path] = field(default_factory=dict)
    edits: tuple[tuple[Path, Edit], ...] = ()
    tokenizer: str = ""
    replaced: Mapping[str, Replaced] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    problems: tuple[Problem, ...] = ()

    def origin(self, name: Path, source: Path) -> Path | None:
        """The file that a name is copied from; None if its content is here."""
        return None if name in self.written else self.taken.get(name, source / name)

    def to_json(self) -> dict[str, Any]:
        edits = [
            {"file": name.as_posix(), "key": edit.key, "from": as_text(edit.before), "to": as_text(edit.after)}
            for name, edit in self.edits
        ]
        names = [name.as_posix() for name in self.names]
        return {"companions": names, "config_edits": edits, "tokenizer_from": self.tokenizer or None}


def merged(
    base: Checkpoint,
    names: Sequence[Path],
    changes: Mapping[str, NewTensor],
    added: Sequence[NewTensor],
    adapters: Sequence[Path],
    told: Sequence[Mapping[str, Any]],
    *,
    dtype: str | None,
    dequantised: bool,
    tokenizer: str = "",
) -> Companions:
    """The companions of a merge's output; `names` are the base's own. Changes go by stored names.

    `adapters` are those that were given as files, `told` what each adapter says of its training (a PEFT config, or {}).

    `dtype` is that of all floats, or None; `dequantised` says that the weights are not quantised any more.
    """
    folders = [path if path.is_dir() else path.parent for path in adapters if path.is_dir() or path.stem == FILE_STEM]
    trained = [configs.trained_of(config, {}) for config in told]
    trained += [configs.trained_of({}, _said(folder / CONFIG)) for folder in folders]
    fresh = {new.name: new for new in added}
    bare = requantise.configs_without(base) if dequantised else {}
    found, written, rows = Companions(tuple(names)), dict[Path, bytes](), None
    edits: list[tuple[Path, Edit]] = []
    notes: list[str] = []
    problems: list[Problem] = []
    for prefix, part in [(f"{name}.", part) for name, part in base.components.items()] or [("", base)]:
        path = (part.path / CONFIG).relative_to(base.path) if part.path.is_dir() else None
        if path is None or path not in names:
            continue
        config = read_json(base.path / path)
        kept = json.loads(bare[path]) if path in bare else config
        gone = [Edit(key, value, None) for key, value in config.items() if key not in kept]
        editor = Editor(kept, _weights(part, prefix, changes, fresh, dtype), trained, gone)
        before = editor.vocabulary
        if editor.edit():
            written[path] = configs.dumped(editor.config)
        edits += [(path, edit) for edit in editor.edits]
        notes += [f"{path}: {edit}" for edit in editor.edits] + editor.notes
        problems += [replace(problem, where=problem.where or str(base.path)) for problem in editor.problems]
        if before is not None and editor.vocabulary is not None:
            rows = Rows(before, editor.vocabulary)
    found = replace(found, written=written, edits=tuple(edits))
    if base.path.is_dir() and not base.components:
        chosen = tokenizers.choose(base.path, _named(folders), tokenizer, rows)
        found = _with(found, chosen.files, chosen.gone)
        found = replace(found, tokenizer=chosen.origin)
        notes += chosen.notes
        problems += chosen.problems
    elif tokenizer:
        what = "the output has no tokenizer that could be chosen: it is one file, or a pipeline"
        problems.append(Problem("E-OPTION", what, str(base.path), "leave out --tokenizer-from"))
    if Path(CARD) in names:
        apart = _free(names)
        found = _with(found, {apart: base.path / CARD}, {Path(CARD)})
        notes.append(f"{CARD} is the base's: it is {apart} in the output")
    replaced = {} if problems else _replaced(found, names, base.path)
    return replace(found, replaced=replaced, notes=tuple(notes), problems=tuple(problems))


def unmerged(source: Path, names: Sequence[Path], known: Receipt, base: Path | None) -> Companions:
    """The companions of an unmerge's output: the base's again, as far as the base or the receipt has them.

    `source` is the merged folder, `names` its files, `base` the base's folder where it is given. A file that was
    changed since the merge stays as it is.
    """
    found, notes = Companions(tuple(names)), []
    back = {name: _back(name, old, source, base) for name, old in known.replaced.items()}
    lost = {name for name, content in back.items() if content is None and known.replaced[name].digest is not None}
    if tokens := sorted(name for name in lost if tokenizers.is_tokenizers(Path(name))):
        notes.append(
            f"the tokenizer stays the merge's, for the base's is not here ({listed(tokens)}): give --base BASE"
        )
        lost |= {name for name in back if tokenizers.is_tokenizers(Path(name))}
    for name in sorted(name for name in lost if not tokenizers.is_tokenizers(Path(name))):
        notes.append(f"{name} stays the merge's, for the base's is not here: give --base BASE")
    for name, old in known.replaced.items():
        if name in lost:
            continue
        now = Path(old.now) if old.now else None
        if now is not None and (now not in names or _digest(_content(source / now)) != old.merged):
            notes.append(f"{now} is not what the merge wrote: it stays as it is")
            continue
        gone = {now} if now is not None else set[Path]()
        content = back[name]
        if isinstance(content, Path):
            found = _with(found, {Path(name): content}, gone)
        else:
            found = _with(found, {}, gone)
        if isinstance(content, bytes):
            written = {**found.written, Path(name): content}
            found = replace(found, names=tuple(sorted({*found.names, Path(name)})), written=written)
    return replace(found, notes=tuple(notes))


def _back(name: str, old: Replaced, source: Path, base: Path | None) -> Path | bytes | None:
    """The base's file: a place to copy it from, or its content; None if it is nowhere, or the base had none."""
    if old.digest is None:
        return None
    if base is not None and (base / name).is_file() and _digest(_content(base / name)) == old.digest:
        return base / name
    if old.text is not None:
        return old.text.encode("utf-8")
    return source / old.now if old.now and old.merged == old.digest else None


def _named(folders: Sequence[Path]) -> dict[str, Path]:
    """Folders by a name for people: the last part of their path, if that is theirs alone."""
    names = [folder.name for folder in folders]
    return {folder.name if names.count(folder.name) == 1 else str(folder): folder for folder in folders}


def _said(path: Path) -> dict[str, Any]:
    """What a JSON file says; nothing if it is not there, or can not be read: readers refuse those that they need."""
    try:
        return read_json(path) if path.is_file() else {}
    except InvalidFile:
        return {}


def _weights(
    part: Checkpoint, prefix: str, changes: Mapping[str, NewTensor], added: Mapping[str, NewTensor], dtype: str | None
) -> Weights:
    """What becomes of the tensors of one component, by its own clean names."""
    stored = {prefix + ref.name: name for name, ref in part.tensors.items()}
    own = {name: new for name, new in changes.items() if name.startswith(prefix)}
    changed = {stored.get(name, name.removeprefix(prefix)): new for name, new in own.items()}
    fresh = {name.removeprefix(prefix): new for name, new in added.items() if name.startswith(prefix)}
    return Weights(part.tensors, changed, fresh, dtype)


def _with(found: Companions, taken: Mapping[Path, Path], gone: Iterable[Path]) -> Companions:
    """With some files taken from elsewhere, and without others."""
    names = sorted({*found.names, *taken} - ({*gone} - taken.keys()))
    return replace(found, names=tuple(names), taken={**found.taken, **taken})


def _free(names: Sequence[Path]) -> Path:
    """A name for the base's card that no other file has."""
    apart, number = Path("README.base.md"), 1
    while apart in names:
        number += 1
        apart = Path(f"README.base.{number}.md")
    return apart


def _replaced(found: Companions, names: Sequence[Path], base: Path) -> dict[str, Replaced]:
    """Every file of the base that is another one now, and every new one."""
    entries = {}
    card = next((name for name, origin in found.taken.items() if origin == base / CARD), None)
    for name in {*names, *found.names}:
        own = name in names
        now = card if name == Path(CARD) else name if name in found.names else None
        if own and now == name and name not in found.taken and name not in found.written:
            continue
        if not own and name == card:
            continue
        old = _content(base / name) if own else None
        new = None if now is None else found.written.get(now) or _content(found.taken.get(now, base / now))
        if old == new and name == now:
            continue
        text = None if old is None or old == new else _text(old)
        merged = None if new is None else _digest(new)
        entries[name.as_posix()] = Replaced(
            None if old is None else _digest(old), None if now is None else now.as_posix(), merged, text
        )
    return entries


def _content(path: Path) -> bytes:
    with reading(path):
        return path.read_bytes()


def _text(content: bytes) -> str | None:
    """What a receipt can keep of a file."""
    if len(content) > KEPT:
        return None
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        return None


def _digest(content: bytes) -> str:
    return f"blake3:{blake3(content).hexdigest()}"
