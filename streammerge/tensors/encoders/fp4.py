"""MXFP4: E2M1 codes, two to a byte, with a power of two for each 32 of a row; of gpt-oss, rows are columns of the tensor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

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
from streammerge.tensors.encoders.base import Encoder, Named, Stored, encodes

_EXPONENT = 2
"""That of the largest number of E2M1."""
_AT_ONCE = 1 << 17
"""Elements that are turned together."""


@dataclass(frozen=True, slots=True)
class Mxfp4(Encoder):
    """Codes of rows of some columns, and one exponent for each group of a row."""

    codes: Stored
    scales: Stored
    matrix: tuple[int, int]
    """Rows and columns as they are stored."""
    group: int
    turned: bool = False
    """Whether rows and columns are exchanged in the tensor: a matrix is then encoded as a whole."""

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
        """See `Encoder`: a row, or a matrix that is turned."""
        return math.prod(self.matrix) if self.turned else self.matrix[1]

    @property
    def unit_nbytes(self) -> tuple[int, ...]:
        """See `Encoder`."""
        return self.unit // 2, self.unit // self.group

    @property
    def scratch_bytes(self) -> int:
        """See `Encoder`: rows that are turned."""
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
    """Return what stores a tensor as `ref` is stored."""
    codes, scales = (
        Stored(named(part.name), part.dtype, part.shape) for part in (ref.source, ref.scales.tensor)
    )
    return Mxfp4(codes, scales, ref.matrices[1:], ref.scales.extent[2], ref.encoding.turned)
