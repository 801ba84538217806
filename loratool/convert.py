"""An adapter from one convention to another: what the target can not hold is found before a byte is written."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from loratool import conventions, folding, maps, outputs
from loratool.adapter import Adapter, Targeted
from loratool.binding import Binding, Part, led
from loratool.bundle import Bundle
from loratool.checkpoint import Checkpoint, open_checkpoint
from loratool.conventions import Writer, base_names, checked, luggage, of_base
from loratool.conventions.choices import Choices
from loratool.conventions.load import load, load_source
from loratool.conventions.writing import Misfit, Options
from loratool.errors import ChoiceNeeded, LoratoolError, Mismatch, OutputRefused, Problem, Unsupported
from loratool.format import unknown_alpha
from loratool.names import listed
from loratool.pinning import pinned
from loratool.quantised import logical
from loratool.staging import refuse_small_disk, staged
from loratool.tensors import FileState, files_of
from loratool.updates import Replace
from loratool.version import TOOL

_FLAGS = {
    "uniform": "--uniform",
    "component": "--as",
    "task_type": "--task-type",
    "base_name": "--base-name",
    "revision": "--revision",
}


@dataclass(frozen=True)
class Conversion:
    """What a conversion will write, with everything decided: nothing that a header can tell goes wrong afterwards.

    `adapter` is what the target holds, `baked` names the tensors whose updates became whole tensors in it.
    """

    adapter: Adapter
    convention: str  # of the source
    writer: Writer
    bundle: Bundle
    out: Path
    baked: tuple[str, ...]
    notes: tuple[str, ...]
    inputs: tuple[FileState, ...]
    view: maps.View | None  # of the base, where one is given
    force: bool  # replace what is there


@dataclass(frozen=True)
class ConvertReport:
    """What a conversion wrote: the adapter as the target holds it, from which convention to which, and where."""

    adapter: Adapter
    convention: str
    to: str
    out: Path
    files: tuple[Path, ...]
    baked: tuple[str, ...]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "convention": self.convention,
            "to": self.to,
            "out": str(self.out),
            "files": [str(file) for file in self.files],
            "updates": len(self.adapter.updates),
            "parameters": self.adapter.parameters,
            "baked": list(self.baked),
            "notes": list(self.notes),
        }


def plan_convert(
    source: Path | Adapter,
    out: Path,
    to: str,
    choices: Choices,
    *,
    base: Path | None = None,
    options: Options,
    bake: bool = False,
    pin: bool = False,
    force: bool = False,
) -> Conversion:
    """All checks of a conversion. Raises what is wrong with the inputs, the output, and the updates that do not fit."""
    writer = _writer(to, options)
    read, suffixes = [path for path in (source, base) if isinstance(path, Path)], tuple(writer.SUFFIXES)
    outputs.refuse(outputs.problems(out, f"a {writer.TITLE}", suffixes, not suffixes, force=force, inputs=read))
    if bake and base is None:
        raise ChoiceNeeded(
            Problem("E-OPTION", "baking merges into the base's tensors", hint="give it with --base BASE")
        )
    if pin and (base is None or writer.NAME != "native"):
        what = "an adapter is pinned to a base in a native file"
        raise ChoiceNeeded(Problem("E-OPTION", what, hint="--pin needs --to native and --base BASE"))
    opened = None if base is None else logical(open_checkpoint(base))
    view = None if opened is None else maps.View(opened.tensors, choices.maps or maps.shipped())
    adapter, read_as, stored = _read(source, choices, opened, view)
    inputs = _files_of(adapter, stored)
    adapter, naming = base_names.named(of_base.bound(adapter), opened, options)
    problems, notes = _unfit(adapter, choices, opened)
    notes += naming if "base_name" in writer.OPTIONS else ()
    if not adapter.when.keys() <= {*writer.CONDITIONS}:
        able = ", ".join(
            other.NAME for other in conventions.writers().values() if {*adapter.when} <= {*other.CONDITIONS}
        )
        what = f"it acts {adapter.condition()}, which {writer.NAME} has no place for: there it would always act"
        problems.append(Problem("E-CONDITIONAL", what, "", f"--to {able} keep that"))
    if problems:
        raise Mismatch(problems)
    adapter, baked, copies = _fitted(adapter, writer, opened, options, bake)
    if not adapter.updates:
        what = f"nothing is left to write: {listed(copies)} are replaced by what they are in the base"
        raise Mismatch(Problem("E-LIMIT", what, str(source) if isinstance(source, Path) else "", ""))
    adapter = replace(adapter, provenance={**adapter.provenance, "tool": TOOL})
    if pin and opened is not None and view is not None:
        adapter = pinned(adapter, opened, view)
    bundle = luggage.packed(writer.write(adapter, opened, options), adapter, stored, writer.TITLE)
    if (problem := refuse_small_disk(out, bundle.nbytes)) is not None:
        raise OutputRefused(problem)
    if opened is not None:
        inputs = (*inputs, *(FileState.of(path) for path in opened.files))
    if copies:
        notes = (*notes, f"{listed(copies)}: whole tensors that are the base's own are left out")
    if baked:
        notes = (*notes, f"{listed(baked)}: baked in, as whole tensors of this base: no other base fits them any more")
    notes = (*notes, *bundle.notes, *checked.notes(writer.NAME, adapter, opened))
    if force:
        outputs.refuse_replaced(out, inputs)
    return Conversion(adapter, read_as, writer, bundle, out, baked, notes, inputs, view, force)


def run_convert(conversion: Conversion) -> ConvertReport:
    """Write what was planned: the output appears whole, or not at all."""
    out = conversion.out
    with staged(out, conversion.force) as place:
        for name, content in conversion.bundle.files.items():
            path = place / name if name else place
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as file:
                content.write(file)
        _check_readable(place, conversion)
        for known in conversion.inputs:
            known.check()
    files = tuple(out / name if name else out for name in conversion.bundle.files)
    return ConvertReport(
        conversion.adapter,
        conversion.convention,
        conversion.writer.NAME,
        out,
        files,
        conversion.baked,
        conversion.notes,
    )


def _writer(name: str, options: Options) -> Writer:
    writers = conventions.writers()
    if name not in writers:
        known = ", ".join(writers)
        readable = any(name == convention.NAME for convention in conventions.CONVENTIONS)
        what = f"{name} can be read, not written" if readable else f"there is no convention {name!r}"
        raise ChoiceNeeded(Problem("E-OPTION", what, hint=f"--to takes {known}"))
    writer = writers[name]
    for option in fields(options):
        if getattr(options, option.name) != option.default and option.name not in writer.OPTIONS:
            able = ", ".join(other.NAME for other in writers.values() if option.name in other.OPTIONS)
            what = f"{_FLAGS[option.name]} means nothing to {name}"
            raise ChoiceNeeded(Problem("E-OPTION", what, hint=f"leave it out; it is for {able}"))
    return writer


def _read(
    source: Path | Adapter, choices: Choices, base: Checkpoint | None, view: maps.View | None
) -> tuple[Adapter, str, Checkpoint | None]:
    """The adapter, bound to the base's names and orientation; what it was stored as; where it lies, if on disk."""
    if isinstance(source, Adapter):
        if choices != Choices():
            what = "an adapter in memory was read already: alpha, scaling, config and the like mean nothing for it"
            raise ChoiceNeeded(Problem("E-OPTION", what, hint="give them where it is loaded"))
        return source, source.provenance.get("convention", "memory"), None
    loaded = load(source, choices, view)
    adapter = loaded.adapter if base is None or view is None else led(loaded.adapter, base, view, str(source))
    return adapter, loaded.convention.NAME, loaded.source


