"""Packed integers with scales and zero points: compressed-tensors, GPTQ, AWQ, LLM.int8.

Integers stay in their words until the device takes them out. Scales and zero points, one for each group, are read, checked
and widened to fp32 in this process, as for the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np

from streammerge.checkpoint.refs.integers import IntegersRef
from streammerge.dtypes import itemsize
from streammerge.io.buffer_pool import Bytes
from streammerge.io.reader import Reader
from streammerge.records import dataclass
from streammerge.tensors.coded.base import (
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
from streammerge.tensors.integers import (
    WORTH_READING,
    Grids,
    Indices,
    Rectangle,
    listed_groups,
    matrix_of,
    meaning_of,
    n_groups,
)

Pair = tuple[int, int]
"""Rows and columns."""
_WORD_OF = 32
"""Integers that begin a word, whatever their bits, come at multiples of it."""


@dataclass(frozen=True, slots=True)
class ScaledIntegers:
    """``(integer - zero point) * scale / divisor``; see the kernel `decode_integers`.

    The arrays are the words, scales and zero points in fp32, and the listed groups of columns, int32; the last two may be
    empty.
    """

    across_pitch: int
    word_pitch: int
    bits: int
    skip: int
    order: tuple[int, ...]
    down: bool
    flip: int
    offset: int
    groups: int
    place: Pair
    shape: Pair
    extent: Pair
    divisor: int
    row_step: int


@dataclass(frozen=True, slots=True)
class _Lines:
    """Bytes of each of some lines of a file."""

    first: int
    """The first byte, counted from the tensor's."""
    n: int
    wide: int
    """Bytes of each line."""
    pitch: int
    """Bytes from one line to the next in the file."""
    skip: int
    """Integers before the first in its word."""

    @property
    def contiguous(self) -> bool:
        """Whether they are read at once, with what lies between them."""
        return self.n == 1 or self.wide * WORTH_READING >= self.pitch

    @property
    def nbytes(self) -> int:
        """Bytes that are read."""
        return (self.n - 1) * self.pitch + self.wide if self.contiguous else self.n * self.wide


@codes_of(IntegersRef)
def _steps(ref: IntegersRef, start: int, stop: int, slot: int) -> Iterator[Step]:
    own = _Integers(ref, start, slot)
    for some in rectangles(start, stop, *ref.shape[-2:]):
        for part in cut(some, own.divides, turned=ref.transposed):
            yield Step(own.nbytes(part), partial(own.fill, part))


