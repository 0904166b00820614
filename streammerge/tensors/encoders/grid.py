"""The common part of formats with one scale per block of a matrix, independent of their codes."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from streammerge.dtypes import itemsize
from streammerge.io.buffer_pool import Bytes
from streammerge.numerics.encoding import Values, block_peaks, store_scales
from streammerge.records import dataclass
from streammerge.tensors.encoders.base import Encoder, Stored


@dataclass(frozen=True, slots=True)
class Gridded(Encoder):
    """Encodes a tensor [..., M, N]; a value is its code times the scale of its block. Edge blocks may be smaller."""

    name: str
    """The name of the tensor of codes."""
    shape: tuple[int, ...]
    """The shape of the values."""
    scales: Stored
    block: tuple[int, int]
    """Numbers of rows and columns that share a scale."""
    needs_peak: bool = False
    """Whether one scale serves the whole tensor."""

    @property
    @abstractmethod
    def codes(self) -> Stored:
        """The tensor of the codes."""

    @property
    @abstractmethod
    def row_nbytes(self) -> int:
        """Bytes of the codes of one row."""

    @abstractmethod
    def scales_of(self, peaks: Values) -> Values:
        """Return the scale of each block from its largest magnitude, rounded to the dtype of the scales."""

    @abstractmethod
    def write(self, rows: Values, scales: Values, block: tuple[int, int], out: Bytes) -> None:
        """Write the codes of rows, of shape (n, columns), whose blocks have these scales."""

    @property
    def parts(self) -> tuple[Stored, ...]:
        """See `Encoder`."""
        return self.codes, self.scales

    @property
    def columns(self) -> int:
        """Number of elements of a row."""
        return self.shape[-1] if self.shape else 1

    @property
    def _height(self) -> int:
        """Rows of a unit: those of a block, or of a whole matrix if its rows do not divide into whole blocks."""
        rows = self.shape[-2] if len(self.shape) > 1 else 1
        if self.needs_peak:
            return 1
        return self.block[0] if len(self.shape) <= 2 or rows % self.block[0] == 0 else rows

    @property
    def unit(self) -> int:
        """See `Encoder`: the elements of a row of blocks."""
        return max(1, self._height * self.columns)

    @property
    def unit_nbytes(self) -> tuple[int, ...]:
        """See `Encoder`."""
        grid = -(-self._height // self.block[0]) * -(-self.columns // self.block[1])
        codes = max(1, self._height) * self.row_nbytes
        return codes, 0 if self.needs_peak else grid * itemsize(self.scales.dtype)

    def encode(
        self, values: NDArray[np.float32], start: int, outs: Sequence[Bytes], peak: float | None
    ) -> None:
        """See `Encoder`."""
        codes, scales = outs
        if self.needs_peak:
            assert peak is not None
            whole = self.scales_of(np.full((1, 1), peak, np.float32))
            if start == 0:
                scales[:] = store_scales(whole, self.scales.dtype)
            rows = values.reshape(-1, self.columns)
            self.write(rows, whole, (max(1, len(rows)), self.columns), codes)
            return
        of_codes, of_scales = self.unit_nbytes
        whole_blocks = self._height == self.block[0]
        step = values.size if whole_blocks else self.unit
        for first in range(0, values.size, step):
            rows = values[first : first + step].reshape(-1, self.columns)
            found = self.scales_of(block_peaks(rows, self.block))
            stored = store_scales(found, self.scales.dtype)
            number = first // self.unit
            scales[number * of_scales : number * of_scales + stored.size] = stored
            begins = number * of_codes
            self.write(rows, found, self.block, codes[begins : begins + len(rows) * self.row_nbytes])
