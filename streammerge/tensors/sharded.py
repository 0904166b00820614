"""Assemble tensors from chunks as they are read: runs of elements directly, other boxes through a buffer."""

from __future__ import annotations

from streammerge.dtypes import itemsize
from streammerge.formats.readers import reads
from streammerge.formats.sharded_refs import ShardedRef
from streammerge.formats.strided_refs import STRIDED_BLOCK, boxes, row_major
from streammerge.io.buffer_pool import Bytes
from streammerge.io.reader import Reader
from streammerge.io.scratch import Scratch
from streammerge.numerics.casts import BYTE
from streammerge.tensors.strided import copy_box


@reads(ShardedRef)
def read_sharded(
    reader: Reader, ref: ShardedRef, start: int, stop: int, target: Bytes, scratch: Scratch
) -> None:
    """Read elements `start` to `stop`, in row-major order, to the beginning of `target`.

    Raises
    ------
    WorldError
        If a file ends early or the device fails.
    """
    width, steps = itemsize(ref.dtype), row_major(ref.shape)
    room = scratch.take((min(STRIDED_BLOCK, ref.widest),), BYTE)
    out = target[: (stop - start) * width]
    wanted = list(boxes(ref.shape, start, stop))
    for chunk in ref.chunks:
        if chunk.first is not None:
            begin, end = max(start, chunk.first), min(stop, chunk.first + chunk.source.n_elements)
            if begin < end:
                place = out[(begin - start) * width : (end - start) * width]
                chunk.source.read(reader, begin - chunk.first, end - chunk.first, place, scratch)
            continue
        origin = sum(at * step for at, step in zip(chunk.begins, steps, strict=True)) - start
        for box in wanted:
            if (part := chunk.inside(box)) is not None:
                rows = out.reshape(-1, width)
                copy_box(reader, chunk.source, chunk.strides, part, rows, origin, steps, room)
