"""Adapters in a running model: merged into its parameters in place, taken out again to the bit, swapped in one pass.

A model's parameters always hold the merge of the adapters that are active, in their order: `W + sum of weight * scale
* delta`, rounded once, from the original bits. What gives those back is kept beside the model, not in it.
"""

from __future__ import annotations

import threading
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from loratool.adapter import Adapter
from loratool.conventions.choices import Choices
from loratool.errors import ChoiceNeeded, Problem
from loratool.live.bound import Entry, Request
from loratool.live.model import innermost
from loratool.live.state import LiveReport, State

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Handle", "LiveReport", "put"]

UNDO = ("compressed", "copy")

_states: WeakKeyDictionary[nn.Module, State] = WeakKeyDictionary()
_states_lock = threading.Lock()


class Handle:
    """An adapter in a live model. As a context manager, it takes the adapter out at the end.

    Every call that changes a model waits for the one before, in whatever thread. A forward pass does not: while a call
    is at work, it may see some parameters as they were and some as they will be. The handle keeps its model alive.
    """

    def __init__(self, model: nn.Module, state: State, entry: Entry, report: LiveReport) -> None:
        self._model, self._state, self._entry = model, state, entry
        self._report = report

    @property
    def active(self) -> bool:
        """Whether the model's parameters hold the adapter."""
        return self._entry in self._state.entries

    @property
    def report(self) -> LiveReport:
        """What the last change through this handle came to."""
        return self._report

    def remove(self) -> None:
        """Take the adapter out: the parameters are then what a merge of the others gives, or the original bits.

        In any order, whatever was applied since. Removing what is out already does nothing. Raises Mismatch where
        something else has changed a parameter; the model then is as it was.
        """
        with self._state.lock:
            if self.active:
                left = [entry for entry in self._state.entries if entry is not self._entry]
                self._report = self._state.change(self._model, left)

    def swap(self, adapter: str | Path | Adapter, *, weight: float = 1.0) -> LiveReport:
        """Put another adapter, or another weight, in the place of this one, in one pass over the parameters.

        The handle then stands for it. It is read with the options that `apply` was given. Raises what `apply` raises,
        and ChoiceNeeded if this one is out; the model then is as it was.
        """
        with self._state.lock:
            if not self.active:
                what = "this handle's adapter is not in the model: there is nothing to swap"
                raise ChoiceNeeded(Problem("E-OPTION", what, hint="`loratool.apply` puts one in"))
            given = adapter if isinstance(adapter, Adapter) else Path(adapter)
            new = self._entry.request._replace(adapter=given, weight=weight)
            place = self._state.entries.index(self._entry)
            entries = [new if entry is self._entry else entry for entry in self._state.entries]
            self._report = self._state.change(self._model, entries, others=_others(self._state))
            self._entry = self._state.entries[place]
            return self._report

    def forget(self) -> None:
        """Take the model's present bits for the original ones: what is active stays in it for good.

        All handles of the model are then out. Nothing is kept in memory for them.
        """
        with self._state.lock:
            self._state.entries, self._state.parameters = (), {}

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


def put(
    model: nn.Module,
    adapter: Path | Adapter,
    weight: float,
    choices: Choices,
    *,
    undo: str | Path | None = None,
    reproducible: bool | None = None,
    check_base: bool = True,
) -> Handle:
    """Merge an adapter into a model's parameters, after those that are in it already."""
    model = innermost(model)
    with _states_lock:
        state = _states.setdefault(model, State())
    with state.lock:
        request = Request(adapter, weight, choices, check_base)
        entries: list[Entry | Request] = [*state.entries, request]
        report = state.change(model, entries, _undo(undo), reproducible, _others(state))
        return Handle(model, state, state.entries[-1], report)


def _others(state: State) -> list[tuple[nn.Module, State]]:
    with _states_lock:
        return [(model, other) for model, other in _states.items() if other is not state]


def _undo(given: str | Path | None) -> str | Path | None:
    return Path(given) if isinstance(given, str) and given not in UNDO else given
