"""Quantised tensors, decoded as they are read: ``code * scale``, rounded once to fp32, the same bits however it is cut.

Large ranges of codes are read past the page cache to the end of the slot and decoded from there to its beginning; small
ones a block at a time by way of the scratch. Scales are read by ranges too, and checked.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from streammerge.checkpoint.refs.quantized import SPAN, QuantizedRef, Scales
from streammerge.dtypes import itemsize
from streammerge.formats.refs import reads
from streammerge.io.buffer_pool import Bytes
from streammerge.io.files import bad, quoted
from streammerge.io.reader import Reader
from streammerge.io.scratch import Scratch
from streammerge.numerics.casts import BYTE
from streammerge.numerics.elements import decode, first_bad_scale, scale_values

Part = tuple[int, int, int, int, int]
"""Matrix, first row, end, first column, end: whole rows, or a part of one."""


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
    codes = scratch.take((min(SPAN, stop - start),), BYTE)
    out = target[: 4 * (stop - start)].view(np.float32)
    scales = _Window(reader, ref, scratch)
    at = 0
    for part in parts(ref, start, stop):
        _, row, end, column, last = part
        n = (end - row) * (last - column)
        ref.source.read(reader, start + at, start + at + n, codes, scratch)
        _decode(ref, codes[:n], scales.of(part), part, out[at : at + n])
        at += n


def _decode(
    ref: QuantizedRef,
    codes: Bytes,
    scales: NDArray[np.float32],
    part: Part,
    out: NDArray[np.float32],
) -> None:
    _, row, _, column, last = part
    extent = ref.scales.extent[1:]
    decode(ref.encoding.element, codes, scales, (row, column), last - column, extent, out)


def parts(ref: QuantizedRef, start: int, stop: int) -> Iterator[Part]:
    """Yield the parts that elements `start` to `stop` consist of, in their order, each of at most `SPAN` elements."""
    _, rows, columns = ref.matrices
    while start < stop:
        line, column = divmod(start, columns)
        matrix, row = divmod(line, rows)
        if column or stop - start < columns or columns > SPAN:
            last = min(columns, column + SPAN, column + stop - start)
            yield matrix, row, row + 1, column, last
            start += last - column
        else:
            end = min(rows, row + SPAN // columns, row + (stop - start) // columns)
            yield matrix, row, end, 0, columns
            start += (end - row) * columns


class _Window:
    """The scales of a part of a tensor; those of the part before are kept where they are the same."""

    def __init__(self, reader: Reader, ref: QuantizedRef, scratch: Scratch) -> None:
        self._reader, self._ref, self._scratch = reader, ref, scratch
        self._known: tuple[int, int, int, int, int] | None = None
        self._values = np.empty((0, 0), np.float32)

    def of(self, part: Part) -> NDArray[np.float32]:
        """Return the scales of a part, [rows, columns] from that of its first element on."""
        grid: Scales = self._ref.scales
        matrix, row, end, column, last = part
        by_matrix, by_row, by_column = grid.extent
        wanted = (
            matrix // by_matrix,
            row // by_row,
            (end - 1) // by_row + 1,
            column // by_column,
            (last - 1) // by_column + 1,
        )
        if wanted != self._known:
            self._values = self._read(grid, wanted)
            self._known = wanted
        return self._values

    def _read(self, grid: Scales, wanted: Part) -> NDArray[np.float32]:
        matrix, row, end, column, last = wanted
        _, rows, columns = grid.shape
        width = itemsize(grid.dtype)
        first = (matrix * rows + row) * columns + column
        # One row, or whole ones: they lie together.
        n = (end - row) * (last - column)
        room = self._scratch.rest()
        raw = room.take((n * width,), BYTE)
        tensor = grid.tensor
        self._reader.read_into(tensor.path, tensor.offset + first * width, raw)
        values = scale_values(raw, grid.dtype)
        if (place := first_bad_scale(values)) is not None:
            raise bad(
                tensor.path,
                f"tensor {quoted(tensor.name)}: scale {first + place} is {values[place]:g}, which no scale can be: "
                "download or convert the model again",
            )
        return values.reshape(end - row, last - column)
