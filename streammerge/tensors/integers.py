"""Decode quantised tensors of integers as they are read; the bits do not depend on the cuts.

A part of a tensor is a rectangle of its stored matrix. Only the words that contain the rectangle, and the scales and
zero points of the groups of its rows and columns, are read and held.
"""

from __future__ import annotations

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from streammerge.checkpoint.refs.integers import AT_ONCE, IntegersRef, Packed
from streammerge.dtypes import itemsize
from streammerge.formats.readers import reads
from streammerge.formats.refs import READ_BLOCK, TensorRef
from streammerge.io.buffer_pool import Bytes
from streammerge.io.files import bad, quoted
from streammerge.io.reader import Reader
from streammerge.io.scratch import Scratch
from streammerge.numerics.elements import first_bad_scale, scale_values
from streammerge.numerics.packing import (
    NO_ZEROS,
    NONE,
    PAD,
    Floats32,
    integers_of,
    scale_integers,
    turned,
    unpacked,
)
from streammerge.records import dataclass
from streammerge.tensors.adapted import segments

Indices = NDArray[np.int64]
_WORDS = 32
"""A number of integers that fills whole words for any number of bits."""
_NARROWEST = 128
"""Columns of a step, if there are as many: runs of one scale are long enough for compiled loops."""
WORTH_READING = 4
"""A contiguous range is read at once, not line by line, if it is at most this many times the bytes needed."""


@dataclass(frozen=True, slots=True)
class Rectangle:
    """A part of one of a tensor's matrices."""

    matrix: int
    row: int
    end: int
    column: int
    last: int

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.end - self.row, self.last - self.column

    @property
    def turned(self) -> Rectangle:
        """The same part of the transposed matrix."""
        return Rectangle(self.matrix, self.column, self.last, self.row, self.end)


@dataclass(frozen=True, slots=True)
class Lines:
    """Some bytes of each of some lines of a file, and `PAD` bytes after the last."""

    data: NDArray[np.uint8]
    pitch: int
    """Bytes from one line to the next."""


@reads(IntegersRef)
def read_integers(
    reader: Reader, ref: IntegersRef, start: int, stop: int, target: Bytes, scratch: Scratch
) -> None:
    """Decode elements `start` to `stop` of a tensor to the beginning of `target`.

    Raises
    ------
    ModelError
        If a scale is NaN, infinite or negative, or a group or a zero point is out of range.
    WorldError
        If a file ends early or the device fails.
    """
    out = target[: 4 * (stop - start)].view(np.float32)
    rows, columns = ref.shape[-2:]
    index, grids = listed_groups(reader, ref), Grids(reader, ref)
    # Lines of a transposed matrix are read in parts, which are as long as a piece is high.
    most = stop - start if ref.transposed else READ_BLOCK
    for row, end, first, last in segments(start, stop, columns, rows, most):
        matrix, width = row // rows, last - first
        begins = row * columns + first - start
        high, wide = _steps(ref, end - row, width)
        for top in range(row - matrix * rows, end - matrix * rows, high):
            bottom = min(end - matrix * rows, top + high)
            for left in range(first, last, wide):
                some = Rectangle(matrix, top, bottom, left, min(last, left + wide))
                at = begins + (top + matrix * rows - row) * width + left - first
                _decode(reader, ref, index, grids, some, out[at:], width)


