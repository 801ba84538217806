"""One tensor of an output, a block of rows at a time: the loop of a merge, and its one dtype policy.

Stored bytes -> compute dtype -> every update of every adapter -> finite? -> rounded once -> written. Buffers are used
again for every block, and nothing as large as a tensor is held, except right factors of its updates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

from blake3 import blake3

from loratool.errors import InvalidFile, Mismatch, Problem
from loratool.layout import NewTensor, Weighted
from loratool.quantised import Dequantised
from loratool.rounding import Exact, gradual_underflow, round_exactly, round_once, undecided
from loratool.rows import Rows
from loratool.survival import Survival, survival_of
from loratool.tensors import (
    CHUNK,
    DTYPE_BITS,
    MERGEABLE,
    TensorRef,
    all_finite,
    as_bytes,
    empty,
    extremes,
    torch_dtype,
)
from loratool.undo import TensorRecorder, UndoTensor, decode_block, encode_block
from loratool.updates import Block
from loratool.updates.dora import DoraBlock

if TYPE_CHECKING:
    import torch

BLOCK_BYTES = CHUNK  # stored bytes of a row block: small enough for it and its wider copy to stay in the cache
ROLE_ORDER = ("replace", "add", "renormalise")  # section "Merging" of the spec
NARROW = [dtype for dtype in MERGEABLE if DTYPE_BITS[dtype] <= 16]
E4M3_LIMIT = 464  # what still rounds to the largest number, 448; there is no infinity beyond
SAMPLED = 16  # one row of so many, the first of a block among them, tells how much of a change is left
FACTORS_AT_ONCE = 1 << 16  # numbers of a factor that are gathered at a time, to compute single elements


class Written(NamedTuple):
    """What is known of a computed tensor once it is written."""

    before: str | None  # digest of the source tensor; None for a new one
    after: str
    bound: float  # how far rounding can have moved an element
    survival: Survival = Survival()  # of a sample of its rows, or of all of a weight that was quantised again


def compute_dtype(tensor: NewTensor) -> str:
    """float32 where both ends have 16 bits or less and single elements can be settled in float64; else float64."""
    narrow = (tensor.source.dtype if tensor.source else tensor.dtype) in NARROW and tensor.dtype in NARROW
    elementwise = all(item.update.elementwise(weight) for item, weight in tensor.updates)
    components = (ref for item, _ in tensor.updates for ref in item.update.components().values())
    return "F32" if narrow and elementwise and all(ref.dtype != "F64" for ref in components) else "F64"


class _Opened(NamedTuple):
    """An update that is open for one matrix, and the rows of the matrix it covers."""

    block: Block
    start: int
    stop: int
    weight: float
    first_pass: bool
    replaces: bool
    terms: int  # k of section 5 of UNDO.md: how often, at most, an element is rounded by it


Part = tuple[_Opened, "torch.Tensor", int]  # an update, its rows of a block, the number of the first in its region


class Merged(NamedTuple):
    """A block of rows of a merged tensor. Its memory is used again for the next one.

    Rows are counted through all of a tensor's matrices. `exact` are the numbers that were rounded; None where nothing
    had to be computed, and `values` are `stored`.
    """

    start: int
    stop: int
    stored: torch.Tensor  # [rows, columns]; no rows for a new tensor
    values: torch.Tensor  # [rows, columns], in the output's dtype
    exact: torch.Tensor | None  # [rows, columns], in the compute dtype; with `reproducible` only to its last place
    largest: float  # magnitude before rounding
    source: Rows
    opened: Sequence[_Opened]
    first: int  # the number of the matrix's first row


Place = Callable[[int, int], "torch.Tensor | None"]  # [rows, columns] in one piece; None: the block's own memory


@gradual_underflow()
def each_block(
    tensor: NewTensor,
    receive: Callable[[Merged], None],
    *,
    rows: tuple[int, int] | None = None,
    reproducible: bool = False,
    device: str = "cpu",
    place: Place | None = None,
) -> None:
    """Merge a tensor block by block, or only the blocks that hold some of the rows start:stop.

    Blocks are the same ones whatever rows are wanted, and so are their bits. `reproducible` rounds as if computed
    exactly, to the same bits on every machine; without it, about 20 in a million elements of 16 bits are the other
    neighbour. `place` says where the values of the rows start:stop of a block are to be rounded to, if not to memory
    that the next block uses again; blocks in which nothing is computed do not go there.
    """
    tensor = held(tensor)
    matrices, height, columns = _matrices(tensor)
    low, high = rows or (0, matrices * height)
    with _rows(tensor, height, columns, device) as source:
        for matrix in range(matrices):
            first = matrix * height
            wanted = [(a, b) for a, b in _blocks(height, columns, tensor) if first + a < high and low < first + b]
            if not wanted:
                continue
            opened = [_open(weighted, tensor, matrix, height, device) for weighted in _ordered(tensor, matrix)]
            if any(update.first_pass for update in opened):
                for start, stop in _blocks(height, columns, tensor):
                    W = source.widened(source.read(first + start, first + stop), stop - start)
                    for update, part, offset in _inside(opened, W, start, stop):
                        if update.first_pass:
                            update.block.observe(part, offset)
                        else:  # replacements come first: the norm is of what they leave
                            update.block.apply(part, offset, update.weight)
            for start, stop in wanted:
                stored = source.read(first + start, first + stop)
                values, exact, largest = stored, None, 0.0
                if opened or tensor.source is None or tensor.source.dtype != tensor.dtype:
                    out = place(first + start, first + stop) if place is not None else None
                    if out is None:
                        out = source.buffer("out", torch_dtype(tensor.dtype), stop - start)
                    values, exact, largest = _merged(tensor, source, opened, stored, out, start, stop, reproducible)
                receive(Merged(first + start, first + stop, stored, values, exact, largest, source, opened, first))


def row_count(tensor: NewTensor) -> int:
    """The rows of all of a tensor's matrices, as `Merged` and `each_block` count them."""
    matrices, rows, _ = _matrices(tensor)
    return matrices * rows


