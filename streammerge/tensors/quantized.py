"""Decode quantised tensors as they are read: ``code * scale``, rounded once to fp32, the same bits for any cut.

Large ranges of codes are read past the page cache to the end of the slot, and decoded from there to its beginning.
Small ranges are read through the scratch, one block at a time. Scales are also read by ranges, and checked. For a
matrix that is stored transposed, whole lines are read and a part of each is transposed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from streammerge.checkpoint.refs.quantized import LINES, SPAN, QuantizedRef
from streammerge.dtypes import itemsize
from streammerge.formats.readers import reads, reads_slot
from streammerge.io.buffer_pool import Bytes
from streammerge.io.files import bad, quoted
from streammerge.io.pages import DIRECT_BYTES, PAGE, slot_bytes
from streammerge.io.reader import Reader
from streammerge.io.scratch import Scratch
from streammerge.numerics.casts import BYTE, F32
from streammerge.numerics.elements import decode, first_bad_scale, scale_values, turn
from streammerge.records import dataclass

_FLOAT = 4
_TURNED = 224
"""Columns of a tile that is turned: whole lanes, and no distance between rows that the cache maps to the same lines."""


@dataclass(frozen=True, slots=True)
class Part:
    """A rectangle of one of a tensor's stored matrices."""

    matrix: int
    row: int
    end: int
    column: int
    last: int

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.end - self.row, self.last - self.column


Codes = Callable[[int, int], Bytes]
"""Function that returns bytes (first, end) of a tensor of codes."""


@reads(QuantizedRef)
def read_quantized(
    reader: Reader, ref: QuantizedRef, start: int, stop: int, target: Bytes, scratch: Scratch
) -> None:
    """Decode elements `start` to `stop` of a tensor to the beginning of `target`.

    Raises
    ------
    ModelError
        If a scale is NaN, infinite or negative.
    WorldError
        If a file ends early or the device fails.
    """
    out = target[: _FLOAT * (stop - start)].view(np.float32)
    if ref.encoding.turned:
        _read_turned(reader, ref, start, stop, out, scratch)
        return
    room = scratch.take((min(SPAN, stop - start) + 1,), BYTE)

    def codes(first: int, last: int) -> Bytes:
        some = room[: last - first]
        reader.read_into(ref.source.path, ref.source.offset + first, some)
        return some

    _decode_in_order(ref, start, stop, codes, Window(reader, ref, scratch), out)


