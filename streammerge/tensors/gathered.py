"""Gather rows in the order of a different vocabulary: rows of one or several models, means of rows, or zeros.

Rows are read in their stored order, many at a time, and copied to their targets. A row that is the mean of several rows
is summed in fp64, model by model, and rounded once.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streammerge.checkpoint.refs.rows import GatheredRef
from streammerge.dtypes import itemsize
from streammerge.formats.readers import reads
from streammerge.formats.refs import SourceRef, TensorRef, row_elements
from streammerge.io.buffer_pool import Bytes
from streammerge.io.reader import Reader
from streammerge.io.scratch import Scratch
from streammerge.numerics.casts import BYTE, F64, rounded, widened
from streammerge.tensors.matrices import computed_once

_GAP_BYTES = 1 << 14
"""Most bytes between two rows that are read rather than skipped."""
_SPAN_BYTES = 1 << 20
"""Most bytes of rows that are read together before they are copied to their targets."""


@reads(GatheredRef)
def gather(reader: Reader, ref: GatheredRef, start: int, stop: int, target: Bytes, scratch: Scratch) -> None:
    """Read elements of a tensor whose rows are gathered; a row that is cut at either end is read whole."""
    width, columns = itemsize(ref.dtype), ref.columns
    position = start
    while position < stop:
        row, column = divmod(position, columns)
        begins = (position - start) * width
        if column or stop - position < columns:
            end = min(stop, (row + 1) * columns)
            room = scratch.rest()
            whole = room.take((columns * width,), BYTE)
            _gather_rows(reader, ref, row, row + 1, whole, room.rest())
            target[begins : (end - start) * width] = whole[column * width : (column + end - position) * width]
        else:
            end = stop // columns * columns
            _gather_rows(reader, ref, row, stop // columns, target[begins : (end - start) * width], scratch)
        position = end


def _gather_rows(
    reader: Reader, ref: GatheredRef, first: int, last: int, target: Bytes, scratch: Scratch
) -> None:
    """Read whole rows `first` to `last`."""
    lines = target.reshape(last - first, -1)
    known = len(ref.map.starts) - 1
    if last > known:
        lines[max(0, known - first) :] = _mean_of_all(reader, ref)
    starts = ref.map.starts[first : min(last, known) + 1]
    counts = np.diff(starts)
    lines[: counts.size][counts == 0] = 0
    single = np.flatnonzero(counts == 1)
    lenders, rows = ref.map.models[starts[single]], ref.map.rows[starts[single]]
    for model in np.unique(lenders):
        mine = lenders == model
        tensor = ref.tensors[model]
        assert tensor is not None
        _place_rows(reader, tensor, rows[mine], single[mine], lines, ref.dtype, scratch)
    several = np.flatnonzero(counts > 1)
    step = max(1, _SPAN_BYTES // (8 * ref.columns))
    for begin in range(0, several.size, step):
        some = several[begin : begin + step]
        lines[some] = _means(reader, ref, starts[some], counts[some], scratch.rest())


def _place_rows(
    reader: Reader,
    tensor: SourceRef,
    rows: NDArray[Any],
    places: NDArray[Any],
    lines: Bytes,
    dtype: str,
    scratch: Scratch,
) -> None:
    """Read rows of a tensor in their stored order, each to its place among `lines`."""
    columns, width = row_elements(tensor.shape), itemsize(tensor.dtype)
    order = np.argsort(rows, kind="stable")
    rows, places = rows[order], places[order]
    if tensor.dtype == dtype and (plain := tensor.plain) is not None:
        _read_rows(reader, plain, rows, places, lines)
        return
    gaps = np.append(np.flatnonzero(np.diff(rows) > max(1, _GAP_BYTES // (columns * width))) + 1, rows.size)
    most = max(1, _SPAN_BYTES // (columns * width))
    begin = 0
    while begin < rows.size:
        row = int(rows[begin])
        end = min(int(np.searchsorted(rows, row + most)), int(gaps[np.searchsorted(gaps, begin, "right")]))
        n = int(rows[end - 1]) - row + 1
        room = scratch.rest()
        span = room.take((n, columns * width), BYTE)
        tensor.read(reader, row * columns, (row + n) * columns, span.reshape(-1), room.rest())
        some = span[rows[begin:end] - row]
        lines[places[begin:end]] = (
            some
            if tensor.dtype == dtype
            else rounded(widened(some, tensor.dtype, F64), dtype).reshape(len(some), -1)
        )
        begin = end


def _read_rows(
    reader: Reader, tensor: TensorRef, rows: NDArray[Any], places: NDArray[Any], lines: Bytes
) -> None:
    """Read ascending rows to their places; rows that are consecutive in the source are read together."""
    nbytes = lines.shape[1]
    view = lines.reshape(-1).data
    bounds = [0, *(np.flatnonzero(np.diff(rows) != 1) + 1).tolist(), rows.size]
    starts = (places * nbytes).tolist()

    def parts() -> Iterator[tuple[int, list[memoryview]]]:
        for begin, end in itertools.pairwise(bounds):
            # Rows that are consecutive in the target too share one buffer.
            views = []
            first = begin
            for i in range(begin, end):
                if i + 1 == end or starts[i + 1] != starts[i] + nbytes:
                    views.append(view[starts[first] : starts[i] + nbytes])
                    first = i + 1
            yield tensor.offset + int(rows[begin]) * nbytes, views

    if rows.size:
        reader.read_parts(tensor.path, parts())


def _means(
    reader: Reader, ref: GatheredRef, starts: NDArray[Any], counts: NDArray[Any], scratch: Scratch
) -> Bytes:
    """Return rows that are means of source rows; row i has `counts[i]` sources in the map, from `starts[i]` on."""
    total = scratch.take((counts.size, ref.columns), F64)
    total[:] = 0
    for k in range(int(counts.max())):
        having = np.flatnonzero(counts > k)
        at = starts[having] + k
        lenders, rows = ref.map.models[at], ref.map.rows[at]
        for model in np.unique(lenders):
            mine = lenders == model
            tensor = ref.tensors[model]
            assert tensor is not None
            room = scratch.rest()
            raw = room.take((int(mine.sum()), ref.columns * itemsize(tensor.dtype)), BYTE)
            _place_rows(reader, tensor, rows[mine], np.arange(len(raw)), raw, tensor.dtype, room.rest())
            total[having[mine]] += widened(raw, tensor.dtype, F64).reshape(len(raw), -1)
    total /= counts[:, None]
    return rounded(total.reshape(-1), ref.dtype).reshape(counts.size, -1)


@computed_once
def _mean_of_all(reader: Reader, ref: GatheredRef) -> Bytes:
    """Return the mean of all rows except the padding, which takes a pass over them."""
    known, columns = len(ref.map.starts) - 1, ref.columns
    step = max(1, _SPAN_BYTES // (columns * itemsize(ref.dtype)))
    scratch = Scratch(np.empty(ref.scratch_bytes, np.uint8))
    total = np.zeros(columns)
    for first in range(0, known, step):
        n = min(step, known - first)
        block = np.empty(n * columns * itemsize(ref.dtype), np.uint8)
        _gather_rows(reader, ref, first, first + n, block, scratch.rest())
        total += widened(block, ref.dtype, F64).reshape(n, columns).sum(axis=0)
    return rounded(total / max(1, known), ref.dtype)
