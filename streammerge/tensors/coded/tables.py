"""Codes of four bits in groups of consecutive elements: NVFP4 with two scales, and bitsandbytes' blocks with a table."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from streammerge.checkpoint.refs.codebooks import BlocksOf4BitsRef, Nvfp4Ref
from streammerge.io.buffer_pool import Bytes
from streammerge.io.pages import PAGE
from streammerge.io.reader import Reader
from streammerge.records import dataclass
from streammerge.tensors.codebooks import largest_of_blocks, scale_codes, values_of_codes, whole_scale
from streammerge.tensors.coded.base import MOST_ELEMENTS, MOST_SCALES, Codes, Slot, Step, aligned, codes_of

_TABLE = 64
"""Bytes of a table of sixteen values in fp32."""


@dataclass(frozen=True, slots=True)
class TwiceScaled:
    """E2M1 codes times F8_E4M3 scales times, or by, one factor; the arrays are codes and scales, as they are stored."""

    skip: int
    before: int
    """Elements of the first group that precede the first code."""
    group: int
    factor: float
    divides: bool
    n: int


@dataclass(frozen=True, slots=True)
class Looked:
    """Values of a table times fp32 scales; the arrays are codes, the table in fp32, and scales."""

    skip: int
    high_first: bool
    before: int
    group: int
    n: int


def _most(slot: int, group: int, scale_bytes: int) -> int:
    """Return the elements of a step, an even number, whose codes and scales fit a slot."""
    room = slot - 2 * PAGE - _TABLE - 4 * scale_bytes
    fits = room * 2 * group // (group + 2 * scale_bytes)
    return max(2, min(MOST_ELEMENTS, group * MOST_SCALES, fits) // 2 * 2)


def _nbytes(first: int, last: int, group: int, scale_bytes: int) -> int:
    codes, scales = -(-last // 2) - first // 2, -(-last // group) - first // group
    return aligned(codes) + aligned(scale_bytes * scales)


@codes_of(Nvfp4Ref)
def _steps_of_nvfp4(ref: Nvfp4Ref, start: int, stop: int, slot: int) -> Iterator[Step]:
    most, per_matrix, first = _most(slot, ref.group, 1), ref.shape[-2] * ref.shape[-1], start
    while first < stop:
        matrix = first // per_matrix
        last = min(stop, (first // most + 1) * most, (matrix + 1) * per_matrix)
        fill = partial(_fill_nvfp4, ref, matrix, first, last, first - start)
        yield Step(_nbytes(first, last, ref.group, 1), fill)
        first = last


def _fill_nvfp4(
    ref: Nvfp4Ref, matrix: int, first: int, last: int, to: int, reader: Reader, slot: Bytes
) -> Codes:
    factor, room = whole_scale(reader, ref, matrix), Slot(slot)
    codes = room.read(reader, ref.source, first // 2, -(-last // 2) - first // 2)
    begins, ends = first // ref.group, -(-last // ref.group)
    scales = room.put(scale_codes(reader, ref, begins, ends))
    how = TwiceScaled(first % 2, first - begins * ref.group, ref.group, factor, ref.divides, last - first)
    return Codes((codes, scales), how, to)


@codes_of(BlocksOf4BitsRef)
def _steps_of_blocks(ref: BlocksOf4BitsRef, start: int, stop: int, slot: int) -> Iterator[Step]:
    most = _most(slot, ref.blocksize, 4)
    for first in range(start, stop, most):
        last = min(stop, first + most)
        nbytes = _nbytes(first, last, ref.blocksize, 4) + _TABLE
        yield Step(nbytes, partial(_fill_blocks, ref, first, last, first - start))


def _fill_blocks(ref: BlocksOf4BitsRef, first: int, last: int, to: int, reader: Reader, slot: Bytes) -> Codes:
    room = Slot(slot)
    codes = room.read(reader, ref.source, first // 2, -(-last // 2) - first // 2)
    table = room.put(values_of_codes(reader, ref.map))
    begins, ends = first // ref.blocksize, -(-last // ref.blocksize)
    scales = room.put(largest_of_blocks(reader, ref, begins, ends))
    how = Looked(first % 2, True, first - begins * ref.blocksize, ref.blocksize, last - first)
    return Codes((codes, table, scales), how, to)
