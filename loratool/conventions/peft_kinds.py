"""PEFT's other low-rank methods, as updates: LoHa, LoKr and AdaLoRA.

Their factors are those of LyCORIS and of the AdaLoRA paper (arXiv:2303.10512), with PEFT's own scale: alpha / r, with
`r` and `alpha` of the config, also for a LoKr whose two factors are whole (LyCORIS uses 1 there), and
lora_alpha / (init_r + 1e-5) for AdaLoRA. A factor [rank, in * kernel] of a convolution is cut to the base's shape.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loratool.errors import InvalidFile, Mismatch, Problem
from loratool.tensors import Computed, Shape, TensorRef, torch_dtype
from loratool.updates import Loha, Lokr, Lora, Scaling

if TYPE_CHECKING:
    import torch

KINDS = {"hada_": "LOHA", "lokr_": "LOKR", "ia3_l": "IA3"}
_ADALORA = {"lora_A", "lora_B", "lora_E", "ranknum"}
RANKNUM = 1e-5  # AdaLoRA divides by its number of ranks plus this


def kind_of(part: str) -> str:
    """The `peft_type` whose parts are called so."""
    return "ADALORA" if part in _ADALORA else KINDS.get(part[:5], "LORA")


@dataclass(frozen=True)
class Saved:
    """The parts of one module by their saved names, and the base's tensor where it is known."""

    name: str
    parts: Mapping[str, TensorRef]
    stored: TensorRef | None
    where: str

    def take(self, *names: str) -> list[TensorRef]:
        """These parts and no others, none of them empty. Raises InvalidFile."""
        absent = [name for name in names if name not in self.parts]
        if absent or len(names) < len(self.parts):
            extra = [name for name in self.parts if name not in names]
            what = f"has {', '.join(extra)} as well" if extra else f"lacks {', '.join(absent)}"
            raise InvalidFile(Problem("E-COMPONENTS", f"{self.name} with {', '.join(self.parts)} {what}", self.where))
        refs = [self.parts[name] for name in names]
        if any(not ref.numel or len(ref.shape) < 2 for ref in refs):
            raise self.bad("nothing can be made of that")
        return refs

    def bad(self, why: str) -> InvalidFile:
        shapes = ", ".join(f"{name} {list(ref.shape)}" for name, ref in self.parts.items())
        return InvalidFile(Problem("E-SHAPE", f"{self.name}: {shapes}: {why}", self.where))

    def kernel(self) -> Shape:
        """The kernel of the base's convolution; () for a matrix, or where the base is not known."""
        return () if self.stored is None else self.stored.shape[2:]

    def unfolded(self, factor: TensorRef, columns: int) -> TensorRef:
        """A right factor [rank, columns * kernel] as [rank, columns, kernel...]."""
        shape = (factor.shape[0], columns, *self.kernel())
        if len(factor.shape) != 2 or math.prod(shape) != factor.numel:
            stored = "" if self.stored is None else f", the base has {list(self.stored.shape)}"
            what = f"{self.name}: a factor is {list(factor.shape)}{stored}"
            raise Mismatch(Problem("E-SHAPE", what, self.where, "is this the adapter's base?"))
        return factor.reshape(*shape)

    def core(self, core: TensorRef) -> TensorRef:
        """A Tucker core [rank, rank, kernel...]; PEFT gives that of a 1-d convolution a fourth dimension of 1."""
        if len(core.shape) != 4:
            raise self.bad("a core has four dimensions")
        return core.reshape(*core.shape[:3]) if len(self.kernel()) == 1 and core.shape[3] == 1 else core


def loha(saved: Saved, scaling: Callable[[int], Scaling]) -> tuple[Loha, Shape]:
    """(w1_a @ w1_b) * (w2_a @ w2_b), w_a [out, rank], w_b [rank, in * kernel]; with cores t, w_a is [rank, out]."""
    tucker = any("_t" in part for part in saved.parts)
    cores = ("hada_t1", "hada_t2") if tucker else ()
    B1, A1, B2, A2, *mids = saved.take("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", *cores)
    if any(len(ref.shape) != 2 for ref in (A1, B1, A2, B2)):
        raise saved.bad("factors are matrices")
    if tucker:
        mid1, mid2 = (saved.core(mid) for mid in mids)
        shape: Shape = (B1.shape[1], A1.shape[1], *mid1.shape[2:])
        return Loha(A1, B1.T, A2, B2.T, scaling(B1.shape[0]), mid1, mid2), shape
    columns = A1.shape[1] // math.prod(saved.kernel())
    A1, A2 = saved.unfolded(A1, columns), saved.unfolded(A2, columns)
    return Loha(A1, B1, A2, B2, scaling(B1.shape[1])), (B1.shape[0], *A1.shape[1:])


