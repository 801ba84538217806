"""How the numbers of quantised weights are stored, and how some rows of them are read back in float32."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

from loratool.tensors import TensorRef

if TYPE_CHECKING:
    import torch

# Microscaling: the scales of 128 x 4 blocks of 32 (or 16) columns each lie together, 32 rows by 4 quarters by 4
# (cuBLAS, "1D block scaling factors layout"; comfy-kitchen stores its checkpoints so).
TALL, QUARTERS, WIDE = 128, 4, 4


class Scheme(Protocol):
    """How the numbers of one weight [rows, columns] are stored."""

    title: ClassVar[str]

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Rows start:stop in float32."""

    @property
    def columns(self) -> int: ...

    @property
    def parts(self) -> Sequence[TensorRef]:
        """The stored tensors, of which the first has the weight's name."""


@dataclass(frozen=True)
class Scaled:
    """Codes [rows, columns] times the scale of the tile they lie in: W = q * scale.

    Scales are [tile rows, tile columns]; the last tiles of a row or column may be cut off. Per tensor is one tile, per
    channel a tile for each row, grouped a tile for so many columns of a row.
    """

    title: ClassVar[str] = "8 bits with scales"
    codes: TensorRef  # [rows, columns]
    scales: TensorRef  # [tile rows, tile columns]
    tile: tuple[int, int]
    whole: tuple[TensorRef, TensorRef]  # both as they are stored, of any number of dimensions
    powers_of_two: bool = False  # scales are to be such (DeepSeek's scale_fmt "ue8m0")

    @property
    def parts(self) -> Sequence[TensorRef]:
        return self.whole

    @property
    def columns(self) -> int:
        return self.codes.shape[1]

    def rows(self, start: int, stop: int) -> torch.Tensor:
        import torch

        q = self.codes.narrow(0, start, stop - start).read(torch.float32)  # [rows, columns]
        first, last = start // self.tile[0], -(-stop // self.tile[0])
        scale = self.scales.narrow(0, first, last - first).read(torch.float32)
        return q.mul_(self.spread(scale, start, stop))

    def spread(self, scale: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """The scale of each element of rows start:stop, given those of the tile rows they lie in; or what broadcasts
        to it."""
        import torch

        height, width = self.tile
        which = torch.arange(start, stop, device="cpu") // height - start // height
        scale = scale[which] if len(scale) > 1 else scale  # [rows, tile columns]
        return scale if scale.shape[1] == 1 else scale.repeat_interleave(width, dim=1)[:, : self.columns]


@dataclass(frozen=True)
class FourBit:
    """bitsandbytes: two 4-bit codes per byte, the first in the upper half, an index into `table`; blocks of the
    flattened weight have one scale each. With `nested` the scales are 8-bit codes themselves, in blocks of their own.
    """

    title: ClassVar[str] = "bitsandbytes 4-bit"
    packed: TensorRef  # [ceil(rows * columns / 2), 1], U8
    absmax: TensorRef  # [blocks], F32; U8 if nested
    table: TensorRef  # [16]
    columns: int
    block: int
    state: TensorRef
    nested: tuple[TensorRef, TensorRef, int, float] | None = None  # absmax, table [256], block, offset

    @property
    def parts(self) -> Sequence[TensorRef]:
        return self.packed, self.absmax, self.table, self.state, *(self.nested[:2] if self.nested else ())

    def rows(self, start: int, stop: int) -> torch.Tensor:
        import torch

        first, last = start * self.columns, stop * self.columns  # of the flattened weight
        pairs = self.packed.reshape(self.packed.numel).narrow(0, first // 2, -(-last // 2) - first // 2).read()
        codes = torch.stack((pairs >> 4, pairs & 15), dim=1).view(-1)[first % 2 :][: last - first]
        scale = self.scale(first // self.block, -(-last // self.block))
        which = torch.arange(first, last, device="cpu") // self.block - first // self.block
        table = self.table.read(torch.float32)
        return (table[codes.int()] * scale[which]).view(stop - start, self.columns)

    def scale(self, first: int, last: int) -> torch.Tensor:
        """The scales of blocks first:last, [last - first]."""
        import torch

        stored = self.absmax.narrow(0, first, last - first).read()
        if self.nested is None:
            return stored.float()
        absmax, table, block, offset = self.nested
        low, high = first // block, -(-last // block)
        outer = absmax.narrow(0, low, high - low).read(torch.float32)
        which = torch.arange(first, last, device="cpu") // block - low
        return table.read(torch.float32)[stored.int()] * outer[which] + offset


@dataclass(frozen=True)
class EightBit:
    """bitsandbytes LLM.int8(): W = q * SCB / 127, one SCB per row."""

    title: ClassVar[str] = "bitsandbytes int8"
    codes: TensorRef  # [rows, columns], I8
    absmax: TensorRef  # [rows]
    more: tuple[TensorRef, ...] = ()  # weight_format

    @property
    def parts(self) -> Sequence[TensorRef]:
        return self.codes, self.absmax, *self.more

    @property
    def columns(self) -> int:
        return self.codes.shape[1]

    def rows(self, start: int, stop: int) -> torch.Tensor:
        import torch

        q = self.codes.narrow(0, start, stop - start).read(torch.float32)  # [rows, columns]
        scale = self.absmax.narrow(0, start, stop - start).read(torch.float32)  # [rows]
        return q.mul_(scale.unsqueeze(1)).mul_(1 / 127)


@dataclass(frozen=True)
class Microscaled:
    """mxfp8 as ComfyUI stores it: fp8 codes times a power of two for each 32 columns of a row.

    The exponents of 128 rows by 4 blocks lie together: a row's is at `(row % 32) * 16 + row // 32 * 4 + block`.
    """

    title: ClassVar[str] = "mxfp8"
    codes: TensorRef  # [rows, columns]
    exponents: TensorRef  # [rows padded to 128, blocks padded to 4], F8_E8M0 or its bytes
    group: int = 32

    @property
    def parts(self) -> Sequence[TensorRef]:
        return self.codes, self.exponents

    @property
    def columns(self) -> int:
        return self.codes.shape[1]

    def rows(self, start: int, stop: int) -> torch.Tensor:
        import torch

        q = self.codes.narrow(0, start, stop - start).read(torch.float32)  # [rows, columns]
        blocks = self.exponents.shape[1]
        first, last = start // TALL, -(-stop // TALL)
        flat = self.exponents.reshape(self.exponents.numel)
        stored = flat.narrow(0, first * TALL * blocks, (last - first) * TALL * blocks).read().view(torch.uint8)
        tiles = stored.view(last - first, blocks // WIDE, TALL // QUARTERS, QUARTERS, WIDE)
        exponents = tiles.permute(0, 3, 2, 1, 4).reshape(-1, blocks)[start - first * TALL :][: stop - start]
        scale = torch.exp2(exponents[:, : self.columns // self.group].float() - 127)  # [rows, blocks]
        return q.mul_(scale.repeat_interleave(self.group, dim=1))


@dataclass(frozen=True)
class Rotated:
    """int8 of weights whose groups of columns were rotated: W = (q * scale) H, with an orthogonal, symmetric H.

    H is the Kronecker power of a 4 x 4 Hadamard matrix, over the square root of its size (ConvRot, as in
    comfy-kitchen). Scales are one a row.
    """

    title: ClassVar[str] = "int8, rotated (ConvRot)"
    codes: TensorRef  # [rows, columns], I8
    scales: TensorRef  # one for each row, or one for all
    group: int

    @property
    def parts(self) -> Sequence[TensorRef]:
        return self.codes, self.scales

    @property
    def columns(self) -> int:
        return self.codes.shape[1]

    def rows(self, start: int, stop: int) -> torch.Tensor:
        import torch

        q = self.codes.narrow(0, start, stop - start).read(torch.float32)  # [rows, columns]
        scales = self.scales.reshape(self.scales.numel)
        scale = scales.narrow(0, start, stop - start) if scales.numel > 1 else scales
        rotated = q.mul_(scale.read(torch.float32).unsqueeze(1)).view(stop - start, -1, self.group)
        return rotated.matmul(hadamard(self.group)).view(stop - start, self.columns)


def hadamard(size: int) -> torch.Tensor:
    """The rotation of a group, [size, size]; `size` is a power of 4."""
    import torch

    four = torch.tensor([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]], dtype=torch.float32, device="cpu")
    whole: torch.Tensor = four
    while len(whole) < size:
        whole = torch.kron(whole, four)
    rotation: torch.Tensor = whole / size**0.5
    return rotation
