"""Decode quantised tensors of integers as they are read; the bits do not depend on the cuts.

A part of a tensor is a rectangle of its stored matrix. Only the words that contain the rectangle, and the scales and
zero points of the groups of its rows and columns, are read and held.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from streammerge.checkpoint.refs.integers import AT_ONCE, IntegersRef, Packed
from streammerge.dtypes import itemsize
from streammerge.formats.readers import reads
from streammerge.formats.refs import TensorRef
from streammerge.io.buffer_pool import Bytes
from streammerge.io.files import bad, quoted
from streammerge.io.reader import Reader
from streammerge.io.scratch import Scratch
from streammerge.numerics.casts import Floats
from streammerge.numerics.elements import first_bad_scale, scale_values
from streammerge.numerics.packing import SIGNED, reordered, steps_of, unpacked_rows
from streammerge.tensors.adapted import segments

Indices = NDArray[np.int64]
_WORDS = 32
"""A number of integers that fills whole words for any number of bits."""
_WORTH_READING = 4
"""A contiguous range is read at once, not line by line, if it is at most this many times the bytes needed."""


@dataclass(frozen=True, slots=True)
class Rectangle:
    """A part of one of a tensor's stored matrices."""

    matrix: int
    row: int
    end: int
    column: int
    last: int


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
    index = _index(reader, ref)
    for row, end, first, last in segments(start, stop, columns, rows):
        matrix = row // rows
        begins = row * columns + first - start
        part = out[begins : begins + (end - row) * (last - first)].reshape(end - row, last - first)
        high, wide = _steps(ref, *part.shape)
        for top in range(0, end - row, high):
            for left in range(0, last - first, wide):
                some = part[top : top + high, left : left + wide]
                place = row - matrix * rows + top, first + left
                some[...] = _values(reader, ref, index, _stored(ref, matrix, place, some.shape))


