"""Tensors put together from blocks of others: experts stored one by one read as one tensor, or taken out of one.

No value is changed, so neither the cut nor the order of reading matters to a bit. Blocks that lie here as they lie there
are read to their places; transposed ones a rectangle at a time, by way of a buffer.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streammerge.checkpoint.refs.blocks import Block, BlocksRef
from streammerge.checkpoint.refs.made import READ_BLOCK, SourceRef
from streammerge.dtypes import itemsize
from streammerge.formats.safetensors import TensorRef
from streammerge.io.buffer_pool import Bytes
from streammerge.io.reader import Reader
from streammerge.tensors.adapted import segments
from streammerge.tensors.made import read_to, reads
from streammerge.tensors.scratch import BYTE, F64, Scratch, rounded, widened

_WORTH_READING = 4
"""So many times the bytes that are wanted are rather read in one go than in many."""

Rectangle = tuple[int, int, int, int]
"""First row, end, first column, end: of a block."""


@reads(BlocksRef)
def read_blocks(
    reader: Reader, ref: BlocksRef, start: int, stop: int, target: Bytes, scratch: Scratch
) -> None:
    """Read elements `start` to `stop` of a tensor that is put together, to the beginning of `target`.

    Raises
    ------
    WorldError
        If a file ends early or the device fails.
    """
    width, columns = itemsize(ref.dtype), max(1, ref.shape[-1])
    for row, end, first, last in segments(start, stop, columns):
        begins = (row * columns + first - start) * width
        part = target[begins : begins + (end - row) * (last - first) * width]
        out = part.reshape(end - row, (last - first), width)
        for block, (top, bottom, left, right) in _overlapping(ref, row, end, first, last):
            inside = (top - block.row, bottom - block.row, left - block.column, right - block.column)
            some = out[top - row : bottom - row, left - first : right - first]
            _fill(reader, ref.dtype, block, inside, some, scratch.rest())


def blocks_of(ref: BlocksRef, start: int, stop: int) -> Iterator[tuple[SourceRef, int, int]]:
    """Yield the ranges of elements, each with its tensor, that elements `start` to `stop` lie within."""
    columns = max(1, ref.shape[-1])
    rows = start // columns, -(-stop // columns)
    for block, (top, bottom, left, right) in _overlapping(ref, *rows, 0, columns):
        yield (
            block.tensor,
            *_span(block, (top - block.row, bottom - block.row, left - block.column, right - block.column)),
        )


def _overlapping(
    ref: BlocksRef, row: int, end: int, first: int, last: int
) -> Iterator[tuple[Block, Rectangle]]:
    """Yield the blocks that have a part in a rectangle of the tensor, and that part, in its rows and columns."""
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


def _span(block: Block, inside: Rectangle) -> tuple[int, int]:
    """Return the first element, and the end, of what a part of a block lies within in its tensor."""
    top, bottom, left, right = inside
    lines, window = ((left, right), (top, bottom)) if block.transposed else ((top, bottom), (left, right))
    return (
        block.start + lines[0] * block.pitch + window[0],
        block.start + (lines[1] - 1) * block.pitch + window[1],
    )


def _fill(
    reader: Reader, dtype: str, block: Block, inside: Rectangle, out: NDArray[Any], scratch: Scratch
) -> None:
    """Read a part of a block to `out`, [rows, columns, bytes]."""
    top, bottom, left, right = inside
    tensor = block.tensor
    begins, ends = _span(block, inside)
    n = (bottom - top) * (right - left)
    together = not block.transposed and (bottom - top == 1 or right - left == block.pitch)
    if together and tensor.dtype == dtype and out.flags.c_contiguous:
        read_to(reader, tensor, begins, ends, out.reshape(-1), scratch)
        return
    if block.transposed:
        lines, window = right - left, bottom - top
    else:
        lines, window = bottom - top, right - left
    step = max(1, READ_BLOCK // max(1, block.pitch if _reads_between(tensor, block, window) else window))
    for line in range(0, lines, step):
        some = min(step, lines - line)
        room = scratch.rest()
        values = _lines(reader, block, begins + line * block.pitch, some, window, room)
        if tensor.dtype != dtype:
            values = _as(dtype, values, tensor.dtype)
        if block.transposed:
            out[:, line : line + some] = values.transpose(1, 0, 2)
        else:
            out[line : line + some] = values
    assert n == out.shape[0] * out.shape[1]


def _reads_between(tensor: SourceRef, block: Block, window: int) -> bool:
    """Return whether what lies between the lines of a window is rather read than skipped."""
    return not isinstance(tensor, TensorRef) or window * _WORTH_READING >= block.pitch


def _lines(
    reader: Reader, block: Block, begins: int, lines: int, window: int, scratch: Scratch
) -> NDArray[Any]:
    """Return `window` elements of each of some lines, [lines, window, bytes], as they lie in the block's tensor."""
    tensor, width = block.tensor, itemsize(block.tensor.dtype)
    if _reads_between(tensor, block, window):
        n = (lines - 1) * block.pitch + window
        span = scratch.take((((lines - 1) * block.pitch + max(window, block.pitch)) * width,), BYTE)
        read_to(reader, tensor, begins, begins + n, span[: n * width], scratch.rest())
        return span[: lines * block.pitch * width].reshape(lines, block.pitch, width)[:, :window]
    assert isinstance(tensor, TensorRef)
    values: NDArray[Any] = scratch.take((lines, window * width), BYTE)
    offset = tensor.offset + begins * width
    reader.read_parts(
        tensor.path,
        ((offset + line * block.pitch * width, [values[line].data]) for line in range(lines)),
    )
    return values.reshape(lines, window, width)


def _as(dtype: str, values: NDArray[Any], stored: str) -> NDArray[Any]:
    """Return values in a wider dtype, exactly."""
    wide = widened(np.ascontiguousarray(values).reshape(-1), stored, F64)
    return rounded(wide, dtype).reshape(*values.shape[:2], -1)