def undo_of(tensor: NewTensor, block: Merged) -> bytes:
    """What `Predictor` needs beside a merged block to give the stored one back. Not for a new tensor."""
    start, stop = block.start - block.first, block.stop - block.first
    guess, doubtful = _predicted(tensor, block.source, block.opened, block.values, block.stored.dtype, start, stop)
    return encode_block(block.stored, guess, doubtful())


def norms_of(block: Merged) -> list[torch.Tensor]:
    """What `Predictor` needs of a matrix's DoRA updates, in order; whole once its last block was handed out."""
    return [update.block.norm for update in block.opened if isinstance(update.block, DoraBlock)]


class Predictor:
    """Gives blocks of rows back as they were before a merge: `tensor.source` is of the merged one's shape and dtype.

    `norms` are those of a matrix's DoRA updates, asked for when it is its turn; `height` is that of the blocks, where
    another merge chose it.
    """

    def __init__(
        self,
        tensor: NewTensor,
        norms: Callable[[int], Iterator[torch.Tensor]],
        device: str = "cpu",
        height: int = 0,
    ) -> None:
        self.tensor = held(tensor)
        self.norms, self.device = norms, device
        _, self.rows, columns = _matrices(tensor)
        self.buffers = _rows(tensor, self.rows, columns, device, height)
        self.matrix, self.opened = -1, list[_Opened]()

    def before(self, start: int, stop: int, merged: torch.Tensor, undo: bytes) -> torch.Tensor:
        """The block of rows start:stop, on the CPU. Raises ValueError for a record that does not fit."""
        matrix, first = divmod(start, self.rows)
        self.at(matrix)
        guess, _ = _predicted(
            self.tensor, self.buffers, self.opened, merged, torch_dtype(self.tensor.dtype), first, first + stop - start
        )
        return decode_block(undo, guess)

    def at(self, matrix: int) -> None:
        """Open the updates of a matrix, if they are not."""
        if matrix == self.matrix:
            return
        self.matrix = matrix
        self.opened = [_open(w, self.tensor, matrix, self.rows, self.device) for w in _ordered(self.tensor, matrix)]
        norms = self.norms(matrix)
        for update in self.opened:
            if isinstance(update.block, DoraBlock):
                update.block.norm = next(norms).reshape(update.block.norm.shape).to(self.device)


