"""MXFP4: E2M1 codes, two per byte, with a power of two per 32 elements of a row; gpt-oss stores matrices transposed."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from streammerge.checkpoint.quantized.declarations import Declaration
from streammerge.checkpoint.refs.quantized import QuantizedRef
from streammerge.io.buffer_pool import Bytes
from streammerge.numerics.encoding import (
    F8_GROUP,
    SMALL_GROUP,
    block_peaks,
    scales_of_mx,
    store_scales,
    to_f4,
)
from streammerge.records import dataclass
from streammerge.tensors.encoders.base import Encoder, Named, Stored, encodes

_EXPONENT = 2
"""The exponent of the largest E2M1 number."""
_AT_ONCE = 1 << 17
"""Number of elements that are transposed together."""


@dataclass(frozen=True, slots=True)
class Mxfp4(Encoder):
    """Encodes rows as codes, with one exponent per group of a row."""

    codes: Stored
    scales: Stored
    matrix: tuple[int, int]
    """Rows and columns of a stored matrix."""
    group: int
    turned: bool = False
    """Whether the tensor has rows and columns exchanged; a matrix is then encoded as a whole."""

    @property
    def label(self) -> str:
        """See `Encoder`."""
        return f"MXFP4 in groups of {self.group}"

    @property
    def parts(self) -> tuple[Stored, ...]:
        """See `Encoder`."""
        return self.codes, self.scales

    @property
    def unit(self) -> int:
        """See `Encoder`: a row, or a whole matrix if `turned`."""
        return math.prod(self.matrix) if self.turned else self.matrix[1]

    @property
    def unit_nbytes(self) -> tuple[int, ...]:
        """See `Encoder`."""
        return self.unit // 2, self.unit // self.group

    @property
    def scratch_bytes(self) -> int:
        """See `Encoder`: transposed rows."""
        return 4 * min(self.unit, max(_AT_ONCE, self.matrix[1])) if self.turned else 0

    @property
    def kernels(self) -> frozenset[str]:
        """See `Encoder`."""
        return frozenset({F8_GROUP, SMALL_GROUP})

    def encode(
        self, values: NDArray[np.float32], start: int, outs: Sequence[Bytes], peak: float | None
    ) -> None:
        """See `Encoder`."""
        codes, scales = outs
        if not self.turned:
            self._encode(values, codes, scales)
            return
        rows, columns = self.matrix
        step = max(1, _AT_ONCE // columns)
        for begins in range(0, values.size, self.unit):
            matrix = values[begins : begins + self.unit].reshape(columns, rows)
            for first in range(0, rows, step):
                some = np.ascontiguousarray(matrix[:, first : first + step].T).reshape(-1)
                at = begins + first * columns
                ends = at + some.size
                self._encode(some, codes[at // 2 : ends // 2], scales[at // self.group : ends // self.group])

    def _encode(self, values: NDArray[np.float32], codes: Bytes, scales: Bytes) -> None:
        groups, block = values.reshape(-1, self.group), (1, self.group)
        found = scales_of_mx(block_peaks(groups, block), _EXPONENT)
        scales[:] = store_scales(found, "F8_E8M0")
        to_f4(groups, np.float32(1.0), found, block, codes)


@encodes(QuantizedRef, "F4_E2M1")
def _of(ref: QuantizedRef, named: Named, declared: Declaration) -> Mxfp4:
    """Return the encoder that stores a tensor in the format of `ref`."""
    codes, scales = (
        Stored(named(part.name), part.dtype, part.shape) for part in (ref.source, ref.scales.tensor)
    )
    return Mxfp4(codes, scales, ref.matrices[1:], ref.scales.extent[2], ref.encoding.turned)
