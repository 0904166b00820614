"""Codes of a few bits taken out of the bytes they are packed in, compiled, and the values they stand for in fp32."""

import numpy as np

from streammerge.numerics.bits import word_at
from streammerge.numerics.jit import njit

LANES, LOOK_UPS = 32, 16
"""Elements in a loop of fixed length, which takes a third of the time: integers, and codes looked up."""
PAD = 8
"""Bytes after the last line that `unpack` may read; their content has no effect."""


@njit(nogil=True)
def unpack(raw, pitch, skip, bits, shifts, shape, out):
    """Write the integers of each line of bytes, eight at a time: integer c at bit ``skip + c * bits``, little endian.

    ======  ==============  ==========================================================================
    raw     uint8 (bytes,)  the lines, and `PAD` bytes
    pitch   int64           bytes from one line to the next
    skip    int64           bits before the first integer of a line
    bits    int64           bits of an integer, at most 7, or 8 where `skip` is a multiple of 8
    shifts  uint64 (8,)     position in bits of each of eight integers; usually ``bits * j``
    shape   (int64, int64)  lines, and integers of each
    out     uint8 (n,)      written
    ======  ==============  ==========================================================================
    """
    lines, n = shape
    mask = np.uint64((1 << bits) - 1)
    low = np.uint64(skip & 7)
    for line in range(lines):
        address = raw.ctypes.data + line * pitch + (skip >> 3)
        values = out[line * n : (line + 1) * n]
        for eight in range(n >> 3):
            word = word_at(address + eight * bits) >> low
            for j in range(8):
                values[8 * eight + j] = np.uint8((word >> shifts[j]) & mask)
        if n & 7:
            word = word_at(address + (n >> 3) * bits) >> low
            for j in range(n & 7):
                values[(n & ~7) + j] = np.uint8((word >> shifts[j]) & mask)


@njit(nogil=True)
def scale_integers(
    codes, pitch, flip, offset, zeros, scales, columns_of, place, shape, extent, divisor, out, out_pitch
):
    """Write ``(integer - zero point) * scale / divisor``, rounded once to fp32, for a rectangle of a matrix.

    ==========  ==============  ==========================================================================
    codes       uint8 (bytes,)  row by row
    pitch       int64           bytes from one row to the next
    flip        uint8           bits of a code to invert: 128 for bytes in two's complement
    offset      int64           number to add to a code
    zeros       float32 (r, c)  zero points, one for each scale; (0, 0) if there are none
    scales      float32 (r, c)  from the scale of the first element on
    columns_of  int64 (n,)      the column of `scales` of each column, if listed; else (0,)
    place       (int64, int64)  row and column of the first element in its matrix
    shape       (int64, int64)  rows and columns
    extent      (int64, int64)  rows and columns of the matrix that one scale serves
    divisor     int64           1 if there is none
    out         float32 (n,)    written
    out_pitch   int64           elements from one row of `out` to the next
    ==========  ==============  ==========================================================================
    """
    (row, column), (rows, columns), (by_rows, by_columns) = place, shape, extent
    zero, plus = np.float32(0), np.int32(offset)
    for r in range(rows):
        line = (row + r) // by_rows - row // by_rows
        some, values = codes[r * pitch : r * pitch + columns], out[r * out_pitch : r * out_pitch + columns]
        if len(columns_of):
            for i in range(columns):
                group = columns_of[i]
                zero = zeros[line, group] if zeros.size else np.float32(0)
                value = np.float32(np.int32(some[i] ^ flip) + plus) - zero
                values[i] = _scaled(value, scales[line, group], divisor)
            continue
        at, group = 0, 0
        end = min(columns, by_columns - column % by_columns)
        while at < columns:
            scale = scales[line, group]
            if zeros.size:
                zero = zeros[line, group]
            while at + LANES <= end:
                _scale_lanes(some[at : at + LANES], flip, plus, zero, scale, divisor, values[at : at + LANES])
                at += LANES
            while at < end:
                values[at] = _scaled(np.float32(np.int32(some[at] ^ flip) + plus) - zero, scale, divisor)
                at += 1
            end = min(columns, end + by_columns)
            group += 1


@njit(inline="always")
def _scaled(value, scale, divisor):
    """Return a scaled value; the product is exact in fp64."""
    if divisor == 1:
        return value * scale
    return np.float32(np.float64(value) * np.float64(scale) / np.float64(divisor))


@njit(inline="always")
def _scale_lanes(some, flip, plus, zero, scale, divisor, values):
    """Write `LANES` values that share a scale."""
    if divisor == 1:
        for i in range(LANES):
            values[i] = (np.float32(np.int32(some[i] ^ flip) + plus) - zero) * scale
    else:
        for i in range(LANES):
            values[i] = _scaled(np.float32(np.int32(some[i] ^ flip) + plus) - zero, scale, divisor)


@njit(nogil=True)
def look_up(raw, skip, high_first, tables, rows, before, group, out):
    """Write the values that codes of 4 bits have in the table of their group.

    ==========  =================  ==========================================================================
    raw         uint8 (bytes,)     two codes to a byte
    skip        int64              codes before the first: 0 or 1
    high_first  bool               whether the first of two codes is in the high half
    tables      float32 (k, 16)    values by code
    rows        int32 (groups,)    the table of each group
    before      int64              elements of the first group that precede the first code
    group       int64              elements of a group
    out         float32 (n,)       written
    ==========  =================  ==========================================================================
    """
    n = len(out)
    high, low = np.uint8(4 if high_first else 0), np.uint8(0 if high_first else 4)
    four = np.uint8(15)
    at = 0
    for place in range(len(rows)):
        end = min(n, (place + 1) * group - before)
        table = tables[rows[place]]
        if at < end and (at + skip) & 1:
            out[at] = table[(raw[(at + skip) >> 1] >> low) & four]
            at += 1
        while at + LOOK_UPS <= end:
            begin = (at + skip) >> 1
            some, values = raw[begin : begin + LOOK_UPS // 2], out[at : at + LOOK_UPS]
            for i in range(LOOK_UPS // 2):
                values[2 * i] = table[(some[i] >> high) & four]
                values[2 * i + 1] = table[(some[i] >> low) & four]
            at += LOOK_UPS
        while at < end:
            half = low if (at + skip) & 1 else high
            out[at] = table[(raw[(at + skip) >> 1] >> half) & four]
            at += 1
