"""Read embeddings in which an adapter trained single tokens: the stored rows, overwritten by the trained rows."""

from __future__ import annotations

import numpy as np

from streammerge.checkpoint.refs.rows import PatchedRef
from streammerge.dtypes import itemsize
from streammerge.formats.readers import reads
from streammerge.formats.refs import READ_BLOCK, row_elements
from streammerge.io.buffer_pool import Bytes
from streammerge.io.reader import Reader
from streammerge.io.scratch import Scratch
from streammerge.numerics.casts import BYTE, F32, F64, widened
from streammerge.tensors.matrices import read_widened


@reads(PatchedRef)
def read_patched(
    reader: Reader, ref: PatchedRef, start: int, stop: int, target: Bytes, scratch: Scratch
) -> None:
    """Read elements `start` to `stop` of an embedding with trained rows to the beginning of `target`.

    Raises
    ------
    WorldError
        If a file ends early or the device fails.
    """
    width, columns = itemsize(ref.dtype), row_elements(ref.shape)
    target = target[: (stop - start) * width]
    if ref.source.dtype == ref.dtype:
        ref.source.read(reader, start, stop, target, scratch)
    else:
        _read_wide(reader, ref, start, stop, target, scratch)
    first, last = np.searchsorted(ref.rows, (start // columns, -(-stop // columns)))
    for row, place in zip(ref.rows[first:last].tolist(), ref.places[first:last].tolist(), strict=True):
        begin, end = max(start, row * columns), min(stop, (row + 1) * columns)
        _read_row(
            reader,
            ref,
            place * columns + begin - row * columns,
            end - begin,
            target[(begin - start) * width : (end - start) * width],
        )


def _read_row(reader: Reader, ref: PatchedRef, first: int, n: int, target: Bytes) -> None:
    """Read a part of a trained row."""
    if ref.values.dtype == ref.dtype:
        reader.read_into(ref.values.path, ref.values.offset + first * itemsize(ref.dtype), target)
    else:
        values = target.view(F64 if ref.dtype == "F64" else F32)
        read_widened(reader, ref.values, first, first + n, values)


def _read_wide(
    reader: Reader, ref: PatchedRef, start: int, stop: int, target: Bytes, scratch: Scratch
) -> None:
    """Read elements of the unchanged embedding in the wider dtype of the trained rows."""
    out = target.view(F64 if ref.dtype == "F64" else F32)
    narrow = itemsize(ref.source.dtype)
    raw = scratch.take((min(READ_BLOCK, stop - start) * narrow,), BYTE)
    for begin in range(start, stop, READ_BLOCK):
        end = min(stop, begin + READ_BLOCK)
        part = raw[: (end - begin) * narrow]
        ref.source.read(reader, begin, end, part, scratch.rest())
        out[begin - start : end - start] = widened(part, ref.source.dtype, out.dtype)