def float32_error(block: Merged) -> torch.Tensor:
    """[rows, 1] in float64: how far a merge that computes in float32, in any order, may be from the exact result."""
    start, stop = block.start - block.first, block.stop - block.first
    error = block.values.new_zeros(len(block.values), 1, dtype=torch_dtype("F64"))
    if block.exact is None:
        return error
    own = 4
    for update, part, offset in _inside(block.opened, block.exact, start, stop):
        place = offset + update.start - start
        magnitude = update.block.magnitude(offset, offset + len(part)).double()
        error[place : place + len(part)].add_(magnitude, alpha=abs(update.weight) * (update.terms + 8))
        own += update.terms + 8 if isinstance(update.block, DoraBlock) else 0
    return error.add_(_peaks(block.exact), alpha=own).mul_(2.0**-24)


def block_rows(tensor: NewTensor) -> list[tuple[int, int]]:
    """The rows start:stop of each block that `each_block` hands out, in its order, counted through all matrices."""
    matrices, rows, columns = _matrices(tensor)
    blocks = [*_blocks(rows, columns, tensor)]
    return [(matrix * rows + start, matrix * rows + stop) for matrix in range(matrices) for start, stop in blocks]


def held(tensor: NewTensor) -> NewTensor:
    """A tensor of which blocks can be asked for again and again, without reading a whole factor each time."""
    return replace(tensor, updates=tuple(map(_held, tensor.updates)))


def stacked(tensor: NewTensor) -> bool:
    """Whether its first dimension counts experts, of which each is a matrix for updates."""
    return any(item.target.stacked for item, _ in tensor.updates)


def whole(tensor: NewTensor, reproducible: bool = False) -> torch.Tensor:
    """A merged tensor in memory, in its shape and dtype."""
    merged = empty(tensor.shape, torch_dtype(tensor.dtype))

    def receive(block: Merged) -> None:
        merged.view(-1, block.values.shape[1])[block.start : block.stop] = block.values

    each_block(tensor, receive, reproducible=reproducible)
    return merged


def compute(
    tensor: NewTensor,
    out: BinaryIO,
    step: Callable[[int], None],
    measure: bool = False,
    recorder: TensorRecorder | None = None,
    digests: bool = True,
    reproducible: bool = False,
    device: str = "cpu",
) -> Written:
    """Compute one tensor and write it at the current position of `out`.

    `step` is told the bytes of every block. With `measure`, the error that rounding may leave is bounded on the way;
    with a `recorder`, what undoes every block is recorded. `reproducible` is as in `each_block`.
    """
    before, after = blake3(), blake3()
    largest = 0.0
    reach = 0.0  # of the deltas: sums in between can be larger than both ends
    survival = Survival()
    _, rows, columns = _matrices(tensor)

    def receive(block: Merged) -> None:
        nonlocal largest, reach, survival
        source, start, stop = block.source, block.start - block.first, block.stop - block.first
        if measure and block.exact is not None:
            largest = max(largest, block.largest, *map(abs, extremes(block.stored)))
            reach = max(reach, _reach(block.opened, start, stop))
        if block.exact is not None and tensor.source is not None:
            sample = slice(None, None, SAMPLED)
            survival = survival.plus(survival_of(block.stored[sample], block.exact[sample], block.values[sample]))
        if digests:
            before.update(as_bytes(source.last))
        data = source.host(block.values)
        if digests:
            after.update(data)
        write_all(out, data)
        step(len(data))
        if recorder is None:
            return
        if tensor.source is not None:
            recorder.blocks.append(undo_of(tensor, block))
        if stop == rows:
            recorder.norms += [norm.cpu() for norm in norms_of(block)]

    each_block(tensor, receive, reproducible=reproducible, device=device)
    if recorder is not None:
        recorder.height = _height(rows, columns, tensor)
    if recorder is not None and tensor.source is None and tensor.original is not None:
        _record_whole(tensor.original, recorder)
    if not digests:
        return Written(None if tensor.original is None else "", "", 0.0, survival)
    as_stored = tensor.source is not None and not isinstance(tensor.source.data, Dequantised)
    digest = f"blake3:{before.hexdigest()}" if as_stored else tensor.original.digest() if tensor.original else None
    bound = _rounding_bound(tensor, largest, reach) if measure else 0.0
    return Written(digest, f"blake3:{after.hexdigest()}", bound, survival)


def _record_whole(original: TensorRef, recorder: TensorRecorder) -> None:
    """Record a tensor that nothing predicts, because the merge gave it another shape: against zeros."""
    import torch

    tensor = NewTensor(original.name, original, original.dtype, original.shape)
    _, rows, columns = _matrices(tensor)
    recorder.height = _height(rows, columns, tensor)
    with _rows(tensor, rows, columns) as source:
        for start, stop in _blocks(rows, columns, tensor):
            stored = source.read(start, stop)
            recorder.blocks.append(encode_block(stored, torch.zeros_like(stored), _none()))