def lokr(saved: Saved, scaling: Callable[[int | None], Scaling]) -> tuple[list[Lokr], Shape]:
    """kron(w1, w2), either of them whole or of low rank: w1 [a, c] or w1_a [a, rank] @ w1_b [rank, c]; w2 likewise.

    Several updates for the one case in which PEFT's product is another one, see `_swapped`.
    """
    left, right = _halves(saved, "1"), _halves(saved, "2")
    cores = ("lokr_t2",) if "lokr_t2" in saved.parts else ()
    refs = dict(zip((*left, *right, *cores), saved.take(*left, *right, *cores), strict=True))
    w1, B1, A1 = refs.get("lokr_w1"), refs.get("lokr_w1_a"), refs.get("lokr_w1_b")
    w2, B2, A2 = refs.get("lokr_w2"), refs.get("lokr_w2_a"), refs.get("lokr_w2_b")
    if any(ref is not None and len(ref.shape) != 2 for ref in (w1, B1, A1, B2, A2)):
        raise saved.bad("factors are matrices")
    a, c = (ref.shape[i] for i, ref in enumerate((w1 or B1, w1 or A1)) if ref is not None)
    rank = B1.shape[1] if B1 is not None else None
    if w2 is not None:
        scale, shape = scaling(rank), (a * w2.shape[0], c * w2.shape[1], *w2.shape[2:])
        if len(w2.shape) == 3:
            return list(_swapped(w2, w1, A1, B1, scale)), shape
        return [Lokr(scale, w1, A1, B1, w2)], shape
    assert A2 is not None and B2 is not None, "what is not whole has both its factors"
    if cores:
        mid = saved.core(refs["lokr_t2"])
        scale, shape = scaling(B2.shape[0]), (a * B2.shape[1], c * A2.shape[1], *mid.shape[2:])
        return [Lokr(scale, w1, A1, B1, None, A2, B2.T, mid)], shape
    d = A2.shape[1] // math.prod(saved.kernel())
    A2 = saved.unfolded(A2, d)
    return [Lokr(scaling(B2.shape[1]), w1, A1, B1, None, A2, B2)], (a * B2.shape[0], c * d, *A2.shape[2:])


def _halves(saved: Saved, number: str) -> tuple[str, ...]:
    """The names of a LoKr factor's parts: it is whole, or a product of two."""
    whole = f"lokr_w{number}"
    return (whole,) if whole in saved.parts else (f"{whole}_a", f"{whole}_b")


def _swapped(
    w2: TensorRef, w1: TensorRef | None, A1: TensorRef | None, B1: TensorRef | None, scale: Scaling
) -> Iterator[Lokr]:
    """PEFT's product for a 1-d convolution's whole w2 [b, d, kernel], which is kron(w2, w1), position by position.

    torch.kron adds missing dimensions in front, so that w1's [a, c] meet d and the kernel (peft/tuners/lokr/layer.py,
    make_kron); the forward does the same, so this is what was trained. One update per kernel position:
    kron(w2[:, :, k], w1 at position k and 0 elsewhere).
    """
    for position in range(w2.shape[2]):
        left = w2.narrow(2, position, 1).reshape(*w2.shape[:2])  # [b, d]
        if w1 is not None:
            yield Lokr(scale, left, w2=_at(w1, position, w2.shape[2]))
        else:
            assert A1 is not None
            yield Lokr(scale, left, B2=B1, A2=_at(A1, position, w2.shape[2]))


def _at(matrix: TensorRef, position: int, size: int) -> TensorRef:
    """[rows, columns] as one position of a kernel, [rows, columns, size], with 0 at the others."""

    def make() -> torch.Tensor:
        values = matrix.read()
        kernel = values.new_zeros(*values.shape, size)
        kernel[..., position] = values
        return kernel

    shape = (*matrix.shape, size)
    return TensorRef(matrix.name, matrix.dtype, shape, Computed(make), shape)


def adalora(saved: Saved, scaling: Callable[[int], Scaling]) -> Lora | None:
    """B @ (A * E): A [rank, in * kernel], E [rank, 1], B [out, rank]; None where training has pruned every rank."""
    parts = {name: ref for name, ref in saved.parts.items() if name != "ranknum"}
    if parts.keys() == {"lora_A", "lora_B", "lora_E"} and not any(ref.numel for ref in parts.values()):
        return None
    A, B, E = Saved(saved.name, parts, saved.stored, saved.where).take("lora_A", "lora_B", "lora_E")
    if len(A.shape) != 2 or len(B.shape) != 2 or E.shape != (A.shape[0], 1) or B.shape[1] != A.shape[0]:
        raise saved.bad("they must be [rank, in], [out, rank] and [rank, 1]")
    A = saved.unfolded(_times(A, E), A.shape[1] // math.prod(saved.kernel()))
    return Lora(A, B, scaling(B.shape[1]))


def _times(A: TensorRef, E: TensorRef) -> TensorRef:
    """A * E in the next wider dtype, where the product is exact: there is no rounding before the one of the merge."""
    wide = "F32" if A.dtype in ("F16", "BF16") else "F64"

    def make() -> torch.Tensor:
        return A.read(torch_dtype(wide)) * E.read(torch_dtype(wide))

    return TensorRef(A.name, wide, A.shape, Computed(make), A.shape)
