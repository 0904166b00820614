"""FP8 E4M3 with one scale for each block of a matrix: DeepSeek's layout, and that of transformers' fused experts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from streammerge.io.buffer_pool import Bytes
from streammerge.numerics.encoding import F8_GROUP, block_peaks, scales_of_f8, store_scales, to_f8
from streammerge.tensors.encoders.base import Encoder, Stored


@dataclass(frozen=True, slots=True)
class Fp8Blocks(Encoder):
    """Codes [..., M, N] and scales [..., ceil(M / height), ceil(N / width)]; a value is its code times its block's scale."""

    name: str
    """Of the codes."""
    shape: tuple[int, ...]
    scale_name: str
    scale_dtype: str = "F32"
    """`F32`, `BF16`, `F16`, `F8_E8M0`, or `U8` with the bits of the last."""
    block: tuple[int, int] = (128, 128)
    """Height and width."""
    powers: bool = False
    """Whether the scales are powers of two, whatever their dtype (``scale_fmt: ue8m0``)."""

    @property
    def label(self) -> str:
        """See `Encoder`."""
        return f"FP8 E4M3 in blocks of {self.block[0]} x {self.block[1]}"

    @property
    def _grid(self) -> tuple[int, int]:
        return -(-self.shape[-2] // self.block[0]), -(-self.shape[-1] // self.block[1])

    @property
    def parts(self) -> tuple[Stored, ...]:
        """See `Encoder`."""
        scales = Stored(self.scale_name, self.scale_dtype, (*self.shape[:-2], *self._grid))
        return Stored(self.name, "F8_E4M3", self.shape), scales

    @property
    def _height(self) -> int:
        """Rows of a unit: those of a block, or a whole matrix where the next one begins inside of a row of blocks."""
        rows = self.shape[-2]
        return self.block[0] if len(self.shape) == 2 or rows % self.block[0] == 0 else rows

    @property
    def unit(self) -> int:
        """See `Encoder`: the elements of a row of blocks."""
        return self._height * self.shape[-1]

    @property
    def unit_nbytes(self) -> tuple[int, ...]:
        """See `Encoder`."""
        scales = -(-self._height // self.block[0]) * self._grid[1]
        return self.unit, scales * self.parts[1].nbytes // max(1, math.prod(self.parts[1].shape))

    @property
    def kernels(self) -> frozenset[str]:
        """See `Encoder`."""
        return frozenset({F8_GROUP})

    def encode(
        self, values: NDArray[np.float32], start: int, outs: Sequence[Bytes], peak: float | None
    ) -> None:
        """See `Encoder`."""
        codes, scales = outs
        per_unit = self.unit_nbytes[1]
        for number, first in enumerate(range(0, values.size, self.unit)):
            rows = values[first : first + self.unit].reshape(-1, self.shape[-1])
            found = scales_of_f8(block_peaks(rows, self.block), self.scale_dtype, powers=self.powers)
            stored = store_scales(found, self.scale_dtype)
            scales[number * per_unit : number * per_unit + stored.size] = stored
            to_f8(rows, found, self.block, codes[first : first + rows.size])