@gradual_underflow()
def restore(
    tensor: NewTensor, record: UndoTensor, out: BinaryIO, step: Callable[[int], None], device: str = "cpu"
) -> Written:
    """Write the base's tensor: predicted from the merged one in `tensor.source`, corrected by its undo record.

    `tensor.updates` carry the weights of the merge. Raises InvalidFile for a record that does not fit.
    """
    after = blake3()
    matrices, rows, columns = _matrices(tensor)
    blocks = record.read_blocks()
    norms = (ref.read() for ref in record.norms)
    predictor = Predictor(tensor, lambda matrix: norms, device, record.height)
    try:
        with _rows(tensor, rows, columns, device, record.height) as source:
            for matrix in range(matrices):
                predictor.at(matrix)
                first = matrix * rows
                for start, stop in _blocks(rows, columns, tensor, record.height):
                    merged = source.read(first + start, first + stop)
                    data = as_bytes(predictor.before(first + start, first + stop, merged, next(blocks)))
                    after.update(data)
                    write_all(out, data)
                    step(len(data))
        if next(blocks, None) is not None or next(norms, None) is not None:
            raise ValueError("it has more blocks than the tensor")
    except (StopIteration, ValueError, RuntimeError) as error:
        what = f"{tensor.name}: the undo record does not fit: {error or 'it has too few blocks'}"
        raise InvalidFile(Problem("E-UNDO", what, tensor.name, "use --base instead")) from None
    return Written(None, f"blake3:{after.hexdigest()}", 0.0)


# --- a block there and back ------------------------------------------------------------------------------------------


