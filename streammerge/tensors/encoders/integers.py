"""Symmetric integers of compressed-tensors, one per byte or packed in words; a value is integer * group scale."""

from __future__ import annotations

import math

import numpy as np

from streammerge.checkpoint.quantized.declarations import Declaration
from streammerge.checkpoint.refs.integers import IntegersRef
from streammerge.io.buffer_pool import Bytes
from streammerge.numerics.encoding import (
    F8_GROUP,
    SMALL_GROUP,
    Values,
    pack,
    scales_of_integers,
    to_integers,
)
from streammerge.records import dataclass
from streammerge.tensors.encoders.base import Named, NotWrittenError, Stored, encodes
from streammerge.tensors.encoders.grid import Gridded

_AT_ONCE = 1 << 17
"""Number of elements whose integers are held before they are packed."""
_WORD = 32


@dataclass(frozen=True, slots=True)
class Integers(Gridded):
    """Encodes a tensor as integers of some bits; `packed`: unsigned and dense along a row, which fills whole words."""

    bits: int = 8
    packed: bool = False

    @property
    def label(self) -> str:
        """See `Encoder`."""
        served = "one scale" if self.needs_peak else f"groups of {self.block[0]} x {self.block[1]}"
        return f"INT{self.bits}{', packed' if self.packed else ''}, {served}"

    @property
    def _words(self) -> int:
        return -(-self.columns * self.bits // _WORD)

    @property
    def codes(self) -> Stored:
        """See `Gridded`."""
        if self.packed:
            return Stored(self.name, "I32", (*self.shape[:-1], self._words))
        return Stored(self.name, "I8", self.shape)

    @property
    def row_nbytes(self) -> int:
        """See `Gridded`."""
        return self._words * _WORD // 8 if self.packed else self.columns

    @property
    def scratch_bytes(self) -> int:
        """See `Encoder`: integers before they are packed, and their bits."""
        return (4 + self.bits) * min(math.prod(self.shape), max(_AT_ONCE, self.columns)) if self.packed else 0

    @property
    def kernels(self) -> frozenset[str]:
        """See `Encoder`."""
        return frozenset({F8_GROUP, SMALL_GROUP})

    def scales_of(self, peaks: Values) -> Values:
        """See `Gridded`."""
        return scales_of_integers(peaks, self.bits, self.scales.dtype)

    def write(self, rows: Values, scales: Values, block: tuple[int, int], out: Bytes) -> None:
        """See `Gridded`."""
        lines = out.reshape(len(rows), -1)
        if not self.packed:
            to_integers(rows, scales, block, self.bits, lines.view(np.int8))
            return
        of_rows = np.repeat(scales, block[0], axis=0)
        codes = np.empty((max(1, min(len(rows), _AT_ONCE // self.columns)), self.columns), np.int8)
        for first in range(0, len(rows), len(codes)):
            some = codes[: len(rows) - first]
            last = first + len(some)
            to_integers(rows[first:last], of_rows[first:last], (1, block[1]), self.bits, some)
            pack(some, self.bits, lines[first:last])


@encodes(IntegersRef)
def _of(ref: IntegersRef, named: Named, declared: Declaration) -> Integers:
    """Return the encoder that stores a tensor in the format of `ref`."""
    if ref.zeros is not None:
        raise NotWrittenError(f"{ref.title}, asymmetric")
    if ref.groups.index is not None:
        raise NotWrittenError(f"{ref.title}, with a listed group for each column")
    plain = ref.codes.signed and not ref.codes.offset and ref.codes.tensor.dtype == "I8"
    dense = ref.codes.axis == 1 and not ref.codes.order and ref.codes.tensor.dtype == "I32"
    if ref.transposed or ref.divisor != 1 or not (plain or dense):
        raise NotWrittenError(ref.title)
    whole = ref.scales.n_elements == 1
    if ref.codes.bits < 2:
        raise NotWrittenError(ref.title)
    scales = Stored(named(ref.scales.name), ref.scales.dtype, ref.scales.shape)
    block = ref.groups.rows, ref.groups.columns
    return Integers(named(ref.source.name), ref.shape, scales, block, whole, ref.codes.bits, dense)
