"""Read tensors assembled from blocks of other tensors: experts stored one by one as one tensor, or the reverse.

No value is changed, so neither the cut nor the order of reading affects the bits. Blocks with the same layout as their
source are read directly to their target; transposed blocks are read through a buffer, one rectangle at a time.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from streammerge.checkpoint.refs.blocks import Block, BlocksRef, Rectangle, overlapping, span_of
from streammerge.dtypes import itemsize
from streammerge.formats.readers import reads
from streammerge.formats.refs import READ_BLOCK, SourceRef
from streammerge.io.buffer_pool import Bytes
from streammerge.io.reader import Reader
from streammerge.io.scratch import Scratch
from streammerge.numerics.casts import BYTE, F64, rounded, widened
from streammerge.tensors.adapted import segments

_WORTH_READING = 4
"""A contiguous range is read at once if it is at most this many times the bytes needed."""


@reads(BlocksRef)
def read_blocks(
    reader: Reader, ref: BlocksRef, start: int, stop: int, target: Bytes, scratch: Scratch
) -> None:
    """Read elements `start` to `stop` of an assembled tensor to the beginning of `target`.

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
        for block, (top, bottom, left, right) in overlapping(ref, row, end, first, last):
            inside = (top - block.row, bottom - block.row, left - block.column, right - block.column)
            some = out[top - row : bottom - row, left - first : right - first]
            _fill(reader, ref.dtype, block, inside, some, scratch.rest())


def _fill(
    reader: Reader, dtype: str, block: Block, inside: Rectangle, out: NDArray[Any], scratch: Scratch
) -> None:
    """Read a part of a block to `out`, [rows, columns, bytes]."""
    top, bottom, left, right = inside
    tensor = block.tensor
    begins, ends = span_of(block, inside)
    n = (bottom - top) * (right - left)
    together = not block.transposed and (bottom - top == 1 or right - left == block.pitch)
    if together and tensor.dtype == dtype and out.flags.c_contiguous:
        tensor.read(reader, begins, ends, out.reshape(-1), scratch)
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
    """Return whether the gaps between the lines of a window are read rather than skipped."""
    return tensor.plain is None or window * _WORTH_READING >= block.pitch


def _lines(
    reader: Reader, block: Block, begins: int, lines: int, window: int, scratch: Scratch
) -> NDArray[Any]:
    """Return `window` elements of each of some lines of the block's source tensor, [lines, window, bytes]."""
    tensor, width = block.tensor, itemsize(block.tensor.dtype)
    if _reads_between(tensor, block, window):
        n = (lines - 1) * block.pitch + window
        span = scratch.take((((lines - 1) * block.pitch + max(window, block.pitch)) * width,), BYTE)
        tensor.read(reader, begins, begins + n, span[: n * width], scratch.rest())
        return span[: lines * block.pitch * width].reshape(lines, block.pitch, width)[:, :window]
    plain = tensor.plain
    assert plain is not None
    values: NDArray[Any] = scratch.take((lines, window * width), BYTE)
    offset = plain.offset + begins * width
    reader.read_parts(
        plain.path,
        ((offset + line * block.pitch * width, [values[line].data]) for line in range(lines)),
    )
    return values.reshape(lines, window, width)


def _as(dtype: str, values: NDArray[Any], stored: str) -> NDArray[Any]:
    """Return values converted exactly to a wider dtype."""
    wide = widened(np.ascontiguousarray(values).reshape(-1), stored, F64)
    return rounded(wide, dtype).reshape(*values.shape[:2], -1)