@reads_slot(QuantizedRef)
def read_quantized_slot(
    reader: Reader, ref: QuantizedRef, start: int, stop: int, slot: Bytes, scratch: Scratch, again: bool
) -> int:
    """Decode elements within their slot: codes are read to its end, and each is decoded before it is overwritten."""
    first, last = start * ref.bits // 8, -(-stop * ref.bits // 8)
    out = slot[: _FLOAT * (stop - start)]
    if ref.encoding.turned or last - first < DIRECT_BYTES:
        ref.read(reader, start, stop, out, scratch)
        return 0
    place = -(-(out.size - (last - first)) // PAGE) * PAGE
    # The part that does not fit there in whole pages is read separately.
    n = min(last - first, (slot_bytes(out.size) - PAGE - place) // PAGE * PAGE)
    begins = place + reader.read_slot(
        ref.source.path, ref.source.offset + first, n, slot[place : slot_bytes(out.size)], again=again
    )
    rest = scratch.take((last - first - n,), BYTE)
    reader.read_into(ref.source.path, ref.source.offset + first + n, rest)
    room = scratch.take((SPAN + 1,), BYTE)

    def codes(begin: int, end: int) -> Bytes:
        begin, end = begin - first, end - first
        if end <= n:
            return slot[begins + begin : begins + end]
        some = room[: end - begin]
        inside = max(0, n - begin)
        some[:inside] = slot[begins + begin : begins + begin + inside]
        some[inside:] = rest[max(0, begin - n) : end - n]
        return some

    _decode_in_order(ref, start, stop, codes, Window(reader, ref, scratch), out.view(np.float32))
    return 0


def _decode_in_order(
    ref: QuantizedRef, start: int, stop: int, codes: Codes, scales: Window, out: NDArray[np.float32]
) -> None:
    bits = ref.bits
    done = 0
    for part in _parts(ref, start, stop):
        rows, columns = part.shape
        first, n = start + done, rows * columns
        some = codes(first * bits // 8, -(-(first + n) * bits // 8))
        skip = first * bits % 8 // bits
        place, extent = (part.row, part.column), ref.scales.extent[1:]
        values = out[done : done + n]
        decode(ref.encoding.element, some, skip, columns, scales.of(part), place, part.shape, extent, values)
        done += n


def _parts(ref: QuantizedRef, start: int, stop: int) -> Iterator[Part]:
    """Yield the parts that form elements `start` to `stop`, in order: whole rows, or a part of one row."""
    _, rows, columns = ref.matrices
    most = min(SPAN // columns, _most_rows(ref))
    while start < stop:
        line, column = divmod(start, columns)
        matrix, row = divmod(line, rows)
        if column or stop - start < columns or most < 1:
            last = min(columns, column + SPAN, column + stop - start)
            part = Part(matrix, row, row + 1, column, last)
        else:
            part = Part(matrix, row, min(rows, row + most, row + (stop - start) // columns), 0, columns)
        yield part
        start += part.shape[0] * part.shape[1]


def _most_rows(ref: QuantizedRef) -> int:
    """Return the number of rows whose scales can be held; 0 if those of one row are too many."""
    lines = LINES // (_FLOAT * max(1, ref.scales.shape[2]))
    return max(0, lines - 2) * ref.scales.extent[1]


def _read_turned(
    reader: Reader, ref: QuantizedRef, start: int, stop: int, out: NDArray[np.float32], scratch: Scratch
) -> None:
    """Decode elements of a tensor whose matrices are stored transposed: lines are read in blocks, and turned by tiles."""
    _, depth, columns = ref.matrices  # rows of the file are columns of the tensor
    room = scratch.take((min(LINES, ref.source.nbytes),), BYTE)
    tile = scratch.take((min(SPAN, ref.n_elements),), F32)
    window, (by_rows, by_columns) = Window(reader, ref, scratch), ref.scales.extent[1:]
    for part in _columns(ref, start, stop):
        to = ((part.matrix * columns + part.column) * depth + part.row) - start
        for block in _blocks(ref, part):
            codes, skip = _read_lines(reader, ref, block, room)
            scales = window.of(block)
            for column in range(block.column, block.last, _TURNED):
                shape = block.end - block.row, min(block.last, column + _TURNED) - column
                values = tile[: shape[0] * shape[1]]
                group = column // by_columns - block.column // by_columns
                groups = (column + shape[1] - 1) // by_columns - column // by_columns + 1
                some = np.ascontiguousarray(scales[:, group : group + groups])
                place, before = (block.row, column), skip + column - block.column
                decode(
                    ref.encoding.element,
                    codes,
                    before,
                    columns,
                    some,
                    place,
                    shape,
                    (by_rows, by_columns),
                    values,
                )
                at = to + (column - part.column) * depth + block.row - part.row
                turn(values.reshape(shape), out[at:], depth)


def _columns(ref: QuantizedRef, start: int, stop: int) -> Iterator[Part]:
    """Yield the parts of the file's matrices that form the elements: whole columns, or a part of one column."""
    _, depth, lines = ref.matrices
    while start < stop:
        line, at = divmod(start, depth)
        matrix, column = divmod(line, lines)
        if at or stop - start < depth:
            end = min(depth, at + stop - start)
            part = Part(matrix, at, end, column, column + 1)
        else:
            part = Part(matrix, 0, depth, column, min(lines, column + (stop - start) // depth))
        yield part
        start += part.shape[0] * part.shape[1]


def _blocks(ref: QuantizedRef, part: Part) -> Iterator[Part]:
    """Yield blocks of lines such that the codes, scales and values of a block fit."""
    pitch = ref.matrices[2] * ref.bits // 8
    rows = max(1, min(SPAN // _TURNED, LINES // max(1, pitch), _most_rows(ref)))
    for column in range(part.column, part.last, SPAN):
        for row in range(part.row, part.end, rows):
            last = min(part.last, column + SPAN)
            yield Part(part.matrix, row, min(part.end, row + rows), column, last)


def _read_lines(reader: Reader, ref: QuantizedRef, part: Part, room: Bytes) -> tuple[Bytes, int]:
    """Return the codes of a part, whole lines if it has several, and the number of codes before its first."""
    _, depth, columns = ref.matrices
    rows, wide = part.shape
    begin = (part.matrix * depth + part.row) * columns + part.column
    end = begin + (rows - 1) * columns + wide
    first, last = begin * ref.bits // 8, -(-end * ref.bits // 8)
    codes = room[: last - first]
    reader.read_into(ref.source.path, ref.source.offset + first, codes)
    return codes, begin * ref.bits % 8 // ref.bits


class Window:
    """The scales of a part of a tensor; those of the previous part are reused if they are the same."""

    def __init__(self, reader: Reader, ref: QuantizedRef, scratch: Scratch) -> None:
        self._reader, self._ref, self._scratch = reader, ref, scratch
        self._known: Part | None = None
        self._values = np.empty((0, 0), np.float32)

    def of(self, part: Part) -> NDArray[np.float32]:
        """Return the scales of a part, [rows, columns], beginning with that of its first element."""
        by_matrix, by_row, by_column = self._ref.scales.extent
        wanted = Part(
            part.matrix // by_matrix,
            part.row // by_row,
            (part.end - 1) // by_row + 1,
            part.column // by_column,
            (part.last - 1) // by_column + 1,
        )
        if wanted != self._known:
            self._values = self._read(wanted)
            self._known = wanted
        return self._values

    def _read(self, wanted: Part) -> NDArray[np.float32]:
        grid = self._ref.scales
        _, rows, columns = grid.shape
        width = itemsize(grid.dtype)
        n, wide = wanted.shape
        # Several rows are read whole, so that they are contiguous.
        left, length = (wanted.column, wide) if n == 1 else (0, columns)
        first = (wanted.matrix * rows + wanted.row) * columns + left
        raw = self._scratch.rest().take((n * length * width,), BYTE)
        tensor = grid.tensor
        self._reader.read_into(tensor.path, tensor.offset + first * width, raw)
        values = scale_values(raw, grid.dtype)
        if (place := first_bad_scale(values)) is not None:
            raise bad(
                tensor.path,
                f"tensor {quoted(tensor.name)}: scale {first + place} is {values[place]:g}, which no scale can be: "
                "download or convert the model again",
            )
        if length == wide:
            return values.reshape(n, wide)
        here = wanted.column - left
        return np.ascontiguousarray(values.reshape(n, length)[:, here : here + wide])
