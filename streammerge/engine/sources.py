"""Elements of a tensor as its model has them: as they lie in a file, with an adapter, or gathered row by row.

A weight with a LoRA adapter is computed a block of rows at a time, ``W + s L R``, in fp32 (fp64 if it is) and in one order:
each product is added to the sum of those of lower rank, each step rounded, so that neither the cut nor the machine
changes a bit. Rows of a vocabulary are read in the order in which they lie, several at a time, and put in their place;
a row that is the mean of several is summed in fp64 and rounded once.
"""

from __future__ import annotations

import functools
import itertools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streammerge.compiled import missing_kernels
from streammerge.dtypes import BITS, itemsize
from streammerge.engine.memory import Bytes
from streammerge.engine.reader import Reader
from streammerge.index.derived import (
    READ_BLOCK,
    AdaptedRef,
    GatheredRef,
    SourceRef,
    row_elements,
    scratch_bytes,
)
from streammerge.index.header import TensorRef
from streammerge.plan.arena import PAGE, slot_bytes

_GAP_BYTES = 1 << 14
"""Bytes between two rows that are rather read than skipped."""
_SPAN_BYTES = 1 << 20
"""Bytes of rows read together before they are put in their places."""
_STEP = 1 << 18
"""Elements widened together."""
_BYTE = np.dtype(np.uint8)
F32 = np.dtype(np.float32)
F64 = np.dtype(np.float64)
Floats = NDArray[Any]


def _computed_once(function: Callable[[Reader, Any], Floats]) -> Callable[[Reader, Any], Floats]:
    """Keep what takes a pass over a tensor, a row or so of it, for the pieces that follow; one thread computes it."""
    cached = functools.lru_cache(maxsize=128)(function)
    lock = threading.Lock()

    def one_at_a_time(reader: Reader, ref: Any) -> Floats:
        with lock:
            return cached(reader, ref)

    return one_at_a_time