def _merged(
    tensor: NewTensor,
    source: Rows,
    opened: Sequence[_Opened],
    stored: torch.Tensor,
    out: torch.Tensor,
    start: int,
    stop: int,
    reproducible: bool,
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Rows start:stop of the result, in `out`; before they were rounded; and their largest magnitude, which is
    finite."""
    W = source.widened(stored, stop - start)
    inside = [*_inside(opened, W, start, stop)]
    for update, part, offset in inside:
        update.block.apply(part, offset, update.weight)
    largest = max(map(abs, extremes(W)))
    if not reproducible or not inside or compute_dtype(tensor) == "F64":
        return _finite(round_once(W, out), largest, tensor), W, largest
    size = _size(inside, W, start)
    low = source.buffer("low", out.dtype, stop - start)
    exact = _exact(opened, stored, start)
    round_exactly(W, _single_band(inside, size, _peaks(W)), out, low, exact, _at_once(inside))
    return _finite(out, largest, tensor), W, largest


def _predicted(
    tensor: NewTensor,
    source: Rows,
    opened: Sequence[_Opened],
    merged: torch.Tensor,
    dtype: torch.dtype,
    start: int,
    stop: int,
) -> tuple[torch.Tensor, Callable[[], torch.Tensor]]:
    """The base's rows start:stop as they follow from the merged ones, in the base's dtype; and what tells the flat
    indices, ascending, of the elements for which another machine may find a neighbour."""
    guess = source.buffer("guess", dtype, stop - start)
    if merged.dtype == dtype and not [*_inside(opened, merged, start, stop)]:
        return guess.copy_(merged), _none
    W = source.widened(merged, stop - start)
    inside = [*_inside(opened, W, start, stop)][::-1]
    if not inside or compute_dtype(tensor) == "F64":
        terms = W.new_zeros(stop - start, 1)
        for update, part, offset in inside:
            place = offset + update.start - start
            update.block.revert(part, terms[place : place + len(part)], offset, update.weight)
        round_once(W, guess)
        doubt = _double_band(opened, terms, W)
        return guess, lambda: undecided(W, doubt, dtype).view(-1).nonzero().view(-1)
    for update, part, offset in inside:
        if not update.replaces:  # what was replaced can not be predicted
            update.block.apply(part, offset, -update.weight)
    size = _size(inside, W, start)
    low = source.buffer("low guess", dtype, stop - start)
    exact = _exact(opened, merged, start, back=True)
    where, values = round_exactly(W, _single_band(inside, size, _peaks(W)), guess, low, exact, _at_once(inside))

    def doubtful() -> torch.Tensor:
        sizes = size.view(-1)[where // W.shape[1]].double()
        return where[undecided(values, _double_band(opened, sizes, values), dtype)]

    return guess, doubtful


def _none() -> torch.Tensor:
    import torch

    return torch.empty(0, dtype=torch.int64, device="cpu")


def _peaks(W: torch.Tensor) -> torch.Tensor:
    """The largest magnitude of each row, [rows, 1]; NaN if there is one."""
    import torch

    return torch.maximum(W.amax(dim=1, keepdim=True), W.amin(dim=1, keepdim=True).neg_())


def _size(inside: Sequence[Part], W: torch.Tensor, start: int) -> torch.Tensor:
    """[rows, 1]: the magnitudes of everything that is added to a row of a block, summed."""
    size = W.new_zeros(len(W), 1)
    for update, part, offset in inside:
        if update.block.steps:
            place = offset + update.start - start
            magnitude = update.block.magnitude(offset, offset + len(part))
            size[place : place + len(part)].add_(magnitude, alpha=abs(update.weight))
    return size


def _single_band(inside: Sequence[Part], size: torch.Tensor, peaks: torch.Tensor) -> torch.Tensor:
    """[rows, 1]: how far a row's elements, computed in float32, can be from the exact ones.

    In each step a sum of `length` products is scaled and added: at most length + 2 roundings of its magnitude, and one
    of the result; no result in between is larger than the last one and all that was added. The last 4 are for adding
    the band itself, twice, and for its own rounding. What is flushed to zero on the way may be scaled afterwards.
    """
    steps = sum(update.block.steps for update, _, _ in inside)
    length = max((update.block.length for update, _, _ in inside), default=0)
    unit, tiny = 2.0**-24, 2.0**-126
    factor = max((abs(u.block.scale * u.weight) for u, _, _ in inside if u.block.steps), default=0.0)
    flushed = (length + 2) * steps * tiny * max(1.0, factor)
    band = size.mul((length + 2 + steps) * unit).add_(size.sign(), alpha=flushed)
    return band.add_(peaks, alpha=(steps + 4) * unit)


def _double_band(opened: Sequence[_Opened], size: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """How far `values`, computed in float64, can be from the exact ones: section 5 of UNDO.md."""
    import torch

    unit, tiny = 2.0**-53, torch.finfo(torch.float64).tiny
    return (values.abs() + (size + tiny / unit)).mul_((sum(update.terms for update in opened) + 8) * unit)


def _exact(opened: Sequence[_Opened], stored: torch.Tensor, start: int, back: bool = False) -> Exact:
    """Computes single elements of a block, whose first row is `start`, in float64: there or back."""

    def exact(where: torch.Tensor) -> torch.Tensor:
        import torch

        row = where // stored.shape[1]
        column, row = where - row * stored.shape[1], row + start
        # A new tensor starts from zeros.
        values = stored.view(-1)[where].double() if len(stored) else torch.zeros_like(where, dtype=torch.float64)
        for update in opened[::-1] if back else opened:
            if back and update.replaces:
                continue
            weight = -update.weight if back else update.weight
            if update.start <= start and start + len(stored) <= update.stop:
                update.block.apply_at(values, row - update.start, column, weight)
                continue
            inside = ((row >= update.start) & (row < update.stop)).nonzero().view(-1)
            part = values[inside]
            update.block.apply_at(part, row[inside] - update.start, column[inside], weight)
            values[inside] = part
        return values

    return exact


def _at_once(inside: Sequence[Part]) -> int:
    """How many single elements to compute at a time: their factors are gathered for it."""
    gathered = sum(update.block.length * update.block.steps for update, _, _ in inside)
    return max(64, FACTORS_AT_ONCE // max(1, gathered))


def _matrices(tensor: NewTensor) -> tuple[int, int, int]:
    """A tensor as (matrices, rows, columns): one matrix per expert where updates see experts, else one."""
    experts = stacked(tensor)
    shape = tensor.shape[1:] if experts else tensor.shape
    rows = shape[0] if shape else 1
    columns = 1
    for dim in shape[1:]:
        columns *= dim
    return tensor.shape[0] if experts else 1, rows, columns


def _ordered(tensor: NewTensor, matrix: int) -> list[Weighted]:
    """The updates that touch a matrix: replacements, then deltas, then DoRA; in the adapters' order within each."""
    touching = [w for w in tensor.updates if w.item.target.expert in (None, matrix)]
    return sorted(touching, key=lambda w: ROLE_ORDER.index(w.item.update.role))


def _held(weighted: Weighted) -> Weighted:
    """An update of all experts is opened once per expert, so what can not be sliced in its file is read once before."""
    item = weighted.item
    return (
        weighted if item.target.experts is None else Weighted(replace(item, update=item.update.held()), weighted.weight)
    )


def _open(weighted: Weighted, tensor: NewTensor, matrix: int, rows: int, device: str) -> _Opened:
    target, update = weighted.item.target, weighted.item.update
    expert = matrix if target.experts is not None else None
    start, stop = target.rows or (0, rows)
    block = update.open(torch_dtype(compute_dtype(tensor)), expert, device)
    products = sum(name.startswith(("B", "mid")) for name in update.components())
    terms = 2 + products * ((update.scaling and update.scaling.rank) or 0)
    return _Opened(block, start, stop, weighted.weight, update.first_pass, update.role == "replace", terms)


def _inside(opened: Sequence[_Opened], W: torch.Tensor, start: int, stop: int) -> Iterator[Part]:
    """Each update with its rows of a block, and the number of the first of them within the update's region."""
    for update in opened:
        low, high = max(start, update.start), min(stop, update.stop)
        if low < high:
            yield update, W[low - start : high - start], low - update.start


def _height(rows: int, columns: int, tensor: NewTensor) -> int:
    """How many rows make a block."""
    return max(1, min(rows, BLOCK_BYTES * 8 // max(1, columns * DTYPE_BITS[tensor.dtype])))


def _rows(tensor: NewTensor, rows: int, columns: int, device: str = "cpu", height: int = 0) -> Rows:
    height = min(rows, height) or _height(rows, columns, tensor)
    return Rows(tensor.source, columns, height, torch_dtype(compute_dtype(tensor)), device)


def _blocks(rows: int, columns: int, tensor: NewTensor, height: int = 0) -> Iterator[tuple[int, int]]:
    height = height or _height(rows, columns, tensor)
    for start in range(0, rows if columns else 0, height):
        yield start, min(rows, start + height)


def _reach(opened: Sequence[_Opened], start: int, stop: int) -> float:
    """No element of the deltas' sum, in rows start:stop, is larger."""
    return sum(
        abs(update.weight) * float(update.block.magnitude(low - update.start, high - update.start).max())
        for update in opened
        if (low := max(start, update.start)) < (high := min(stop, update.stop))
    )


def _finite(out: torch.Tensor, largest: float, tensor: NewTensor) -> torch.Tensor:
    """A rounded block, which must be finite; so it is where its largest magnitude was, before, in its dtype's range.

    What is computed in float32 is not asked: at the very end of the range it can be on the other side.
    """
    import torch

    if tensor.dtype == "F8_E4M3":  # it has no infinity that would show in `out`
        fits = largest <= E4M3_LIMIT
    else:
        fits = largest < torch.finfo(out.dtype).max or all_finite(out)
    if not fits:
        what = f"{tensor.name} would have NaN or infinity in {tensor.dtype}"
        raise Mismatch(
            Problem("E-NONFINITE", what, tensor.name, "is the scale right? a wider --dtype may hold it", "R-061")
        )
    return out


def _rounding_bound(tensor: NewTensor, largest: float, reach: float) -> float:
    """How far an element can be off after a merge and an unmerge: the rounding of the merged tensor, that of the
    restored one, and the compute dtype's error in both sums (the tolerance of the spec)."""
    import torch

    stored_dtype = tensor.source.dtype if tensor.source else tensor.dtype
    ranks = sum((item.update.scaling.rank or 1) + 8 for item, _ in tensor.updates if item.update.scaling)
    unit = torch.finfo(torch_dtype(compute_dtype(tensor))).eps / 2
    return _half_ulp(largest, stored_dtype) + _half_ulp(largest, tensor.dtype) + 4 * ranks * unit * (largest + reach)


def _half_ulp(largest: float, dtype: str) -> float:
    """Half a unit in the last place of numbers as large as `largest`."""
    import torch

    info = torch.finfo(torch_dtype(dtype))
    return math.ldexp(info.eps, math.frexp(max(largest, info.tiny))[1] - 2)


def write_all(out: BinaryIO, data: memoryview) -> None:
    while data:
        data = data[out.write(data) :]
