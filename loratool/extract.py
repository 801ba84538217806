"""An adapter out of a wrapped checkpoint, bound to the base weights that lie in the same file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loratool import conventions, outputs
from loratool import format as native_format
from loratool.adapter import Adapter, TensorIdentity
from loratool.binding import Binding, Part, led
from loratool.checkpoint import Checkpoint, open_checkpoint
from loratool.companions import Companions
from loratool.conventions import Convention, of_base
from loratool.conventions.choices import Choices
from loratool.conventions.load import load_source
from loratool.errors import ChoiceNeeded, Mismatch, Problem, Unsupported
from loratool.identity import identity_of
from loratool.layout import output_files, output_index
from loratool.maps import View, shipped
from loratool.merge import run_copy
from loratool.plan import Plan, settled
from loratool.quantised import Foreign, logical
from loratool.staging import take_back
from loratool.tensors import Computed, TensorRef, files_of
from loratool.updates import Replace
from loratool.version import TOOL
from loratool.workers import Meter, ProgressCallback


@dataclass(frozen=True)
class ExtractReport:
    """What an extraction wrote."""

    adapter: Adapter
    convention: str
    title: str  # the convention in words
    out: Path
    base_out: Path | None

    def to_json(self) -> dict[str, Any]:
        return {
            "convention": self.convention,
            "out": str(self.out),
            "base_out": None if self.base_out is None else str(self.base_out),
            "updates": len(self.adapter.updates),
            "parameters": self.adapter.parameters,
            "base_tensors_known": len(self.adapter.base.tensors),
            "notes": list(self.adapter.notes),
        }


def run_extract(
    wrapped: Path,
    out: Path,
    choices: Choices,
    *,
    base_path: Path | None = None,
    base_out: Path | None = None,
    force: bool = False,
    progress: ProgressCallback | None = None,
) -> ExtractReport:
    """Write the adapter of a wrapped checkpoint as a native file, and with `base_out` its clean base as a folder.

    `base_path` is the base of a file that holds no base weights: the adapter is bound to its names and digests.
    """
    read = [wrapped, *([base_path] if base_path is not None else [])]
    outputs.refuse(
        outputs.problems(out, "a native adapter", (".safetensors",), False, force=force, inputs=read),
        () if base_out is None else _base_out_problems(base_out, out, read, force),
    )
    source = open_checkpoint(wrapped)
    inputs = files_of(source.tensors.values())
    chosen = conventions.choose(source, choices.convention)
    inside = chosen.unwrap(source, choices)
    adapter, base = _bound(source, inside, chosen, choices, base_path, base_out)
    inputs |= files_of(base.values())
    if unknown := adapter.unknown_scales():
        rules = {item.update.scaling.rule for item in unknown if item.update.scaling}
        hint = choices.unknown_scale_hint(min(rules), chosen.ASKS)
        raise ChoiceNeeded(replace(native_format.unknown_alpha(unknown), where=str(wrapped), hint=hint))
    known = _known(adapter, logical(replace(source, tensors=base)).tensors if inside else base)
    copy = None if base_out is None else settled(replace(_base_plan(source, base, base_out), force=force))
    for place in (out, *([base_out] if base_out else [])) if force else ():
        outputs.refuse_replaced(place, inputs)
    replaced = base_out is not None and base_out.exists()
    meter = Meter(sum(ref.nbytes for ref in known.values()) + (copy.nbytes if copy else 0), progress)
    identity = replace(adapter.base, tensors=_identities(known, meter))
    adapter = replace(adapter, base=identity, provenance={**adapter.provenance, "tool": TOOL})
    looked, written = meter.done, None
    try:
        with native_format.writing(adapter, out, force):  # appears last: without the base it does not
            if copy is not None:
                run_copy(copy, lambda step: meter.step(looked + step.done - meter.done, step.what))
                written = copy.out.stat()
            for state in inputs:
                state.check()
    except BaseException:
        if base_out is not None and written is not None and not replaced:
            take_back(base_out, written)
        raise
    return ExtractReport(adapter, chosen.NAME, chosen.TITLE, out, base_out)


def _base_out_problems(base_out: Path, out: Path, read: Sequence[Path], force: bool) -> Iterator[Problem]:
    """Why the clean base can not be written there."""
    yield from outputs.problems(base_out, "a clean base", (), True, force=force, inputs=read)
    if base_out.absolute() in (out.absolute(), *out.absolute().parents) and (force or not base_out.exists()):
        yield Problem("E-OUTPUT", "the adapter and its base can not have one name", str(out), "name another with -o")


def _bound(
    source: Checkpoint,
    inside: Mapping[str, TensorRef],
    chosen: Convention,
    choices: Choices,
    base_path: Path | None,
    base_out: Path | None,
) -> tuple[Adapter, Mapping[str, TensorRef]]:
    """The adapter, and the base weights it lies beside, or those of the base that is given."""
    if inside and base_path is not None:
        what = "the base weights are in the file itself, so another base means nothing"
        raise ChoiceNeeded(Problem("E-OPTION", what, str(source.path), "leave out --base"))
    if inside:
        return load_source(source, choices).adapter, inside
    if base_path is None or base_out is not None:
        what = f"a {chosen.TITLE} has no base weights in it, so there is nothing to extract from"
        hint = (
            "leave out --base-out"
            if base_path
            else "merge and inspect take it as it is; --base BASE binds it to its base"
        )
        raise Unsupported(Problem("E-NO-BASE", what, str(source.path), hint))
    opened = logical(open_checkpoint(base_path))
    view = View(opened.tensors, choices.maps or shipped())
    adapter = of_base.bound(led(load_source(source, choices, view).adapter, opened, view, str(source.path)))
    binding = Binding(opened, allow_new=True)
    binding.parts.append(Part(adapter, 1.0, source.path.name, sound=False))
    binding.bind()
    if binding.problems:
        raise Mismatch(binding.problems)
    return adapter, opened.tensors


def _known(adapter: Adapter, base: Mapping[str, TensorRef]) -> dict[str, TensorRef]:
    """The base tensors that the updates change, where the file has their very bits.

    A tensor that was trained in place has no base in the file: its "base" is the very value that replaces it. One that
    was computed (a delta subtracted again) is the base's only up to rounding.
    """
    own = {item.target.name: item.update.value.data for item in adapter.updates if isinstance(item.update, Replace)}
    return {
        name: base[name]
        for name in adapter.targets()
        if name in base and own.get(name) != base[name].data and not isinstance(base[name].data, Computed | Foreign)
    }


def _identities(known: Mapping[str, TensorRef], meter: Meter) -> dict[str, TensorIdentity]:
    """Their digests: all their bytes are read."""
    found = {}
    for name, ref in known.items():
        found[name] = identity_of(ref)
        meter.step(ref.nbytes, name)
    return found


def _base_plan(source: Checkpoint, base: Mapping[str, TensorRef], out: Path) -> Plan:
    """The clean base, in shards like the wrapped checkpoint's."""
    stored = {ref.name: clean for clean, ref in base.items()}
    shards = tuple(
        replace(
            shard,
            tensors={stored[name]: base[stored[name]] for name in shard.tensors if name in stored},
            metadata={},
            header=None,
        )
        for shard in source.shards
    )
    checkpoint = Checkpoint(source.path, shards, base, source.index)
    files = output_files(checkpoint, {})
    if len(files) == 1:
        files = (replace(files[0], name="model.safetensors"),)
    companions = Companions(tuple(path for path in source.companions() if not path.name.startswith("adapter_")))
    return Plan("extract", source.path, out, False, files, companions, output_index(checkpoint, files), (), "keep")
