"""Quantised tensors of integers: packed in words or one per byte, with a scale and a zero point per group.

One formula covers compressed-tensors, GPTQ, AWQ and LLM.int8: ``(code - zero point) * scale``. The stored row and
column of an element determine its group.
"""

from __future__ import annotations

from collections.abc import Iterator

from streammerge.checkpoint.refs.decoded import DecodedRef
from streammerge.dtypes import itemsize
from streammerge.formats.refs import SourceRef, TensorRef
from streammerge.records import dataclass

AT_ONCE = 1 << 16
"""Number of elements that are decoded together."""
_TEMPORARY = 28
"""Temporary bytes per element during decoding: words, values, and group entries by element; fp64 with a divisor."""
_ROOM = 1 << 14


@dataclass(frozen=True, slots=True)
class Packed:
    """A matrix of integers of a few bits in a file, or one matrix per expert."""

    tensor: TensorRef
    bits: int
    """Bits per integer: 8-bit integers are bytes; others are in little-endian words, number c at bit ``c * bits``."""
    length: int
    """Number of integers along the packed axis; the rest is padding."""
    axis: int = 1
    """The packed axis, along which integers share words: 1 for the columns, 0 for the rows."""
    offset: int = 0
    """The number to add to a stored integer."""
    signed: bool = False
    """Whether bytes are in two's complement."""
    order: tuple[int, ...] = ()
    """Positions of the integers within each word, if not in order (AWQ's columns)."""

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns after unpacking."""
        lines, words = self.tensor.shape[-2:]
        return (self.length, words) if self.axis == 0 else (lines, self.length)


@dataclass(frozen=True, slots=True)
class Groups:
    """Maps the row and column of an element to the row and column of its scale."""

    rows: int = 1
    """Number of rows that share a scale."""
    columns: int = 1
    """Number of columns that share a scale."""
    index: TensorRef | None = None
    """I32: the listed group of each column, or of each row of a transposed tensor; None if not listed."""


@dataclass(frozen=True, slots=True)
class IntegersRef(DecodedRef):
    """A tensor of integers with scales: ``(code - zero point) * scale / divisor``, rounded once to fp32."""

    name: str
    """The tensor's name in a model that is not quantised."""
    shape: tuple[int, ...]
    codes: Packed
    scales: TensorRef
    """The scales [..., rows, columns] of groups, in the orientation of the stored codes."""
    groups: Groups
    title: str
    """The storage format, as `inspect` shows it."""
    zeros: Packed | None = None
    """The zero points, one per scale; None if there are none."""
    divisor: int = 1
    transposed: bool = False
    """Whether the codes are stored [inputs, outputs]."""
    largest_zero: int | None = None
    """The largest zero point that all loaders read alike; None if there is no such limit."""

    @property
    def source(self) -> TensorRef:
        """The codes."""
        return self.codes.tensor

    @property
    def stored_dtype(self) -> str:
        """See `SourceRef`: the dtype of the weights before quantisation."""
        return "F16" if self.scales.dtype == "F16" else "BF16"

    @property
    def parts(self) -> tuple[SourceRef, ...]:
        """See `SourceRef`."""
        zeros = () if self.zeros is None else (self.zeros.tensor,)
        index = () if self.groups.index is None else (self.groups.index,)
        return (self.source, self.scales, *zeros, *index)

    @property
    def scratch_bytes(self) -> int:
        """Bytes that reading takes in addition to the values: words, codes, scales, zero points, the index."""
        scales = index = 0
        if (
            self.groups.index is not None
        ):  # all scales of a row are read, since its columns may be in any group
            scales = self.scales.shape[-2] if self.transposed else self.scales.shape[-1]
            index = 12 * self.shape[-1]
        scales = max(AT_ONCE, scales)
        return _TEMPORARY * AT_ONCE + (itemsize(self.scales.dtype) + 12) * scales + index + _ROOM

    def extents(self, start: int, stop: int) -> Iterator[tuple[TensorRef, int, int]]:
        """See `SourceRef`: the lines of words that hold the elements; if transposed, all lines of a matrix."""
        words = self.source.shape[-1]
        if self.transposed:
            yield self.source, 0, self.source.n_elements
        else:
            columns = max(1, self.shape[-1])
            yield self.source, start // columns * words, -(-stop // columns) * words