def _steps(ref: IntegersRef, height: int, width: int) -> tuple[int, int]:
    """Return the rows and columns of a step of decoding, in whole words if codes are packed along the inputs."""
    if not ref.transposed:
        wide = min(width, AT_ONCE)
        return min(height, max(1, AT_ONCE // wide)), wide
    # If groups are listed, the scales of whole rows are read.
    of_row = _NARROWEST if ref.groups.index is None else max(_NARROWEST, n_groups(ref))
    high = min(height, max(1, AT_ONCE // of_row))
    return high, min(width, max(_WORDS, AT_ONCE // high // _WORDS * _WORDS))


def _decode(
    reader: Reader,
    ref: IntegersRef,
    index: Indices | None,
    grids: Grids,
    some: Rectangle,
    out: Floats32,
    pitch: int,
) -> None:
    """Write the values of a rectangle; `pitch` is the distance between its rows in `out`."""
    groups, packed = ref.groups, ref.codes
    extent = (groups.columns, groups.rows) if ref.transposed else (groups.rows, groups.columns)
    lines = some.row // extent[0], (some.end - 1) // extent[0] + 1
    if index is None:
        listed = NONE
        left, right = some.column // extent[1], (some.last - 1) // extent[1] + 1
    else:
        listed = index[some.column : some.last]
        left, right = 0, n_groups(ref)  # the same for all columns, so that it is read once
    scales, zeros = grids.of(Rectangle(some.matrix, *lines, left, right))
    codes = read_codes(reader, packed, some, transposed=ref.transposed)
    flip, offset = meaning_of(packed)
    place = some.row, some.column
    scale_integers(
        codes.data,
        codes.pitch,
        flip,
        offset,
        zeros,
        scales,
        listed,
        place,
        some.shape,
        extent,
        ref.divisor,
        out,
        pitch,
    )


class Grids:
    """Scales and zero points of a part of a tensor; those of the previous part are reused if they are the same."""

    def __init__(self, reader: Reader, ref: IntegersRef) -> None:
        self._reader, self._ref = reader, ref
        self._known: Rectangle | None = None
        self._found = NO_ZEROS, NO_ZEROS

    def of(self, part: Rectangle) -> tuple[Floats32, Floats32]:
        """Return the scales and the zero points of a rectangle of groups."""
        if part != self._known:
            self._found = _scales(self._reader, self._ref, part), _zeros(self._reader, self._ref, part)
            self._known = part
        return self._found


def n_groups(ref: IntegersRef) -> int:
    """Return the number of groups of a row."""
    return ref.scales.shape[-2] if ref.transposed else ref.scales.shape[-1]


def meaning_of(packed: Packed) -> tuple[int, int]:
    """Return the bits of a code to invert, and the number to add, which give the integer."""
    return (128, -128) if packed.signed else (0, packed.offset)


def listed_groups(reader: Reader, ref: IntegersRef) -> Indices | None:
    """Return the listed group of each column; None if none are listed, or if the list is in order.

    A list that consists only of -1 means that the columns are in order, as compressed-tensors wrote it.
    """
    listed = ref.groups.index
    if listed is None:
        return None
    raw = np.empty(listed.nbytes, np.uint8)
    reader.read_into(listed.path, listed.offset, raw)
    index = raw.view("<i4").astype(np.int64)
    if not ref.transposed and (index == -1).all():
        return None
    n = n_groups(ref)
    if index.min() < 0 or index.max() >= n:
        wrong = int(np.argmax((index < 0) | (index >= n)))
        raise bad(
            listed.path,
            f"tensor {quoted(listed.name)}: entry {wrong} is {index[wrong]}, and there are {n} groups: "
            "download or convert the model again",
        )
    size = ref.groups.rows if ref.transposed else ref.groups.columns
    return None if np.array_equal(index, np.arange(index.size) // size) else index


def _scales(reader: Reader, ref: IntegersRef, part: Rectangle) -> Floats32:
    """Return a rectangle of a matrix of scales, in fp32 and in the orientation of the tensor."""
    tensor = ref.scales
    width = itemsize(tensor.dtype)
    high, wide = _scale_matrix(tensor, ref)
    matrix = part.matrix if tensor.n_elements > high * wide else 0
    stored = part.turned if ref.transposed else part
    edges = stored.column * width, stored.last * width
    lines = _lines(
        reader, tensor, matrix * high * wide * width, wide * width, (stored.row, stored.end), edges
    )
    raw = as_strided(lines.data, (stored.shape[0], edges[1] - edges[0]), (lines.pitch, 1), writeable=False)
    values = scale_values(np.ascontiguousarray(raw).reshape(-1), tensor.dtype)
    if (place := first_bad_scale(values)) is not None:
        row, column = divmod(place, stored.shape[1])
        raise bad(
            tensor.path,
            f"tensor {quoted(tensor.name)}: scale [{stored.row + row}, {stored.column + column}] is {values[place]:g}, "
            "which no scale can be: download or convert the model again",
        )
    found = values.reshape(stored.shape)
    return np.ascontiguousarray(found.T) if ref.transposed else found


def _scale_matrix(tensor: TensorRef, ref: IntegersRef) -> tuple[int, int]:
    """Return rows and columns of the scales as a matrix; a vector has one scale per row, a scalar one in all."""
    if len(tensor.shape) >= 2 and (len(tensor.shape) == len(ref.shape)):
        return tensor.shape[-2], tensor.shape[-1]
    return tensor.n_elements, 1


def _zeros(reader: Reader, ref: IntegersRef, part: Rectangle) -> Floats32:
    """Return zero points of the same groups; `NO_ZEROS` if there are none."""
    packed = ref.zeros
    if packed is None:
        return NO_ZEROS
    codes = read_codes(reader, packed, part, transposed=ref.transposed)
    out = integers_of(
        as_strided(codes.data, part.shape, (codes.pitch, 1), writeable=False), *meaning_of(packed)
    )
    if ref.largest_zero is not None and out.max(initial=0) > ref.largest_zero:
        raise bad(
            packed.tensor.path,
            f"tensor {quoted(packed.tensor.name)} holds a zero point of {int(out.max())}, which loaders read "
            f"differently in this format: save the model as gptq_v2, or dequantise it with the library that wrote it",
        )
    return out


def read_codes(reader: Reader, packed: Packed, some: Rectangle, *, transposed: bool) -> Lines:
    """Return the codes of a rectangle of the tensor, one per byte.

    Parameters
    ----------
    transposed
        Whether the stored matrix is the tensor's transposed one.
    """
    stored = some.turned if transposed else some
    if packed.axis == 0:
        # The words of one column become a line, in which integers lie as they do along the columns.
        codes, shape = _down_columns(reader, packed, stored), stored.turned.shape
    else:
        codes, shape = _along_rows(reader, packed, stored), stored.shape
    if (packed.axis == 0) == transposed:
        return codes
    return Lines(turned(as_strided(codes.data, shape, (codes.pitch, 1))).reshape(-1), some.shape[1])


def _along_rows(reader: Reader, packed: Packed, stored: Rectangle) -> Lines:
    """Return the codes of a stored rectangle whose integers are packed along its rows."""
    first, last = stored.column, stored.last
    if packed.order:
        each = len(packed.order)
        first, last = first // each * each, -(-last // each) * each
    bits = packed.bits
    edges = first * bits // 8, -(-last * bits // 8)
    lines = _lines(reader, packed.tensor, *matrix_of(packed, stored.matrix), (stored.row, stored.end), edges)
    if bits == 8 and not packed.order:
        return lines
    shape = stored.shape[0], last - first
    codes = unpacked(lines.data, lines.pitch, first * bits % 8, bits, shape, packed.order)
    return Lines(codes.reshape(-1)[stored.column - first :], shape[1])


def _down_columns(reader: Reader, packed: Packed, stored: Rectangle) -> Lines:
    """Return the codes of a stored rectangle whose integers are packed along its columns: a line for each column."""
    bits, (n, columns) = packed.bits, stored.shape
    begins, ends = stored.row * bits // 32, -(-stored.end * bits // 32)
    edges = 4 * stored.column, 4 * stored.last
    lines = _lines(reader, packed.tensor, *matrix_of(packed, stored.matrix), (begins, ends), edges)
    words = as_strided(lines.data.view(np.uint8), (ends - begins, 4 * columns), (lines.pitch, 1))
    turned_words = np.empty(columns * (ends - begins) * 4 + PAD, np.uint8)
    by_column = turned_words[:-PAD].view("<u4").reshape(columns, ends - begins)
    by_column[...] = np.ascontiguousarray(words).view("<u4").T
    skip = stored.row * bits - 32 * begins
    codes = unpacked(turned_words, 4 * (ends - begins), skip, bits, (columns, n))
    return Lines(codes.reshape(-1), n)


def matrix_of(packed: Packed, matrix: int) -> tuple[int, int]:
    """Return where a matrix of a packed tensor begins, and the bytes of its lines; one matrix serves all experts."""
    tensor = packed.tensor
    lines, words = tensor.shape[-2:]
    pitch = words * itemsize(tensor.dtype)
    return (matrix * lines * pitch if tensor.nbytes > lines * pitch else 0), pitch


def _lines(
    reader: Reader, tensor: TensorRef, base: int, pitch: int, lines: tuple[int, int], edges: tuple[int, int]
) -> Lines:
    """Return a range of bytes of each of some lines; the matrix begins at `base`."""
    first, last = lines
    left, right = edges
    offset = tensor.offset + base + first * pitch
    n, wide = last - first, right - left
    if wide * WORTH_READING >= pitch or n == 1:
        raw = np.empty((n - 1) * pitch + wide + PAD, np.uint8)
        reader.read_into(tensor.path, offset + left, raw[:-PAD])
        return Lines(raw, pitch)
    raw = np.empty(n * wide + PAD, np.uint8)
    some = raw[:-PAD].reshape(n, wide)
    reader.read_parts(tensor.path, ((offset + left + line * pitch, [some[line].data]) for line in range(n)))
    return Lines(raw, wide)
