"""Codes of floats with a scale for each part of a matrix, FP8 and MXFP4; and FP8 without scales."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
from numpy.typing import NDArray

from streammerge.checkpoint.refs.float8 import WidenedRef
from streammerge.checkpoint.refs.quantized import QuantizedRef
from streammerge.dtypes import itemsize
from streammerge.io.buffer_pool import Bytes
from streammerge.io.pages import PAGE
from streammerge.io.reader import Reader
from streammerge.io.scratch import Scratch
from streammerge.records import dataclass
from streammerge.tensors.coded.base import (
    GRAIN,
    MOST_ELEMENTS,
    MOST_SCALES,
    Codes,
    Slot,
    Step,
    aligned,
    codes_of,
    in_slot,
)
from streammerge.tensors.coded.rectangles import Axis, cut, rectangles
from streammerge.tensors.integers import Rectangle
from streammerge.tensors.quantized import Part, Window

Pair = tuple[int, int]
"""Rows and columns."""


@dataclass(frozen=True, slots=True)
class ScaledFloats:
    """``value(code) * scale``; the arrays are codes and scales, fp32 or bytes of F8_E8M0. See the kernel `decode`."""

    element: str
    """The kind of code: F8_E4M3, F8_E5M2 or F4_E2M1."""
    skip: int
    pitch: int
    groups: int
    place: Pair
    """Row and column within the part of the first scale."""
    shape: Pair
    extent: Pair
    steps: Pair
    """Elements of the output from one row to the next, and from one column to the next."""
    powers: bool = False
    """Whether the scales are bytes of F8_E8M0."""


@dataclass(frozen=True, slots=True)
class PlainFloats:
    """Values of FP8 in bf16; the array is that of the codes."""

    element: str
    n: int


# --- with scales


@codes_of(QuantizedRef)
def _steps(ref: QuantizedRef, start: int, stop: int, slot: int) -> Iterator[Step]:
    own = _Scaled(ref, start, slot)
    rows, columns = own.tensor_shape
    for some in rectangles(start, stop, rows, columns):
        for part in cut(some, own.divides, turned=ref.encoding.turned):
            yield Step(own.nbytes(part), partial(own.fill, part))


class _Scaled:
    """One range of a tensor. Rectangles are the tensor's; parts are those of the matrices as they are stored."""

    def __init__(self, ref: QuantizedRef, start: int, slot: int) -> None:
        self._ref, self._start, self._slot = ref, start, slot
        self._turned = ref.encoding.turned
        self._sends_powers = (
            ref.scales.dtype == "F8_E8M0"
        )  # of groups of 32: in fp32 they are a fifth of all bytes
        _, rows, columns = ref.matrices
        self.tensor_shape = (columns, rows) if self._turned else (rows, columns)

    def divides(self, some: Rectangle) -> Axis | None:
        """See `cut`."""
        part = self._part(some)
        high, wide = part.shape
        fits = in_slot(self._codes(part)[1], self._scale_bytes(part)) <= self._slot
        if fits and high * wide <= MOST_ELEMENTS and self._scales(part) <= MOST_SCALES:
            return None
        return "lines" if high > 1 else "across"

    def nbytes(self, some: Rectangle) -> int:
        """Return the bytes that a step takes on the device."""
        part = self._part(some)
        return aligned(self._codes(part)[1]) + self._scale_bytes(part)

    def fill(self, some: Rectangle, reader: Reader, slot: Bytes) -> Codes:
        """See `Step`."""
        ref, part, room = self._ref, self._part(some), Slot(slot)
        first, nbytes, skip = self._codes(part)
        codes = room.read(reader, ref.source, first, nbytes)
        raw = np.empty(self._scales(part) * itemsize(ref.scales.dtype) + PAGE, np.uint8)
        scales = Window(reader, ref, Scratch(raw)).of(part)
        by_rows, by_columns = ref.scales.extent[1:]
        rows, columns = self.tensor_shape
        line = (some.matrix * rows + some.row) * columns + some.column
        how = ScaledFloats(
            element=ref.encoding.element,
            skip=skip,
            pitch=ref.matrices[2],
            groups=scales.shape[1],
            place=(part.row % by_rows, part.column % by_columns),
            shape=part.shape,
            extent=(by_rows, by_columns),
            steps=(1, columns) if self._turned else (columns, 1),
            powers=self._sends_powers,
        )
        sent = _powers(scales) if how.powers else scales
        return Codes((codes, room.put(sent)), how, line - self._start)

    def _part(self, some: Rectangle) -> Part:
        stored = some.turned if self._turned else some
        return Part(stored.matrix, stored.row, stored.end, stored.column, stored.last)

    def _codes(self, part: Part) -> tuple[int, int, int]:
        """Return the first byte of the codes of a part, their number (whole lines if it has several), codes before its first."""
        bits, (_, rows, columns) = self._ref.bits, self._ref.matrices
        begin = (part.matrix * rows + part.row) * columns + part.column
        end = begin + (part.shape[0] - 1) * columns + part.shape[1]
        first, last = begin * bits // 8, -(-end * bits // 8)
        return first, last - first, begin * bits % 8 // bits

    def _scales(self, part: Part) -> int:
        """Return the number of scales that are read for a part: whole lines of them if there are several."""
        _, by_row, by_column = self._ref.scales.extent
        high = (part.end - 1) // by_row - part.row // by_row + 1
        wide = (part.last - 1) // by_column - part.column // by_column + 1
        return wide if high == 1 else high * self._ref.scales.shape[2]

    def _scale_bytes(self, part: Part) -> int:
        return aligned((1 if self._sends_powers else 4) * self._scales(part))


def _powers(scales: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Return the codes of F8_E8M0 of powers of two: the exponents, of which 0 belongs to the subnormal 2**-127."""
    return (np.ascontiguousarray(scales).view(np.uint32) >> 23).astype(np.uint8)


# --- without scales


@codes_of(WidenedRef, accepts=lambda ref: ref.source.plain is not None)
def _plain_steps(ref: WidenedRef, start: int, stop: int, slot: int) -> Iterator[Step]:
    most = min(MOST_ELEMENTS, slot - 2 * PAGE)
    for first in range(start, stop, most):
        n = min(most, stop - first)
        yield Step(aligned(n), partial(_fill_plain, ref, first, n, first - start))


def _fill_plain(ref: WidenedRef, first: int, n: int, to: int, reader: Reader, slot: Bytes) -> Codes:
    codes = Slot(slot).read(reader, ref.stored, first, n)
    return Codes((codes,), PlainFloats(ref.stored.dtype, n), to)


assert MOST_ELEMENTS % GRAIN == 0
