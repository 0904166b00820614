"""Read the elements of a non-contiguous tensor in order.

A range of elements of a tensor consists of a few boxes: on every axis, the rest of a row, whole rows, and the beginning
of a row. A box is cut along the axis with the largest stride in the file until its span is at most one block. The block
is read whole, and its elements are copied. If they are far apart, each run is read separately.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.lib.stride_tricks import as_strided

from streammerge.dtypes import itemsize
from streammerge.formats.readers import reads
from streammerge.formats.refs import TensorRef
from streammerge.formats.strided_refs import STRIDED_BLOCK, Box, StridedRef, boxes, row_major
from streammerge.io.buffer_pool import Bytes
from streammerge.io.reader import Reader
from streammerge.io.scratch import Scratch
from streammerge.numerics.casts import BYTE

_GAP_BYTES = 1 << 14
"""Most bytes between two runs that are read rather than skipped."""
_WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


@reads(StridedRef)
def read_strided(
    reader: Reader, ref: StridedRef, start: int, stop: int, target: Bytes, scratch: Scratch
) -> None:
    """Read elements `start` to `stop`, in row-major order, to the beginning of `target`.

    Raises
    ------
    WorldError
        If the file ends early or the device fails.
    """
    width = itemsize(ref.dtype)
    room = scratch.take((max(STRIDED_BLOCK, 64),), BYTE)
    out = target[: (stop - start) * width].reshape(-1, width)
    steps = row_major(ref.shape)
    for box in boxes(ref.shape, start, stop):
        copy_box(reader, ref.source, ref.strides, box, out, -start, steps, room)


def copy_box(
    reader: Reader,
    source: TensorRef,
    strides: Sequence[int],
    box: Box,
    out: Bytes,
    origin: int,
    steps: Sequence[int],
    room: Bytes,
) -> None:
    """Read a box of elements to their targets, through the buffer `room` of `STRIDED_BLOCK` bytes.

    Parameters
    ----------
    source, strides
        The range of a file that contains the elements, and its strides in elements, per axis.
    out, origin, steps
        The target: an array with one row of bytes per element; the row of the element at index 0 on every axis (it may
        be before the first row); and the strides in rows, per axis.
    """
    width = itemsize(source.dtype)
    for part in _blocks(box, strides, width):
        first = sum(begin * stride for (begin, _), stride in zip(part, strides, strict=True))
        block = room[: _span(part, strides) * width]
        reader.read_into(source.path, source.offset + first * width, block)
        at = origin + sum(begin * step for (begin, _), step in zip(part, steps, strict=True))
        _copy(out, at, steps, block.reshape(-1, width), strides, [end - begin for begin, end in part])


def _copy(
    out: Bytes, at: int, steps: Sequence[int], block: Bytes, strides: Sequence[int], shape: Sequence[int]
) -> None:
    """Copy a box of elements, each a row of bytes."""
    width = block.shape[1]
    axes = [axis for axis, size in enumerate(shape) if size > 1]  # numpy has no more than 64
    sizes = [shape[axis] for axis in axes]
    views = []
    for rows, by in ((out[at:], steps), (block, strides)):
        some = rows.reshape(-1)
        # Copy one word per element if possible, else its bytes.
        aligned = some.ctypes.data % width == 0
        words = some.view(_WORDS[width]) if aligned else rows
        each = ([], []) if aligned else ([width], [1])
        views.append(as_strided(words, [*sizes, *each[0]], [*(by[axis] * width for axis in axes), *each[1]]))
    to, of = views
    if to.ndim != of.ndim:
        to, of = (
            view if view.dtype == np.uint8 and view.ndim > len(axes) else view[..., None].view(np.uint8)
            for view in (to, of)
        )
    to[...] = of


def _blocks(box: Box, strides: Sequence[int], width: int) -> Iterator[Box]:
    """Yield parts of a box, each within one block of the file."""
    wide = [axis for axis, (begin, end) in enumerate(box) if end - begin > 1 and strides[axis]]
    if not wide:
        yield box
        return
    axis = max(wide, key=lambda i: strides[i])
    begin, end = box[axis]
    inner = _span([*box[:axis], (begin, begin + 1), *box[axis + 1 :]], strides)
    if (strides[axis] - inner) * width > _GAP_BYTES:
        n = 1
    else:
        n = max(1, (STRIDED_BLOCK // width - inner) // strides[axis] + 1)
    if n >= end - begin and _span(box, strides) * width <= STRIDED_BLOCK:
        yield box
        return
    for first in range(begin, end, n):
        part = [*box[:axis], (first, min(end, first + n)), *box[axis + 1 :]]
        if _span(part, strides) * width <= STRIDED_BLOCK and n > 1:
            yield part
        else:
            yield from _blocks(part, strides, width)


def _span(box: Box, strides: Sequence[int]) -> int:
    """Return the number of elements of the file from the first to the last element of a box, inclusive."""
    return 1 + sum((end - begin - 1) * stride for (begin, end), stride in zip(box, strides, strict=True))
