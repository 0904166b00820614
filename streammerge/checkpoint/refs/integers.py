"""Quantised tensors of integers: packed in words or one to a byte, with scales and zero points for groups of them.

One description covers compressed-tensors, GPTQ, AWQ and LLM.int8: ``(code - zero point) * scale``, the group of an element
given by its row and its column as they are stored.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from streammerge.dtypes import itemsize
from streammerge.formats.refs import MadeRef, SourceRef, TensorRef

AT_ONCE = 1 << 16
"""Elements that are decoded together."""
_TEMPORARY = 28
"""Bytes an element takes while it is decoded: words, values, what groups have by element; with a divisor in fp64."""
_ROOM = 1 << 14


@dataclass(frozen=True, slots=True)
class Packed:
    """A matrix of integers of a few bits in a file, or one matrix for each expert."""

    tensor: TensorRef
    bits: int
    """Integers of 8 bits lie in bytes, others in words, little endian: integer c at bit ``c * bits`` of its line."""
    length: int
    """Integers along the axis that they are packed along; what lies behind them is padding."""
    axis: int = 1
    """Along which they share words: 1, the columns, or 0, the rows."""
    offset: int = 0
    """What is added to a stored integer."""
    signed: bool = False
    """Whether a byte is a two's complement."""
    order: tuple[int, ...] = ()
    """Where the integers of each word lie in it, if not in order: AWQ's columns."""

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns once they are unpacked."""
        lines, words = self.tensor.shape[-2:]
        return (self.length, words) if self.axis == 0 else (lines, self.length)


@dataclass(frozen=True, slots=True)
class Groups:
    """Which scale an element has: the row and the column of its own row and column."""

    rows: int = 1
    """Rows that share one."""
    columns: int = 1
    """Columns that share one."""
    index: TensorRef | None = None
    """I32: the group of each column, or of each row of a transposed tensor, where that is listed."""


@dataclass(frozen=True, slots=True)
class IntegersRef(MadeRef):
    """A tensor of integers with scales: ``(code - zero point) * scale / divisor``, rounded once to fp32."""

    name: str
    """That of the tensor in a model that is not quantised."""
    shape: tuple[int, ...]
    codes: Packed
    scales: TensorRef
    """[..., rows, columns] of groups, as the codes are stored."""
    groups: Groups
    title: str
    """How it is stored, as `inspect` shows it."""
    zeros: Packed | None = None
    """One for each scale."""
    divisor: int = 1
    transposed: bool = False
    """Whether the codes are stored [inputs, outputs]."""
    largest_zero: int | None = None
    """A zero point that loaders read differently is above this one."""

    @property
    def source(self) -> TensorRef:
        """The codes."""
        return self.codes.tensor

    @property
    def dtype(self) -> str:
        """Of the values."""
        return "F32"

    @property
    def path(self) -> str:
        """The file of the codes."""
        return self.source.path

    @property
    def stored_dtype(self) -> str:
        """See `SourceRef`: that of the weights which it was quantised from."""
        return "F16" if self.scales.dtype == "F16" else "BF16"

    @property
    def stored_format(self) -> str:
        """See `SourceRef`."""
        return self.title

    @property
    def parts(self) -> tuple[SourceRef, ...]:
        """See `SourceRef`."""
        zeros = () if self.zeros is None else (self.zeros.tensor,)
        index = () if self.groups.index is None else (self.groups.index,)
        return (self.source, self.scales, *zeros, *index)

    @property
    def shown(self) -> Mapping[str, Any]:
        """See `SourceRef`."""
        return {"stored_as": self.title}

    @property
    def stored_shape(self) -> tuple[int, int]:
        """Rows and columns of a matrix as it is stored."""
        rows, columns = self.shape[-2:]
        return (columns, rows) if self.transposed else (rows, columns)

    @property
    def scratch_bytes(self) -> int:
        """What reading takes in addition to the values: words, codes, scales and zero points by element, the index."""
        rows, columns = self.stored_shape
        index = 0 if self.groups.index is None else 12 * max(rows, columns)
        # The scales of a row whose columns are not in order are read whole.
        wide = self.scales.shape[-1] if self.scales.shape else 1
        scales = (itemsize(self.scales.dtype) + 12) * max(AT_ONCE, wide)
        return _TEMPORARY * AT_ONCE + scales + index + _ROOM

    def extents(self, start: int, stop: int) -> Iterator[tuple[TensorRef, int, int]]:
        """See `SourceRef`: the lines of words that hold the elements; of a transposed tensor, all of a matrix's."""
        words = self.source.shape[-1]
        if self.transposed:
            yield self.source, 0, self.source.n_elements
        else:
            columns = max(1, self.shape[-1])
            yield self.source, start // columns * words, -(-stop // columns) * words
