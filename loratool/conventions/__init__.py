"""Every layout in which adapters are found on disk: one module each, with the same verbs.

NAME, TITLE         what `--from` calls it, and a few words for people
ASKS                the fields of `choices.Choices` that it has use for; any other answer is refused
KINDS, TESTED       the kinds of update it can hold, and what the tests compare it with
detect(source)      whether a checkpoint looks like it; names and side files only
read(source, ...)   the adapter in it, orientation and scale resolved
unwrap(source, ...) the base checkpoint inside it, by the base's own names; empty for an adapter alone

and, in those that `convert --to` can write,

OPTIONS             the fields of `writing.Options` that it knows
SUFFIXES            of the one file that it writes; () where it writes a folder
CONDITIONS          the kinds of `Adapter.when` that it has a place for
misfits(adapter, ...) which updates the layout can not hold, and why
write(adapter, ...)   the adapter in this layout, as files that are still to be written

A new convention is one file here, one entry in CONVENTIONS, and its fixtures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

from loratool.adapter import Adapter
from loratool.bundle import Bundle
from loratool.checkpoint import Checkpoint
from loratool.conventions import (
    diffusers,
    gguf,
    kohya,
    litgpt,
    loralib,
    lycoris,
    megatron,
    mlx,
    native,
    peft,
    peft_wrapped,
    plain,
    torchtune,
)
from loratool.conventions.choices import Choices
from loratool.conventions.writing import Misfit, Options
from loratool.errors import ChoiceNeeded, Problem, Unsupported
from loratool.tensors import TensorRef


class Convention(Protocol):
    NAME: str
    TITLE: str
    TESTED: str

    @property
    def KINDS(self) -> Sequence[str]: ...

    @property
    def ASKS(self) -> Sequence[str]: ...

    def detect(self, source: Checkpoint) -> bool: ...

    def read(self, source: Checkpoint, choices: Choices, base: Mapping[str, TensorRef] | None) -> Adapter:
        """The adapter in `source`, bound to `base`'s tensors where a base is given.

        Without a base, names and orientation are what the files say. Raises ChoiceNeeded, Unsupported, Mismatch.
        """

    def unwrap(self, source: Checkpoint, choices: Choices) -> Mapping[str, TensorRef]: ...


@runtime_checkable
class Writer(Convention, Protocol):
    """A convention that can also be written.

    The adapter is whole: every scale is known, it does not contradict itself, and it fits the base where one is given.
    `base` is for what the target's layout has to say of it (names of other modules, an architecture); a writer does
    without where it can, and a `Misfit` says where it can not.

    Both verbs look at headers only: what has to be computed (`loratool.folding`) is a reference that is read when its
    file is written. Neither touches the disk.
    """

    @property
    def OPTIONS(self) -> Sequence[str]: ...

    @property
    def SUFFIXES(self) -> Sequence[str]: ...

    @property
    def CONDITIONS(self) -> Sequence[str]: ...

    def misfits(self, adapter: Adapter, base: Checkpoint | None, options: Options) -> list[Misfit]:
        """Every update that the layout can not hold, all of them, each with its reason; [] if `write` can go ahead.

        An update that can be written another way without loss (a range of rows as zeros around it, a scale folded
        into B) is no misfit. `convert` refuses the others by name, or replaces them by the merged tensor where that is
        wanted and possible, and asks again.
        """

    def write(self, adapter: Adapter, base: Checkpoint | None, options: Options) -> Bundle:
        """The adapter in this layout: a folder of files, or a single one, and notes for the user.

        Called when `misfits` has found none. Orientation, names and scales are turned into the layout's here, and
        nowhere else. What reads the files back with this convention's `read` gets every delta, to the rounding that
        the notes name.
        """


CONVENTIONS: tuple[Convention, ...] = (
    native,
    plain,
    peft,
    peft_wrapped,
    loralib,
    kohya,
    lycoris,
    diffusers,
    litgpt,
    torchtune,
    mlx,
    gguf,
    megatron,
)


def writers() -> dict[str, Writer]:
    """The conventions that `convert --to` can write, by name."""
    return {convention.NAME: convention for convention in CONVENTIONS if isinstance(convention, Writer)}


def matching(source: Checkpoint) -> list[Convention]:
    """The conventions a source looks like; PEFT's bare factors look like much else, so they come last."""
    found = [convention for convention in CONVENTIONS if convention.detect(source)]
    return found or ([peft] if peft.is_bare(source) else [])


def find(source: Checkpoint, name: str | None = None) -> Convention | None:
    """The convention a source is in: the named one, or the only one that matches; None if none does.

    Raises ChoiceNeeded if several do, or if one is named and only others do.
    """
    if name is not None:
        found = [convention for convention in CONVENTIONS if name == convention.NAME]
        if not found:
            known = ", ".join(convention.NAME for convention in CONVENTIONS)
            raise ChoiceNeeded(Problem("E-OPTION", f"there is no convention {name!r}", hint=f"known are {known}"))
        others = matching(source)
        if others and found[0] not in others:
            # Read as another convention's, its config or its alphas would not be looked at.
            what = f"--from {name} is given, and it is a {' or a '.join(other.TITLE for other in others)}"
            raise ChoiceNeeded(Problem("E-OPTION", what, str(source.path), "leave --from out"))
        return found[0]
    found = matching(source)
    if len(found) > 1:
        names = ", ".join(convention.NAME for convention in found)
        raise ChoiceNeeded(
            Problem(
                "E-AMBIGUOUS",
                f"more than one convention matches: {names}",
                str(source.path),
                "say which one with --from NAME",
            )
        )
    return found[0] if found else None


def choose(source: Checkpoint, name: str | None = None) -> Convention:
    """The convention of a source that must be in one: raises Unsupported if it is in none, else like `find`."""
    found = find(source, name)
    if found is None:
        names = ", ".join([*source.tensors][:3])
        what = f"no adapter in it that loratool knows; its tensors are named like {names}"
        hint = "is it a plain checkpoint? `loratool inspect` shows what it is"
        if beside := sorted(source.folder.glob("adapter_model.*")):
            hint = f"give the adapter that it lies beside, {source.folder}: it is read with that"
            if source.path.is_dir():
                hint = f"give the adapter that lies beside the model: {beside[0]}"
        raise Unsupported(Problem("E-CONVENTION", what, str(source.path), hint))
    return found