def _steps(ref: IntegersRef, height: int, width: int) -> tuple[int, int]:
    """Return the rows and columns of a step of decoding, in whole words if codes are packed along the inputs."""
    wide = min(width, AT_ONCE)
    if ref.transposed:
        wide = min(width, max(_WORDS, AT_ONCE // height // _WORDS * _WORDS))
    return min(height, max(1, AT_ONCE // wide)), wide


def _stored(ref: IntegersRef, matrix: int, place: tuple[int, int], shape: tuple[int, ...]) -> Rectangle:
    (row, column), (height, width) = place, shape
    if ref.transposed:
        return Rectangle(matrix, column, column + width, row, row + height)
    return Rectangle(matrix, row, row + height, column, column + width)


def _values(reader: Reader, ref: IntegersRef, index: Indices | None, some: Rectangle) -> NDArray[np.float32]:
    values = read_packed(reader, ref.codes, some)
    by_row, by_column = _groups(ref, index, some)
    lines, line_of = np.unique(by_row, return_inverse=True)
    left, right = int(by_column.min()), int(by_column.max()) + 1
    spread = _Spread(line_of, by_column - left, ref.groups.columns if index is None else 0, some.column)
    scales = _scales(reader, ref, some.matrix, lines, left, right)
    zeros = _zeros(reader, ref, some.matrix, lines, left, right)
    with np.errstate(over="ignore"):
        if zeros is not None:
            values = spread.apply(np.subtract, values, zeros)
        if ref.divisor == 1:
            values = spread.apply(np.multiply, values, scales)
        else:  # The product is exact in fp64.
            exact = spread.apply(np.multiply, values.astype(np.float64), scales.astype(np.float64))
            values = (exact / ref.divisor).astype(np.float32)
    return values.T if ref.transposed else values


@dataclass(frozen=True, slots=True)
class _Spread:
    """The line and column of scales for each row and column of a rectangle."""

    line_of: Indices
    column_of: Indices
    size: int
    """Number of consecutive columns that share a scale; 0 if the groups are listed."""
    first: int
    """The index of the first column in its line."""

    def apply(self, operation: np.ufunc, values: Floats, of_groups: Floats) -> Floats:
        """Return `operation` of the values and their groups' entries, in place if possible."""
        if of_groups.shape[0] > 1:
            of_groups = of_groups[self.line_of]
        n = values.shape[1]
        if of_groups.shape[1] == 1 or self.size == 1:
            return operation(values, of_groups)
        if self.size and not self.first % self.size and not n % self.size and values.flags.c_contiguous:
            grouped = values.reshape(values.shape[0], -1, self.size)
            operation(grouped, of_groups[:, :, None], out=grouped)
            return values
        return operation(values, np.take(of_groups, self.column_of, axis=1))


def _groups(ref: IntegersRef, index: Indices | None, some: Rectangle) -> tuple[Indices, Indices]:
    """Return the rows and columns of scales for the rows and columns of a rectangle."""
    groups = ref.groups
    by_row = np.arange(some.row, some.end) // groups.rows
    by_column = np.arange(some.column, some.last) // groups.columns
    if index is None:
        return by_row, by_column
    if ref.transposed:
        return index[some.row : some.end], by_column
    return by_row, index[some.column : some.last]


def _index(reader: Reader, ref: IntegersRef) -> Indices | None:
    """Return the listed group of each column, or of each row of a transposed tensor; None if not listed.

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
    n = ref.scales.shape[-2] if ref.transposed else ref.scales.shape[-1]
    if index.min() < 0 or index.max() >= n:
        wrong = int(np.argmax((index < 0) | (index >= n)))
        raise bad(
            listed.path,
            f"tensor {quoted(listed.name)}: entry {wrong} is {index[wrong]}, and there are {n} groups: "
            "download or convert the model again",
        )
    return index


def _scales(
    reader: Reader, ref: IntegersRef, matrix: int, lines: Indices, left: int, right: int
) -> NDArray[np.float32]:
    """Return a selection of lines and columns of a matrix of scales, in fp32."""
    tensor = ref.scales
    width = itemsize(tensor.dtype)
    high, wide = _matrix_of(tensor, ref)
    out = np.empty((lines.size, right - left), np.float32)
    for begin, end in _runs(lines):
        raw = _rectangle(
            reader, tensor, matrix * high * wide * width, wide * width,
            (int(lines[begin]), int(lines[end - 1]) + 1), (left * width, right * width),
        )  # fmt: skip
        values = scale_values(np.ascontiguousarray(raw).reshape(-1), tensor.dtype)
        if (place := first_bad_scale(values)) is not None:
            row, column = divmod(place, right - left)
            raise bad(
                tensor.path,
                f"tensor {quoted(tensor.name)}: scale [{lines[begin] + row}, {left + column}] is {values[place]:g}, "
                "which no scale can be: download or convert the model again",
            )
        out[begin:end] = values.reshape(end - begin, -1)
    return out


def _matrix_of(tensor: TensorRef, ref: IntegersRef) -> tuple[int, int]:
    """Return rows and columns of the scales as a matrix; a vector has one scale per row, a scalar one in all."""
    if len(tensor.shape) >= 2 and (len(tensor.shape) == len(ref.shape)):
        return tensor.shape[-2], tensor.shape[-1]
    return tensor.n_elements, 1


def _zeros(
    reader: Reader, ref: IntegersRef, matrix: int, lines: Indices, left: int, right: int
) -> NDArray[np.float32] | None:
    """Return zero points of the same groups; None if there are none."""
    packed = ref.zeros
    if packed is None:
        return None
    out = np.empty((lines.size, right - left), np.float32)
    for begin, end in _runs(lines):
        some = Rectangle(matrix, int(lines[begin]), int(lines[end - 1]) + 1, left, right)
        out[begin:end] = read_packed(reader, packed, some)
    if ref.largest_zero is not None and out.max(initial=0) > ref.largest_zero:
        raise bad(
            packed.tensor.path,
            f"tensor {quoted(packed.tensor.name)} holds a zero point of {int(out.max())}, which loaders read "
            f"differently in this format: save the model as gptq_v2, or dequantise it with the library that wrote it",
        )
    return out


def _runs(lines: Indices) -> list[tuple[int, int]]:
    """Return the runs of consecutive lines, ascending, each line once."""
    breaks = np.flatnonzero(np.diff(lines) != 1) + 1
    edges = [0, *breaks.tolist(), lines.size]
    return list(pairwise(edges))


def read_packed(reader: Reader, packed: Packed, some: Rectangle) -> NDArray[np.float32]:
    """Return the integers of a rectangle, with their offset added, as fp32 [rows, columns]."""
    tensor, bits = packed.tensor, packed.bits
    lines, words = tensor.shape[-2:]
    width = itemsize(tensor.dtype)
    base, pitch = some.matrix * lines * words * width, words * width
    if packed.axis == 0:
        begins, ends = some.row * bits // 32, -(-some.end * bits // 32)
        raw = _rectangle(reader, tensor, base, pitch, (begins, ends), (4 * some.column, 4 * some.last))
        whole = np.ascontiguousarray(raw).view("<u4")
        steps = unpacked_rows(whole, bits, some.row, some.end - some.row).astype(np.float32)
        steps += np.float32(packed.offset)
        return steps
    first, last = some.column, some.last
    if packed.order:
        each = len(packed.order)
        first, last = first // each * each, -(-last // each) * each
    edges = first * bits // 8, -(-last * bits // 8)
    raw = _rectangle(reader, tensor, base, pitch, (some.row, some.end), edges)
    steps = steps_of(raw, bits, first, last - first, SIGNED if packed.signed else packed.offset)
    if packed.order:
        return reordered(steps, packed.order)[:, some.column - first : some.last - first]
    return steps


def _rectangle(
    reader: Reader, tensor: TensorRef, base: int, pitch: int, lines: tuple[int, int], edges: tuple[int, int]
) -> NDArray[np.uint8]:
    """Return a range of bytes of each of some lines, [lines, bytes]; the matrix begins at `base`."""
    first, last = lines
    left, right = edges
    offset = tensor.offset + base + first * pitch
    n, wide = last - first, right - left
    if wide * _WORTH_READING >= pitch or n == 1:
        raw = np.empty((n - 1) * pitch + wide, np.uint8)
        reader.read_into(tensor.path, offset + left, raw)
        return np.lib.stride_tricks.as_strided(raw, (n, wide), (pitch, 1), writeable=False)
    some = np.empty((n, wide), np.uint8)
    reader.read_parts(tensor.path, ((offset + left + line * pitch, [some[line].data]) for line in range(n)))
    return some