class Scratch:
    """Room for temporaries, given out from its beginning; what a block takes is free again after it."""

    def __init__(self, room: Bytes) -> None:
        self._room = room
        self._taken = 0

    def take(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Floats:
        """Return an array of no content in particular."""
        nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        begins = -(-self._taken // 64) * 64
        assert begins + nbytes <= self._room.size, (begins, nbytes, self._room.size)
        self._taken = begins + nbytes
        return self._room[begins : begins + nbytes].view(dtype).reshape(shape)

    def pages(self, nbytes: int) -> Bytes:
        """Return bytes that begin at a page of memory, as direct reads want them."""
        self._taken += -(self._room.ctypes.data + self._taken) % PAGE
        return self.take((nbytes,), _BYTE)

    def rest(self) -> Scratch:
        """Return what is left as room of its own; it is free again once that is out of use."""
        begins = -(-self._taken // 64) * 64
        return Scratch(self._room[begins:])


def read_source(
    reader: Reader, ref: SourceRef, start: int, stop: int, slot: Bytes, scratch: Bytes, *, again: bool = False
) -> int:
    """Read elements `start` to `stop` of a tensor into a slot (see `plan.arena`); return where in it they begin.

    Parameters
    ----------
    scratch
        Room of `scratch_bytes(ref)`.
    again
        The same elements will be read once more.

    Raises
    ------
    WorldError
        If a file ends early or the device fails.
    """
    if isinstance(ref, TensorRef):
        first, last = (element * BITS[ref.dtype] // 8 for element in (start, stop))
        return reader.read_slot(ref.path, ref.offset + first, last - first, slot, again=again)
    _compute(reader, ref, start, stop, slot, Scratch(scratch))
    return 0


def read_elements(reader: Reader, ref: SourceRef, start: int, stop: int) -> Bytes:
    """Return elements `start` to `stop` of a tensor in memory of their own: for a small or sparse look."""
    if isinstance(ref, TensorRef):
        first, last = (element * BITS[ref.dtype] // 8 for element in (start, stop))
        data = np.empty(last - first, np.uint8)
        reader.read_into(ref.path, ref.offset + first, data)
        return data
    data = np.empty((stop - start) * itemsize(ref.dtype), np.uint8)
    _compute(reader, ref, start, stop, data, Scratch(np.empty(scratch_bytes(ref), np.uint8)))
    return data


def prefetch_source(reader: Reader, ref: SourceRef, start: int, stop: int) -> None:
    """Ask the kernel to begin reading what elements `start` to `stop` are made of, where that lies together."""
    if isinstance(ref, AdaptedRef):
        ref = ref.weight
    if isinstance(ref, TensorRef):
        first, last = (element * BITS[ref.dtype] // 8 for element in (start, stop))
        reader.prefetch(ref.path, ref.offset + first, last - first)


def _compute(reader: Reader, ref: SourceRef, start: int, stop: int, target: Bytes, scratch: Scratch) -> None:
    """Read elements of any tensor to the beginning of `target`, through the page cache where they lie in a file."""
    if isinstance(ref, TensorRef):
        width = itemsize(ref.dtype)
        reader.read_into(ref.path, ref.offset + start * width, target[: (stop - start) * width])
    elif isinstance(ref, AdaptedRef):
        _Adapter(reader, ref, scratch).read(start, stop, target)
    else:
        _gather(reader, ref, start, stop, target, scratch)


def segments(start: int, stop: int, columns: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield (first row, end, first column, end) of blocks that follow each other, of at most `READ_BLOCK` elements.

    Each lies in one piece: whole rows, or a part of one.
    """
    rows = max(1, READ_BLOCK // columns)
    while start < stop:
        row, column = divmod(start, columns)
        if column or stop - start < columns or columns > READ_BLOCK:
            end = min(columns, column + READ_BLOCK, column + stop - start)
            yield row, row + 1, column, end
            start += end - column
        else:
            last = min(row + rows, stop // columns)
            yield row, last, 0, columns
            start = last * columns


class _Adapter:
    """Computes elements of one weight with its adapter."""

    def __init__(self, reader: Reader, ref: AdaptedRef, scratch: Scratch) -> None:
        self._reader, self._ref = reader, ref
        columns = ref.columns
        self._dtype = F64 if ref.dtype == "F64" else F32
        self._right = scratch.take((ref.rank, columns), self._dtype)
        self._scratch = scratch
        if ref.right is None:
            self._right[:] = 1
        else:
            raw = scratch.rest().take((ref.rank * columns,), self._dtype)
            _read_widened(reader, ref.right, 0, ref.right.n_elements, raw)
            self._right[:] = raw.reshape(columns, -1).T if ref.transposed else raw.reshape(-1, columns)

    def read(self, start: int, stop: int, target: Bytes) -> None:
        """Compute elements `start` to `stop`."""
        ref = self._ref
        out = target[: (stop - start) * itemsize(ref.dtype)].view(self._dtype)
        for row, end, first, last in segments(start, stop, ref.columns):
            position = row * ref.columns + first - start
            part = out[position : position + (end - row) * (last - first)].reshape(end - row, -1)
            self._block(row, end, first, last, part, self._scratch.rest())
            if ref.magnitude is not None:
                part *= self._factors(row, end, first, last)

    def _block(self, row: int, end: int, first: int, last: int, out: Floats, scratch: Scratch) -> None:
        """Compute ``W + s L R`` for a block that lies in one piece."""
        ref = self._ref
        left = scratch.take((end - row, ref.rank), self._dtype)
        self._read_left(row, end, left, scratch.rest())
        total = scratch.take(out.shape, self._dtype)
        add_products(left, self._right, first, last, total)
        total *= self._dtype.type(ref.scale)
        width = itemsize(ref.weight.dtype)
        slot = scratch.pages(slot_bytes(out.size * width))
        offset = ref.weight.offset + (row * ref.columns + first) * width
        begins = self._reader.read_slot(ref.weight.path, offset, out.size * width, slot)
        weight = slot[begins : begins + out.size * width]
        np.add(_widened(weight, ref.weight.dtype, out.dtype).reshape(out.shape), total, out=out)

    def _read_left(self, row: int, end: int, left: Floats, scratch: Scratch) -> None:
        ref = self._ref
        if not ref.transposed:
            _read_widened(self._reader, ref.left, row * ref.rank, end * ref.rank, left.reshape(-1))
            return
        n_rows = ref.shape[0]
        line = scratch.take((end - row,), self._dtype)
        for k in range(ref.rank):
            _read_widened(self._reader, ref.left, k * n_rows + row, k * n_rows + end, line)
            left[:, k] = line

    def _factors(self, row: int, end: int, first: int, last: int) -> Floats:
        """Return what DoRA multiplies a block by: for each output feature its magnitude over its norm."""
        ref = self._ref
        if ref.transposed:
            return _column_factors(self._reader, ref)[first:last]
        squares = np.zeros(end - row)
        for r0, r1, c0, c1 in segments(row * ref.columns, end * ref.columns, ref.columns):
            squares[r0 - row : r1 - row] += self.squares(r0, r1, c0, c1).sum(axis=1)
        return _over_norm(self._reader, ref, row, end, squares)[:, None]

    def squares(self, row: int, end: int, first: int, last: int) -> Floats:
        """Return the squares, in fp64, of a block that lies in one piece, before any magnitude."""
        scratch = self._scratch.rest()
        block = scratch.take((end - row, last - first), self._dtype)
        squares = scratch.take(block.shape, F64)
        self._block(row, end, first, last, block, scratch.rest())
        np.multiply(block, block, out=squares, dtype=F64)
        return squares


@_computed_once
def _column_factors(reader: Reader, ref: AdaptedRef) -> Floats:
    """Return DoRA's factor of each column of a weight stored as (in, out): it takes a pass over the weight."""
    adapter = _Adapter(reader, ref, Scratch(np.empty(scratch_bytes(ref), np.uint8)))
    squares = np.zeros(ref.columns)
    for row, end, first, last in segments(0, ref.n_elements, ref.columns):
        squares[first:last] += adapter.squares(row, end, first, last).sum(axis=0)
    return _over_norm(reader, ref, 0, ref.columns, squares)


def _over_norm(reader: Reader, ref: AdaptedRef, first: int, last: int, squares: Floats) -> Floats:
    assert ref.magnitude is not None
    dtype = F64 if ref.dtype == "F64" else F32
    magnitude = np.empty(last - first, dtype)
    _read_widened(reader, ref.magnitude, first, last, magnitude)
    with np.errstate(divide="ignore", invalid="ignore"):  # a row of zeros: what is not finite is found later
        return magnitude / np.sqrt(squares).astype(dtype)


def add_products(left: Floats, right: Floats, first: int, last: int, out: Floats) -> None:
    """Write ``left @ right[:, first:last]`` to `out`, all of one dtype: each product rounded, and added in order of rank."""
    if missing_kernels() is None:
        from streammerge.kernels.products import add_products as compiled

        compiled(left, right, first, last, out)
    else:
        products_in_order(left, right[:, first:last], out)


def products_in_order(left: Floats, right: Floats, out: Floats) -> None:
    """The same, by numpy: the formula that the kernel agrees with bit by bit."""
    out[:] = 0
    for k in range(left.shape[1]):
        out += left[:, k : k + 1] * right[k]


def _gather(reader: Reader, ref: GatheredRef, start: int, stop: int, target: Bytes, scratch: Scratch) -> None:
    """Read elements of a tensor whose rows are gathered; a row cut at an end is read whole."""
    width, columns = itemsize(ref.dtype), ref.columns
    position = start
    while position < stop:
        row, column = divmod(position, columns)
        begins = (position - start) * width
        if column or stop - position < columns:
            end = min(stop, (row + 1) * columns)
            room = scratch.rest()
            whole = room.take((columns * width,), _BYTE)
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
    reader: Reader, tensor: TensorRef | AdaptedRef, rows: NDArray[Any], places: NDArray[Any], lines: Bytes, dtype: str,
    scratch: Scratch,
) -> None:  # fmt: skip
    """Read some rows of a tensor, each to its place among `lines`, in the order in which they lie."""
    columns, width = row_elements(tensor.shape), itemsize(tensor.dtype)
    order = np.argsort(rows, kind="stable")
    rows, places = rows[order], places[order]
    if tensor.dtype == dtype and isinstance(tensor, TensorRef):
        _read_rows(reader, tensor, rows, places, lines)
        return
    gaps = np.append(np.flatnonzero(np.diff(rows) > max(1, _GAP_BYTES // (columns * width))) + 1, rows.size)
    most = max(1, _SPAN_BYTES // (columns * width))
    begin = 0
    while begin < rows.size:
        row = int(rows[begin])
        end = min(int(np.searchsorted(rows, row + most)), int(gaps[np.searchsorted(gaps, begin, "right")]))
        n = int(rows[end - 1]) - row + 1
        room = scratch.rest()
        span = room.take((n, columns * width), _BYTE)
        _compute(reader, tensor, row * columns, (row + n) * columns, span.reshape(-1), room.rest())
        some = span[rows[begin:end] - row]
        lines[places[begin:end]] = some if tensor.dtype == dtype else _rounded(
            _widened(some, tensor.dtype, F64), dtype
        ).reshape(len(some), -1)  # fmt: skip
        begin = end


def _read_rows(
    reader: Reader, tensor: TensorRef, rows: NDArray[Any], places: NDArray[Any], lines: Bytes
) -> None:
    """Read rows, ascending, to their places: those that follow each other there in one go, wherever they belong here."""
    nbytes = lines.shape[1]
    view = lines.reshape(-1).data
    bounds = [0, *(np.flatnonzero(np.diff(rows) != 1) + 1).tolist(), rows.size]
    starts = (places * nbytes).tolist()

    def parts() -> Iterator[tuple[int, list[memoryview]]]:
        for begin, end in itertools.pairwise(bounds):
            # What follows each other here as well is one buffer.
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
    """Return rows that are each the mean of some, of which the map has `counts` from `starts` on."""
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
            raw = room.take((int(mine.sum()), ref.columns * itemsize(tensor.dtype)), _BYTE)
            _place_rows(reader, tensor, rows[mine], np.arange(len(raw)), raw, tensor.dtype, room.rest())
            total[having[mine]] += _widened(raw, tensor.dtype, F64).reshape(len(raw), -1)
    total /= counts[:, None]
    return _rounded(total.reshape(-1), ref.dtype).reshape(counts.size, -1)


@_computed_once
def _mean_of_all(reader: Reader, ref: GatheredRef) -> Bytes:
    """Return the mean of all rows but the padding, which takes a pass over them."""
    known, columns = len(ref.map.starts) - 1, ref.columns
    step = max(1, _SPAN_BYTES // (columns * itemsize(ref.dtype)))
    scratch = Scratch(np.empty(scratch_bytes(ref), np.uint8))
    total = np.zeros(columns)
    for first in range(0, known, step):
        n = min(step, known - first)
        block = np.empty(n * columns * itemsize(ref.dtype), np.uint8)
        _gather_rows(reader, ref, first, first + n, block, scratch.rest())
        total += _widened(block, ref.dtype, F64).reshape(n, columns).sum(axis=0)
    return _rounded(total / max(1, known), ref.dtype)


def _read_widened(reader: Reader, ref: TensorRef, first: int, last: int, out: Floats) -> None:
    """Read elements of a tensor into `out`, widened to its dtype."""
    width = itemsize(ref.dtype)
    for begin in range(first, last, _STEP):
        end = min(last, begin + _STEP)
        raw = np.empty((end - begin) * width, np.uint8)
        reader.read_into(ref.path, ref.offset + begin * width, raw)
        out[begin - first : end - first] = _widened(raw, ref.dtype, out.dtype)


def _widened(raw: Bytes, dtype: str, to: np.dtype[Any]) -> Floats:
    """Return the values of elements in a wider dtype, exactly; one after the other."""
    raw = raw.reshape(-1)
    if dtype == "BF16":
        return (
            (raw.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32).astype(to, copy=False)
        )
    return raw.view({"F16": np.float16, "F32": np.float32, "F64": np.float64}[dtype]).astype(to, copy=False)


def _rounded(values: Floats, dtype: str) -> Bytes:
    """Return fp64 values rounded once, to nearest even, as the bytes of a dtype."""
    with np.errstate(over="ignore"):
        if dtype != "BF16":
            return values.astype({"F16": np.float16, "F32": np.float32, "F64": np.float64}[dtype]).view(
                np.uint8
            )
        near = values.astype(np.float32)
    bits = near.view(np.uint32)
    # Rounded to odd first, so that the rounding to 16 bits is the only one.
    wide = near.astype(F64)
    away = (np.abs(wide) > np.abs(values)).astype(np.uint32)
    bits = np.where(wide != values, (bits - away) | np.uint32(1), bits)
    bits = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    bits = np.where(np.isnan(values), np.uint32(0x7FC0), bits)
    return bits.astype(np.uint16).view(np.uint8)