class _Integers:
    """One range of a tensor; all rectangles are the tensor's."""

    def __init__(self, ref: IntegersRef, start: int, slot: int) -> None:
        self._ref, self._start, self._slot = ref, start, slot
        groups = ref.groups
        self._extent = (groups.columns, groups.rows) if ref.transposed else (groups.rows, groups.columns)
        self._known: tuple[Indices | None, Grids] | None = None

    def divides(self, some: Rectangle) -> Axis | None:
        """See `cut`."""
        high, wide = some.shape
        of_rows = self._ref.groups.index is not None  # its scales are as many for any columns
        if self._groups(some) > MOST_SCALES and of_rows and high > 1:
            return "across" if self._ref.transposed else "lines"
        fits = in_slot(self._lines(some).nbytes, self._other_bytes(some)) <= self._slot
        if fits and high * wide <= MOST_ELEMENTS and self._groups(some) <= MOST_SCALES:
            return None
        lines, grain = (wide, _WORD_OF) if self._ref.transposed else (high, 1)
        return "lines" if lines > grain else "across"

    def nbytes(self, some: Rectangle) -> int:
        """Return the bytes that a step takes on the device."""
        return aligned(self._lines(some).nbytes) + self._other_bytes(some)

    def fill(self, some: Rectangle, reader: Reader, slot: Bytes) -> Codes:
        """See `Step`."""
        ref, packed, room = self._ref, self._ref.codes, Slot(slot)
        if self._known is None:
            self._known = listed_groups(reader, ref), Grids(reader, ref)
        index, grids = self._known
        codes, pitch = self._read(reader, self._lines(some), room)
        by_rows, by_columns = self._extent
        left, right = self._columns_of_groups(some)
        if index is None and ref.groups.index is not None:  # the list is in order
            left, right = some.column // by_columns, (some.last - 1) // by_columns + 1
        lines = some.row // by_rows, (some.end - 1) // by_rows + 1
        scales, zeros = grids.of(Rectangle(some.matrix, *lines, left, right))
        listed = np.empty(0, np.int32) if index is None else index[some.column : some.last].astype(np.int32)
        flip, offset = meaning_of(packed)
        rows, columns = ref.shape[-2:]
        how = ScaledIntegers(
            across_pitch=pitch if packed.axis == 1 else 4,
            word_pitch=4 if packed.axis == 1 else pitch,
            bits=packed.bits,
            skip=self._lines(some).skip,
            order=packed.order or tuple(range(8)),
            down=(packed.axis == 0) != ref.transposed,
            flip=flip,
            offset=offset,
            groups=scales.shape[1],
            place=(some.row % by_rows, some.column % by_columns),
            shape=some.shape,
            extent=self._extent,
            divisor=ref.divisor,
            row_step=columns,
        )
        first = (some.matrix * rows + some.row) * columns + some.column - self._start
        return Codes((codes, room.put(scales), room.put(zeros), room.put(listed)), how, first)

    def _read(self, reader: Reader, lines: _Lines, room: Slot) -> tuple[Bytes, int]:
        """Return the words, and the bytes from one line of them to the next."""
        tensor = self._ref.codes.tensor
        if lines.contiguous:
            return room.read(reader, tensor, lines.first, lines.nbytes), lines.pitch
        data = room.take(lines.nbytes)
        offset, by_line = tensor.offset + lines.first, data.reshape(lines.n, lines.wide)
        parts = ((offset + i * lines.pitch, [by_line[i].data]) for i in range(lines.n))
        reader.read_parts(tensor.path, parts)
        return data, lines.wide

    def _lines(self, some: Rectangle) -> _Lines:
        """Return where the words of a rectangle lie."""
        packed = self._ref.codes
        stored = some.turned if self._ref.transposed else some
        base, pitch = matrix_of(packed, stored.matrix)
        if packed.axis == 0:
            begin = stored.row // _WORD_OF * _WORD_OF
            row, end = begin * packed.bits // 32, -(-stored.end * packed.bits // 32)
            first, last, skip = 4 * stored.column, 4 * stored.last, stored.row - begin
        else:
            row, end = stored.row, stored.end
            begin, each = stored.column // _WORD_OF * _WORD_OF, len(packed.order) or 1
            finish = -(-stored.last // each) * each
            first, last = begin * packed.bits // 8, -(-finish * packed.bits // 8)
            skip = stored.column - begin
        return _Lines(base + row * pitch + first, end - row, last - first, pitch, skip)

    def _columns_of_groups(self, some: Rectangle) -> Pair:
        """Return the first column of scales, and the end, that a rectangle may need."""
        if self._ref.groups.index is not None:
            return 0, n_groups(self._ref)
        wide = self._extent[1]
        return some.column // wide, (some.last - 1) // wide + 1

    def _groups(self, some: Rectangle) -> int:
        left, right = self._columns_of_groups(some)
        return ((some.end - 1) // self._extent[0] - some.row // self._extent[0] + 1) * (right - left)

    def _other_bytes(self, some: Rectangle) -> int:
        """Return the bytes of scales, zero points and listed groups."""
        ref, of_scales = self._ref, aligned(4 * self._groups(some))
        zeros = 0 if ref.zeros is None else of_scales
        listed = 0 if ref.groups.index is None else aligned(itemsize("I32") * some.shape[1])
        return of_scales + zeros + listed