def _files_of(adapter: Adapter, stored: Checkpoint | None) -> tuple[FileState, ...]:
    """The files that an adapter lies in, as they were when they were first read: its own, and those beside it."""
    refs = [] if stored is None else [*stored.tensors.values()]
    refs += [ref for item in adapter.updates for ref in item.update.components().values()] if stored else []
    return tuple(files_of(refs))


def _unfit(adapter: Adapter, choices: Choices, base: Checkpoint | None) -> tuple[list[Problem], tuple[str, ...]]:
    """What is open or contradictory in the adapter, and why it does not fit the base; notes on both."""
    problems = []
    if unknown := adapter.unknown_scales():
        rule = min(item.update.scaling.rule for item in unknown if item.update.scaling)
        problems.append(replace(unknown_alpha(unknown), hint=choices.unknown_scale_hint(rule)))
    problems += [
        Problem("E-LAYOUT", doubt, hint="the base knows: give it with --base BASE") for doubt in adapter.doubts
    ]
    problems += adapter.check()
    if base is None:
        return problems, adapter.notes
    binding = Binding(base, allow_new=True)
    binding.parts.append(Part(adapter, 1.0, adapter.provenance.get("convention", "adapter"), sound=not problems))
    binding.bind()
    # Ties matter to a merge, which has one tensor for both; an adapter keeps them apart.
    problems += [problem for problem in binding.problems if problem.code != "E-TIED"]
    return problems, adapter.notes


