"""NVFP4: E2M1 codes with an FP8 scale per 16 columns and one scale per tensor.

The scale of the tensor divides in compressed-tensors and multiplies in modelopt.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from streammerge.checkpoint.quantized.declarations import Declaration
from streammerge.checkpoint.refs.codebooks import Nvfp4Ref
from streammerge.io.buffer_pool import Bytes
from streammerge.numerics.encoding import (
    F8_GROUP,
    SMALL_GROUP,
    block_peaks,
    nvfp4_whole,
    scales_of_nvfp4,
    store_scales,
    to_f4,
)
from streammerge.records import dataclass
from streammerge.tensors.encoders.base import Encoder, Named, Stored, encodes


@dataclass(frozen=True, slots=True)
class Nvfp4(Encoder):
    """Codes U8 [..., N / 2], scales F8_E4M3 [..., N / group], and an F32 scale for the tensor or per matrix."""

    codes: Stored
    scales: Stored
    whole: Stored
    shape: tuple[int, ...]
    """The shape of the values."""
    group: int
    divides: bool

    @property
    def label(self) -> str:
        """See `Encoder`."""
        return f"NVFP4 in groups of {self.group}"

    @property
    def parts(self) -> tuple[Stored, ...]:
        """See `Encoder`."""
        return self.codes, self.scales, self.whole

    @property
    def needs_peak(self) -> bool:
        """See `Encoder`."""
        return math.prod(self.whole.shape) == 1

    @property
    def unit(self) -> int:
        """See `Encoder`: a row, or a matrix if each matrix has its own F32 scale."""
        return self.shape[-1] if self.needs_peak else self.shape[-2] * self.shape[-1]

    @property
    def unit_nbytes(self) -> tuple[int, ...]:
        """See `Encoder`."""
        return self.unit // 2, self.unit // self.group, 0 if self.needs_peak else 4

    @property
    def kernels(self) -> frozenset[str]:
        """See `Encoder`."""
        return frozenset({F8_GROUP, SMALL_GROUP})

    def encode(
        self, values: NDArray[np.float32], start: int, outs: Sequence[Bytes], peak: float | None
    ) -> None:
        """See `Encoder`."""
        codes, scales, whole = outs
        if self.needs_peak:
            assert peak is not None
            number = nvfp4_whole(peak, divides=self.divides)
            if start == 0:
                whole[:] = store_scales(np.full(1, number, np.float32), "F32")
            self._encode(values, number, codes, scales)
            return
        for i, first in enumerate(range(0, values.size, self.unit)):
            one = values[first : first + self.unit]
            largest = float(block_peaks(one.reshape(1, -1), (1, one.size))[0, 0])
            number = nvfp4_whole(largest, divides=self.divides)
            whole[4 * i : 4 * i + 4] = store_scales(np.full(1, number, np.float32), "F32")
            a, b = first // 2, first // self.group
            self._encode(one, number, codes[a : a + one.size // 2], scales[b : b + one.size // self.group])

    def _encode(self, values: NDArray[np.float32], whole: np.float32, codes: Bytes, scales: Bytes) -> None:
        groups, block = values.reshape(-1, self.group), (1, self.group)
        found = scales_of_nvfp4(block_peaks(groups, block), whole, divides=self.divides)
        scales[:] = store_scales(found.groups, "F8_E4M3")
        to_f4(groups, found.factor, found.divisors, block, codes)


@encodes(Nvfp4Ref)
def _of(ref: Nvfp4Ref, named: Named, declared: Declaration) -> Nvfp4:
    """Return the encoder that stores a tensor in the format of `ref`."""
    codes, scales, whole = (Stored(named(part.name), part.dtype, part.shape) for part in ref.parts)
    return Nvfp4(codes, scales, whole, ref.shape, ref.group, ref.divides)
