"""Small integers and codes out of the bytes that they are packed in, and the values they stand for.

Each function has a compiled loop (`streammerge.numerics.unpacking`) and a formula of numpy, with the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from streammerge.numerics.casts import from_bf16, table
from streammerge.numerics.compiled import is_compiled

GROUP = "unpacking"
"""The group of compiled kernels."""
Codes = NDArray[np.uint8]
Floats32 = NDArray[np.float32]
Pair = tuple[int, int]
"""Rows and columns."""
PAD = 8
"""Bytes after the last line of packed integers that may be read; their content has no effect."""
NONE = np.empty(0, np.int64)
"""No listed groups."""
NO_ZEROS = np.empty((0, 0), np.float32)


def unpacked(raw: Codes, pitch: int, skip: int, bits: int, shape: Pair, order: Sequence[int] = ()) -> Codes:
    """Return the integers of each line of bytes: integer c at bit ``skip + c * bits``, little endian.

    Parameters
    ----------
    raw
        The lines, and `PAD` bytes.
    pitch
        Bytes from one line to the next.
    bits
        At most 8; 8 only if `skip` is a multiple of 8.
    shape
        Lines, and integers of each.
    order
        The position of each of eight integers, if not in order.

    >>> raw = np.array([0x21, 0x43] + PAD * [0], np.uint8)
    >>> unpacked(raw, 2, 0, 4, (1, 4)).tolist()
    [[1, 2, 3, 4]]
    """
    shifts = bits * np.array(order or range(8), np.uint64)
    if not is_compiled(GROUP):
        return unpacked_by_formula(raw, pitch, skip, bits, shape, shifts)
    from streammerge.numerics import unpacking

    kernel: Any = unpacking.unpack
    out = np.empty(shape, np.uint8)
    kernel(raw, pitch, skip, bits, shifts, shape, out.reshape(-1))
    return out


def unpacked_by_formula(
    raw: Codes, pitch: int, skip: int, bits: int, shape: Pair, shifts: NDArray[np.uint64]
) -> Codes:
    """Return what `unpacked` does, by numpy."""
    c = np.arange(shape[1])
    starts = skip + c // 8 * 8 * bits + shifts.astype(np.int64)[c % 8]
    places = starts // 8
    lines = as_strided(raw, (shape[0], int(places.max(initial=0)) + 2), (pitch, 1), writeable=False)
    pairs = lines[:, places + 1].astype(np.uint16)
    pairs <<= np.uint16(8)
    pairs |= lines[:, places]
    pairs >>= (starts % 8).astype(np.uint16)
    return (pairs & np.uint16((1 << bits) - 1)).astype(np.uint8)


def turned(codes: Codes) -> Codes:
    """Return a matrix with rows and columns exchanged, contiguous."""
    if not is_compiled(GROUP):
        return np.ascontiguousarray(codes.T)
    from streammerge.numerics import decoding

    kernel: Any = decoding.turn
    out = np.empty(codes.shape[::-1], np.uint8)
    kernel(np.ascontiguousarray(codes), out.reshape(-1), codes.shape[0])
    return out


def integers_of(codes: Codes, flip: int, offset: int) -> Floats32:
    """Return codes as numbers in fp32: the bits of `flip` are inverted, then `offset` is added."""
    return ((codes ^ np.uint8(flip)).astype(np.int32) + np.int32(offset)).astype(np.float32)


def scale_integers(
    codes: Codes,
    pitch: int,
    flip: int,
    offset: int,
    zeros: Floats32,
    scales: Floats32,
    columns_of: NDArray[np.int64],
    place: Pair,
    shape: Pair,
    extent: Pair,
    divisor: int,
    out: Floats32,
    out_pitch: int,
) -> None:
    """Write ``(integer - zero point) * scale / divisor``, rounded once to fp32, for a rectangle of a matrix.

    Parameters
    ----------
    codes, pitch
        Bytes, and the distance from one row to the next.
    flip, offset
        See `integers_of`.
    zeros
        [r, c], one for each scale; `NO_ZEROS` if there are none.
    scales
        [r, c], from the scale of the first element on.
    columns_of
        The column of `scales` of each column, if listed; else `NONE`.
    place
        Row and column of the first element in its matrix.
    extent
        Rows and columns of the matrix that one scale serves.
    divisor
        1 if there is none.
    out, out_pitch
        The target, and the elements from one of its rows to the next.
    """
    if is_compiled(GROUP):
        from streammerge.numerics import unpacking

        kernel: Any = unpacking.scale_integers
        kernel(
            codes, pitch, np.uint8(flip), offset, zeros, scales, columns_of, place, shape, extent, divisor, out, out_pitch
        )  # fmt: skip
    else:
        values = as_strided(out, shape, (4 * out_pitch, 4))
        numbers = integers_of(as_strided(codes, shape, (pitch, 1), writeable=False), flip, offset)
        values[...] = scaled_by_formula(numbers, zeros, scales, columns_of, place, extent, divisor)


def scaled_by_formula(
    numbers: Floats32,
    zeros: Floats32,
    scales: Floats32,
    columns_of: NDArray[np.int64],
    place: Pair,
    extent: Pair,
    divisor: int,
) -> Floats32:
    """Return what `scale_integers` writes for numbers, [rows, columns], by numpy; it overwrites them."""
    (row, column), (rows, columns), (by_rows, by_columns) = place, numbers.shape, extent
    lines = (row + np.arange(rows)) // by_rows - row // by_rows
    if not columns_of.size:
        columns_of = (column + np.arange(columns)) // by_columns - column // by_columns
    groups = np.ix_(lines, columns_of)
    with np.errstate(over="ignore"):
        if zeros.size:
            numbers -= zeros[groups]
        if divisor == 1:
            numbers *= scales[groups]
            return numbers
        exact = numbers.astype(np.float64)  # it holds the product
        exact *= scales[groups]
        exact /= divisor
        return exact.astype(np.float32)


def look_up(
    raw: Codes,
    skip: int,
    high_first: bool,
    tables: Floats32,
    rows: NDArray[np.int32],
    before: int,
    group: int,
    out: Floats32,
) -> None:
    """Write the values that codes of 4 bits, two to a byte, have in the table of their group.

    Parameters
    ----------
    skip
        Codes before the first: 0 or 1.
    high_first
        Whether the first of two codes is in the high half.
    tables
        [k, 16]: values by code.
    rows
        The table of each group.
    before
        Elements of the first group that precede the first code.
    group
        Elements of a group.
    """
    if is_compiled(GROUP):
        from streammerge.numerics import unpacking

        kernel: Any = unpacking.look_up
        kernel(raw, skip, high_first, tables, rows, before, group, out)
    else:
        places = (np.repeat(rows, group)[before : before + out.size].astype(np.intp)) << 4
        places |= pairs_of(raw, high_first=high_first)[skip : skip + out.size]
        np.take(tables.reshape(-1), places, out=out)


def pairs_of(raw: Codes, *, high_first: bool) -> Codes:
    """Return the two codes of 4 bits of each byte, one after the other.

    >>> pairs_of(np.array([0x21], np.uint8), high_first=False).tolist()
    [1, 2]
    """
    out = np.empty((raw.size, 2), np.uint8)
    np.bitwise_and(raw, np.uint8(15), out=out[:, int(high_first)])
    np.right_shift(raw, np.uint8(4), out=out[:, int(not high_first)])
    return out.reshape(-1)


E2M1 = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])
"""The value of each code."""


@lru_cache(maxsize=64)
def products_of_e4m3(factor: float, divides: bool) -> Floats32:
    """Return ``code * scale * factor`` of E2M1 codes and F8_E4M3 scales, [scale, code], rounded once to fp32.

    With `divides` it is divided by the factor. A product has 30 bits, so fp64 holds it; a quotient of 6 bits and 24 lies
    too far from the middle between two numbers of fp32 to be rounded wrongly by way of fp64.
    """
    scales = from_bf16(table("F8_E4M3")).astype(np.float64)
    exact = np.multiply.outer(scales, E2M1)
    with np.errstate(over="ignore", invalid="ignore"):
        exact = exact / factor if divides else exact * factor
        return exact.astype(np.float32)
