"""Tensors assembled from blocks of other tensors, or cut from one: the same matrices in a different layout."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator

from streammerge.dtypes import itemsize
from streammerge.formats.refs import READ_BLOCK, MadeRef, SourceRef, TensorRef
from streammerge.records import dataclass

Rectangle = tuple[int, int, int, int]
"""A block's first row, end row, first column and end column; the ends are exclusive."""


@dataclass(frozen=True, eq=False, slots=True)
class Block:
    """Some rows and columns of an assembled tensor, and the position of their elements in the source tensor.

    The element in row r and column c of the block is element ``start + r * pitch + c`` of the source tensor, or
    ``start + c * pitch + r`` if `transposed`.
    """

    tensor: SourceRef
    start: int
    pitch: int
    row: int
    """The block's first row; rows run along the last axis and are counted over all axes before it."""
    column: int
    rows: int
    columns: int
    transposed: bool = False


@dataclass(frozen=True, eq=False, slots=True)
class BlocksRef(MadeRef):
    """A tensor assembled from blocks of other tensors with unchanged values: experts in a different layout."""

    name: str
    dtype: str
    """The dtype of all source tensors, or else the narrower of fp32 and fp64 that holds all of their dtypes."""
    shape: tuple[int, ...]
    blocks: tuple[Block, ...]
    """The blocks, sorted by row, then by column; they cover each row completely."""

    @property
    def source(self) -> SourceRef:
        """The source tensor of the first block."""
        return self.blocks[0].tensor

    @property
    def parts(self) -> tuple[SourceRef, ...]:
        """See `SourceRef`."""
        return tuple(block.tensor for block in self.blocks)

    @property
    def n_blocks(self) -> int:
        """See `SourceRef`."""
        return len(self.blocks)

    def extents(self, start: int, stop: int) -> Iterator[tuple[TensorRef, int, int]]:
        """See `SourceRef`."""
        columns = max(1, self.shape[-1])
        rows = start // columns, -(-stop // columns)
        for block, (top, bottom, left, right) in overlapping(self, *rows, 0, columns):
            inside = top - block.row, bottom - block.row, left - block.column, right - block.column
            yield from block.tensor.extents(*span_of(block, inside))

    @property
    def stored_dtype(self) -> str:
        """The stored dtype of all blocks; if they differ, the dtype that holds them all."""
        found = {block.tensor.stored_dtype for block in self.blocks}
        return found.pop() if len(found) == 1 else self.dtype

    @property
    def scratch_bytes(self) -> int:
        """Bytes that reading takes in addition to the elements: lines of a block as stored, and transposed."""
        line = max(max(block.pitch, block.columns, block.rows) for block in self.blocks)
        inner = max(block.tensor.scratch_bytes for block in self.blocks)
        mixed = any(block.tensor.dtype != self.dtype for block in self.blocks)
        # Values of a different dtype are widened, and rounded.
        return (32 if mixed else itemsize(self.dtype)) * max(READ_BLOCK, line) + (1 << 12) + inner


def overlapping(
    ref: BlocksRef, row: int, end: int, first: int, last: int
) -> Iterator[tuple[Block, Rectangle]]:
    """Yield the blocks that overlap a rectangle, each with the overlap in rows and columns of the tensor."""
    at = bisect_right(ref.blocks, row, key=lambda block: block.row)
    while at and ref.blocks[at - 1].row + ref.blocks[at - 1].rows > row:
        at -= 1
    for block in ref.blocks[at:]:
        if block.row >= end:
            return
        top, bottom = max(row, block.row), min(end, block.row + block.rows)
        left, right = max(first, block.column), min(last, block.column + block.columns)
        if top < bottom and left < right:
            yield block, (top, bottom, left, right)


def span_of(block: Block, inside: Rectangle) -> tuple[int, int]:
    """Return the range of elements (first, end) of the source tensor that contains a part of a block."""
    top, bottom, left, right = inside
    lines, window = ((left, right), (top, bottom)) if block.transposed else ((top, bottom), (left, right))
    return (
        block.start + lines[0] * block.pitch + window[0],
        block.start + (lines[1] - 1) * block.pitch + window[1],
    )