def _fitted(
    adapter: Adapter, writer: Writer, base: Checkpoint | None, options: Options, bake: bool
) -> tuple[Adapter, tuple[str, ...], tuple[str, ...]]:
    """The adapter as the target can hold it, with what does not fit left out where it is the base's own tensor (PEFT
    saves whole heads and embeddings beside their LoRA), or baked in if that is wanted; the names of both.

    Raises Unsupported.
    """
    baked: set[str] = set()
    copies: tuple[str, ...] = ()
    while found := writer.misfits(adapter, base, options):
        names = {name for misfit in found for name in misfit.names} - baked
        if base is not None and (more := tuple(_copies(adapter, names, base))):
            copies += more
            left = (item for item in adapter.updates if item.target.name not in more or item.update.role != "replace")
            adapter = replace(adapter, updates=tuple(left))
            continue
        wanted = {name for misfit in found if misfit.bakeable for name in misfit.names} - baked
        if not bake or not wanted or base is None:
            raise Unsupported([_refusal(misfit, writer, adapter, bake) for misfit in found])
        if absent := sorted(wanted - base.tensors.keys()):
            what = f"{listed(absent)} can not be baked in: the base has no such tensor"
            raise Mismatch(Problem("E-TARGET", what, str(base.path), "is this the adapter's base?"))
        baked |= wanted
        adapter = replace(adapter, updates=tuple(_baked(adapter, wanted, base)))
    return adapter, tuple(name for name in adapter.targets() if name in baked), copies


def _copies(adapter: Adapter, names: set[str], base: Checkpoint) -> Iterator[str]:
    """The tensors, of some, that are replaced by what they are in the base."""
    for item in adapter.updates:
        stored = base.tensors.get(item.target.name)
        if item.target.name not in names or not isinstance(item.update, Replace) or stored is None:
            continue
        value = item.update.value
        same = item.target.covers_all and (value.dtype, value.shape) == (stored.dtype, stored.shape)
        if same and value.digest() == stored.digest():
            yield item.target.name


def _baked(adapter: Adapter, names: set[str], base: Checkpoint) -> Iterator[Targeted]:
    """The updates, with those of some tensors as one replacement each, in the place of the first of them."""
    for name, items in adapter.targets().items():
        if name in names:
            yield folding.bake(items, base.tensors[name])
        else:
            yield from items


def _refusal(misfit: Misfit, writer: Writer, adapter: Adapter, bake: bool) -> Problem:
    targets = adapter.targets()
    kinds = sorted({item.update.kind for name in misfit.names for item in targets.get(name, ())})
    what = f"{writer.NAME} can not hold the {' and '.join(kinds)} updates of {listed(misfit.names)}: {misfit.why}"
    baking = "--bake --base BASE replaces them by whole merged tensors" if misfit.bakeable and not bake else ""
    return Problem("E-UNSUPPORTED", what, hint="; or ".join(filter(None, (misfit.help, baking))))


def _check_readable(place: Path, conversion: Conversion) -> None:
    """Nothing leaves that its own convention's reader would refuse, or would find less in."""
    writer, view, named = conversion.writer, conversion.view, conversion.bundle.targets
    if conversion.bundle.parts:
        _check_parts(place, conversion)
        return
    wanted = conversion.adapter.targets().keys() if view is not None or named is None else named
    try:
        written = open_checkpoint(place)
        if not writer.detect(written):
            found: Iterable[str] = ()
        elif view is None:
            found = writer.read(written, Choices(), None).targets()
        else:
            bound = load_source(written, Choices(convention=writer.NAME), view).adapter
            found = maps.led(bound, view, str(place)).targets()
    except LoratoolError as error:
        raise AssertionError(f"the {writer.NAME} adapter that was written can not be read back: {error}") from error
    if lost := sorted(wanted - {*found}):
        raise AssertionError(f"the {writer.NAME} adapter that was written lacks {listed(lost)}")


def _check_parts(place: Path, conversion: Conversion) -> None:
    """The same for folders that are an adapter each, by the names of one model."""
    writer = conversion.writer
    for folder, wanted in conversion.bundle.parts.items():
        written = open_checkpoint(place / folder)
        found = writer.read(written, Choices(), None).targets() if writer.detect(written) else {}
        if lost := sorted(wanted - {*found}):
            raise AssertionError(f"the {writer.NAME} adapter that was written in {folder} lacks {listed(lost)}")
