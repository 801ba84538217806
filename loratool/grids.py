"""Whether the numbers of a tensor lie on a coarser grid than their dtype: narrowed, or quantised and back."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loratool.diagnosis import Reason
from loratool.evidence import resolution, rounded

if TYPE_CHECKING:
    import torch

DTYPES = ("BF16", "F16", "F8_E4M3", "F8_E5M2")
NUMBERS = 1 << 15  # that are enough to see a grid
BLOCKS = (32, 64, 128, 256)  # numbers that share a scale, beside whole rows
LEVELS = (127, 128, 7, 8)  # steps between zero and the largest number of 8 and 4 bits
ON = 0.98  # share of the numbers that must lie on a grid
CLOSE = 0.5  # root mean square of the difference from what is expected, relative to that: no other tensor at all
FEW = 16  # different numbers in a block of 4 bits


def coarse(there: torch.Tensor, wanted: torch.Tensor, dtype: str) -> Reason | None:
    """What was done to the numbers `there`, where `wanted` [rows, columns] are exact; None if nothing shows."""
    enough = max(1, NUMBERS // there.shape[1])
    there, wanted = there[:enough], wanted[:enough]
    size = float(wanted.square().mean().sqrt())
    if not size or float((there - wanted).square().mean().sqrt()) > CLOSE * size:
        return None
    for narrow in DTYPES:
        if resolution(narrow) <= resolution(dtype):
            continue
        on = float((rounded(there, narrow) == there).double().mean())
        if on > ON > float((rounded(wanted, narrow) == rounded(wanted, dtype)).double().mean()):
            return Reason(
                "narrowed", f"its numbers are those of {narrow}: it was rounded to that on the way to {dtype}"
            )
    if any(_on_grid(there, wanted, width, dtype) for width in (there.shape[1], *BLOCKS)):
        return Reason("quantised", "its numbers lie on a coarse grid: it was quantised, and made numbers again")
    return None


def _on_grid(there: torch.Tensor, wanted: torch.Tensor, width: int, dtype: str) -> bool:
    """Whether the blocks of so many numbers have few levels, or evenly spaced ones, and those of the other do not."""
    if width < 2 * FEW or there.shape[1] % width:
        return False
    mine, theirs = there.reshape(-1, width), rounded(wanted, dtype).reshape(-1, width)
    if _distinct(mine) <= FEW < _distinct(theirs):
        return True
    return any(_even(mine, levels, dtype) > ON > _even(theirs, levels, dtype) + 0.2 for levels in LEVELS)


def _distinct(blocks: torch.Tensor) -> float:
    """Different numbers in a block, on average."""
    ordered = blocks.sort(dim=1).values
    return float(((ordered[:, 1:] != ordered[:, :-1]).sum(dim=1) + 1).double().mean())


def _even(blocks: torch.Tensor, levels: int, dtype: str) -> float:
    """The share of numbers that are whole multiples of the largest one of their block, divided by `levels`.

    Only of those small enough to tell: a larger one can be off by more than a quarter of a step.
    """
    steps = blocks / (blocks.abs().amax(dim=1, keepdim=True) / levels)
    doubt = steps.abs() * resolution(dtype) + resolution(dtype)
    told = doubt < 0.1
    return float(((steps - steps.round()).abs() <= doubt)[told].double().mean()) if told.any() else 0.0
