"""Tensors put together from blocks of others, or taken out of one: the same matrices in another layout."""

from __future__ import annotations

from dataclasses import dataclass

from streammerge.checkpoint.refs.made import READ_BLOCK, MadeRef, SourceRef, scratch_bytes, stored_dtype
from streammerge.dtypes import itemsize


@dataclass(frozen=True, eq=False, slots=True)
class Block:
    """Some rows and columns of a tensor that is put together, and where their elements lie in another tensor.

    The element in row r and column c of the block is element ``start + r * pitch + c`` of that tensor; `transposed`:
    ``start + c * pitch + r``.
    """

    tensor: SourceRef
    start: int
    pitch: int
    row: int
    """Where the block begins, in rows of the last axis counted over all axes before it."""
    column: int
    rows: int
    columns: int
    transposed: bool = False


@dataclass(frozen=True, eq=False, slots=True)
class BlocksRef(MadeRef):
    """A tensor put together from blocks of others, each element exactly as it is there: experts in another layout."""

    name: str
    dtype: str
    """Of all tensors, or the narrowest of fp32 and fp64 that holds each of theirs."""
    shape: tuple[int, ...]
    blocks: tuple[Block, ...]
    """By row, then by column; each row is whole."""

    @property
    def source(self) -> SourceRef:
        """The tensor of the first block."""
        return self.blocks[0].tensor

    @property
    def path(self) -> str:
        """For messages: the file of the first tensor."""
        return self.source.path

    @property
    def stored_dtype(self) -> str:
        """Of all blocks; where they differ the one that holds them all."""
        found = {stored_dtype(block.tensor) for block in self.blocks}
        return found.pop() if len(found) == 1 else self.dtype

    @property
    def scratch_bytes(self) -> int:
        """What reading it takes beside the elements: lines of a block as they lie, and in the other order."""
        line = max(max(block.pitch, block.columns, block.rows) for block in self.blocks)
        inner = max(scratch_bytes(block.tensor) for block in self.blocks)
        mixed = any(block.tensor.dtype != self.dtype for block in self.blocks)
        # Values of another dtype are widened, and rounded.
        return (32 if mixed else itemsize(self.dtype)) * max(READ_BLOCK, line) + (1 << 12) + inner
