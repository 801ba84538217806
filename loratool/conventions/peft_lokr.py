"""Which config of PEFT's LoKr leads to the factors of an adapter: what it makes of `r` and its `decompose_` options.

PEFT cuts the outputs of a layer into a * b and its inputs into c * d, by one `decompose_factor` for all layers. w1
[a, c] is of low rank if `decompose_both` and r < max(a, c) / 2, w2 [b, d, kernel] if r < max(b, d) / 2, and whole
otherwise (peft/tuners/lokr/layer.py, update_layer). A factor of low rank can be padded to a larger r, or written whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from math import isqrt

from loratool.conventions.writing import Misfit
from loratool.tensors import Shape
from loratool.updates import Lokr
from loratool.updates.base import inner

CUT = Misfit((), "PEFT has one decompose_factor for all layers, and none leads to these shapes of w1 and w2")
CONV1D = Misfit((), "PEFT multiplies the whole w2 of a 1-d convolution in another order (make_kron)")


@dataclass(frozen=True)
class Form:
    """How PEFT holds one LoKr: its rank, and which of w1 (`left`) and w2 (`right`) are of low rank.

    `multiplied` counts factors of low rank that become whole. `free` is whether any larger rank would do as well.
    """

    rank: int
    left: bool
    right: bool
    multiplied: int
    free: bool


def misfits(lokrs: Mapping[str, Lokr], shapes: Mapping[str, Shape]) -> dict[str, Misfit]:
    """What does not fit of the updates with these shapes, by name."""
    factor = _factor([cut for name, shape in shapes.items() for cut in _cuts(lokrs[name], shape)])
    found = {}
    for name, shape in shapes.items():
        if any(cut_in_two(size, factor)[0] != first for size, first in _cuts(lokrs[name], shape)):
            found[name] = CUT
        elif _form(lokrs[name], shape, False) is None and _form(lokrs[name], shape, True) is None:
            found[name] = CONV1D
    fitting = {name: shape for name, shape in shapes.items() if name not in found}
    _, forms = _both(lokrs, fitting)
    return found | dict.fromkeys(fitting.keys() - forms.keys(), CONV1D)


def plan(lokrs: Mapping[str, Lokr], shapes: Mapping[str, Shape]) -> tuple[int, bool, dict[str, Form]]:
    """`decompose_factor`, `decompose_both`, and how each update is written, for updates without misfits."""
    factor = _factor([cut for name, shape in shapes.items() for cut in _cuts(lokrs[name], shape)])
    both, forms = _both(lokrs, shapes)
    # Where no tensor shows a rank any larger one will do: the same for all, so that the config names it once.
    common = max((form.rank for form in forms.values() if form.free), default=1)
    return factor, both, {name: replace(form, rank=common) if form.free else form for name, form in forms.items()}


def _both(lokrs: Mapping[str, Lokr], shapes: Mapping[str, Shape]) -> tuple[bool, dict[str, Form]]:
    """The better `decompose_both`: more updates that it can hold, fewer products."""
    found = []
    for both in (False, True):
        forms = {name: form for name, shape in shapes.items() if (form := _form(lokrs[name], shape, both))}
        found.append((-len(forms), sum(form.multiplied for form in forms.values()), both, forms))
    _, _, both, forms = min(found, key=lambda one: one[:3])
    return both, forms


def _form(update: Lokr, shape: Shape, both: bool) -> Form | None:
    """The first of the possible forms, those with the most factors of low rank before others; None if there is none."""
    (out, a), (columns, c) = _cuts(update, shape)
    left, right = max(a, c), max(out // a, columns // c)
    own = update.factors.rank or 0
    low1, low2 = update.B1 is not None, update.B2 is not None
    for one, two in product((low1, False), (low2, False)):
        if (one and not both) or (len(shape) == 3 and not two):
            continue
        needs = [inner(B) for B, low in ((update.B1, one), (update.B2, two)) if B is not None and low]
        needs += [-(-left // 2)] if both and not one else []
        needs += [-(-right // 2)] if not two else []
        least, limits = max(needs, default=1), [size for size, low in ((left, one), (right, two)) if low]
        if all(2 * least < limit for limit in limits):
            fits = own >= least and all(2 * own < limit for limit in limits)
            free = not limits and not own
            return Form(own if fits else least, one, two, (low1 - one) + (low2 - two), free)
    return None


# -- cutting dimensions -----------------------------------------------------------------------------------------------


def _cuts(update: Lokr, shape: Shape) -> tuple[tuple[int, int], tuple[int, int]]:
    """(outputs, a) and (inputs, c): each dimension, and its part in the first factor."""
    left, right = update.w1 or update.B1, update.w1 or update.A1
    assert left is not None and right is not None, "a factor is whole or a product"
    return (shape[0], left.shape[0]), (shape[1], right.shape[1])


def cut_in_two(size: int, factor: int) -> tuple[int, int]:
    """PEFT's `factorization`: the factor, if it divides; else the largest divisor up to it and up to the root."""
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    first = isqrt(size) if factor < 0 else min(isqrt(size), factor)
    while size % first:
        first -= 1
    return first, size // first


def _factor(cuts: Iterable[tuple[int, int]]) -> int:
    """The `decompose_factor` that makes most of these cuts; -1, PEFT's default, if it makes as many."""
    known = [*cuts]

    def made(factor: int) -> int:
        return sum(cut_in_two(size, factor)[0] == first for size, first in known)

    return max((-1, *_candidates({*known})), key=made)


def _candidates(cuts: set[tuple[int, int]]) -> Iterator[int]:
    """Each first part, and the next number that divides nothing, which leaves shorter dimensions at their roots."""
    for first in sorted({first for _, first in cuts}):
        yield first
        yield next(number for number in range(first + 1, 2**53) if all(size % number for size, _ in cuts))
