"""Rounding a block of computed numbers to the dtype of an output: to nearest, ties to even, as if computed exactly.

float32 is off by a few units of its own last place, and a number so close to the middle between two neighbours of
the output's dtype can round to the wrong one: about 20 in a million do for bfloat16. Here float32 only decides where
its proven error can not matter; the few numbers it leaves open are computed again, one by one, in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

Exact = Callable[["torch.Tensor"], "torch.Tensor"]  # flat indices of a block -> its numbers there, in float64

DENSE = 0.01  # share of marks above which numpy finds them faster without branches


def round_once(values: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Round into `out`, of the same shape and the output's dtype: once, to nearest, ties to even.

    torch goes from float64 to 16 or 8 bits through float32, which rounds twice; here the float32 in between is rounded
    to odd, after which the second rounding is the only one that shows (Boldo and Melquiond, 2008).
    """
    import torch

    if values.dtype == torch.float64 and out.element_size() < 4:
        near = values.to(torch.float32)
        even = (near.view(torch.int32) & 1) == 0
        error = values - near.to(torch.float64)
        toward = torch.where(error > 0, torch.inf, -torch.inf).to(torch.float32)
        inexact = (error != 0) & near.isfinite()
        values = torch.where(inexact & even, torch.nextafter(near, toward), near)
    return out.copy_(_within(values, out.dtype))


def _within(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The same for a dtype with infinity. E4M3 has none: what is too large gives its largest number, or NaN, by the
    version of torch; here always its largest number."""
    import torch

    if dtype != torch.float8_e4m3fn:
        return values
    top = torch.finfo(dtype).max
    return values.clamp(-top, top)


def round_exactly(
    W: torch.Tensor, band: torch.Tensor, out: torch.Tensor, low: torch.Tensor, exact: Exact, at_once: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Round the exact result into `out`, given W [rows, columns], which is within `band` [rows, 1] of it.

    W and `low` (of out's dtype) are overwritten. `exact` is asked for at most `at_once` numbers at a time. Returns
    what it was asked for and what it said: flat indices, ascending, and numbers.
    """
    import torch

    out.copy_(_within(W.add_(band), out.dtype))
    low.copy_(_within(W.sub_(band, alpha=2), out.dtype))
    where = differing(out, low)
    if not math.isfinite(band.sum()):
        where = torch.arange(W.numel(), device=W.device)
    values = torch.empty_like(where, dtype=torch.float64)
    for start in range(0, len(where), at_once):
        part = slice(start, start + at_once)
        values[part] = exact(where[part])
        out.view(-1)[where[part]] = round_once(values[part], out.new_empty(len(where[part])))
    return where, values


@contextmanager
def gradual_underflow() -> Iterator[None]:
    """This thread's arithmetic keeps subnormal numbers meanwhile: users, and libraries, have it flush them to zero."""
    import torch

    flushing = not (torch.full((1,), 2.0**-140, dtype=torch.float32, device="cpu") * 1.0).item()
    if flushing:
        torch.set_flush_denormal(False)
    try:
        yield
    finally:
        if flushing:
            torch.set_flush_denormal(True)


def undecided(values: torch.Tensor, doubt: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Which numbers in float64, that can be off by `doubt`, round to one neighbour in `dtype` here and to another one
    on a machine that sums in another order: next to none; and zeros, for their sign."""
    import torch

    doubt = doubt * 2  # each machine is as far off as that
    empty = torch.empty(values.shape, dtype=dtype, device=values.device)
    lowest, highest = round_once(values - doubt, empty), round_once(values + doubt, empty.clone())
    return (bits(lowest) != bits(highest)) | ~(doubt + values).isfinite()


def differing(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """The flat indices, ascending, at which two tensors of one shape and dtype have other bits."""
    import numpy as np
    import torch

    one, other = bits(one).reshape(-1), bits(other).reshape(-1)
    if one.device.type != "cpu":
        return (one != other).nonzero().view(-1)
    mine, theirs = one.numpy(), other.numpy()
    step = 8 // mine.itemsize
    if mine.size % step:
        return torch.from_numpy(positions(mine != theirs))
    # Eight bytes at a time, since few of them differ.
    found = positions(mine.view(np.int64) != theirs.view(np.int64))
    where = (found[:, None] * step + np.arange(step)).reshape(-1)
    return torch.from_numpy(where[mine[where] != theirs[where]])


def positions(flags: Any) -> Any:
    """Where a numpy array of flags is true.

    numpy looks for the next true one where there are at most 10 %, and goes through all of them without a branch where
    there are more, which is faster from 1 % on: so true ones are added at the end, and cut off again.
    """
    import numpy as np

    count = int(np.count_nonzero(flags))
    if count <= DENSE * flags.size:
        return np.flatnonzero(flags)
    more = np.ones(flags.size + flags.size // 8 + 1, bool)
    more[: flags.size] = flags
    return np.flatnonzero(more)[:count]


def bits(values: torch.Tensor) -> torch.Tensor:
    """The bits of floating-point numbers as signed integers of the same width."""
    import torch

    return values.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()])
