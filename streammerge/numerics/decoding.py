"""Codes of floats decoded to fp32, compiled: the value of a code by integer arithmetic, times its scale, rounded once."""

import numpy as np

from streammerge.numerics.bits import bits_from_f32, f32_from_bits
from streammerge.numerics.jit import njit

E4M3, E5M2, E2M1 = 0, 1, 2
KINDS = {"F8_E4M3": E4M3, "F8_E5M2": E5M2, "F4_E2M1": E2M1}
"""The number of each kind of codes."""
LANES, HALF_LANES = 16, 32
"""Elements in a loop of fixed length, which takes a third of the time: codes of a byte, and of half a byte."""
_TILE = 16
"""Rows and columns that are turned together, in a loop of fixed length."""


@njit(inline="always")
def e4m3(code):
    """Return the value of a code of F8_E4M3, exactly; a NaN keeps its sign."""
    sign = (np.uint32(code) & np.uint32(0x80)) << np.uint32(24)
    magnitude = np.uint32(code) & np.uint32(0x7F)
    normal = (magnitude << np.uint32(20)) + np.uint32(120 << 23)
    # Not through a subnormal of fp32, which costs a hundred cycles on some CPUs.
    small = bits_from_f32(np.float32(np.int32(magnitude)) * np.float32(2.0**-9))
    bits = small if magnitude < np.uint32(8) else normal
    bits = np.uint32(0x7FC00000) if magnitude == np.uint32(0x7F) else bits
    return f32_from_bits(bits | sign)


@njit(inline="always")
def e5m2(code):
    """Return the value of a code of F8_E5M2, exactly; infinities and NaN keep their signs."""
    sign = (np.uint32(code) & np.uint32(0x80)) << np.uint32(24)
    magnitude = np.uint32(code) & np.uint32(0x7F)
    normal = (magnitude << np.uint32(21)) + np.uint32(112 << 23)
    small = bits_from_f32(np.float32(np.int32(magnitude)) * np.float32(2.0**-16))
    bits = small if magnitude < np.uint32(4) else normal
    bits = np.uint32(0x7F800000) if magnitude == np.uint32(0x7C) else bits
    bits = np.uint32(0x7FC00000) if magnitude > np.uint32(0x7C) else bits
    return f32_from_bits(bits | sign)


@njit(inline="always")
def e2m1(code):
    """Return the value of a code of F4_E2M1, exactly, from the low four bits."""
    sign = (np.uint32(code) & np.uint32(8)) << np.uint32(28)
    magnitude = np.uint32(code) & np.uint32(7)
    normal = (magnitude << np.uint32(22)) + np.uint32(126 << 23)
    small = np.uint32(0x3F000000) if magnitude else np.uint32(0)
    return f32_from_bits((small if magnitude < np.uint32(2) else normal) | sign)


@njit(inline="always")
def _decode_one(kind, codes, at, scale):
    """Return one value; `at` counts codes."""
    if kind == E4M3:
        return e4m3(codes[at]) * scale
    if kind == E5M2:
        return e5m2(codes[at]) * scale
    return e2m1(codes[at >> 1] >> np.uint8(4 * (at & 1))) * scale


@njit(inline="always")
def _decode_lanes(kind, codes, at, scale, values):
    """Write `LANES` or `HALF_LANES` values; of codes two to a byte, the first must be in the low half."""
    if kind == E4M3:
        some = codes[at : at + LANES]
        for i in range(LANES):
            values[i] = e4m3(some[i]) * scale
    elif kind == E5M2:
        some = codes[at : at + LANES]
        for i in range(LANES):
            values[i] = e5m2(some[i]) * scale
    else:
        some = codes[at >> 1 : (at >> 1) + HALF_LANES // 2]
        for i in range(HALF_LANES // 2):
            values[2 * i] = e2m1(some[i]) * scale
            values[2 * i + 1] = e2m1(some[i] >> np.uint8(4)) * scale


@njit(nogil=True)
def decode(kind, codes, skip, pitch, scales, place, shape, extent, out):
    """Write ``value(code) * scale``, each product rounded once to fp32, for a rectangle of a matrix.

    The codes may lie in the last bytes of `out`: each is read before the bytes it lies in are written.

    ======  =====================  ==========================================================================
    kind    int64                  one of `KINDS`
    codes   uint8 (bytes,)         row by row; of 4 bits two to a byte, the first in the low half
    skip    int64                  codes before the first
    pitch   int64                  codes from one row to the next
    scales  float32 (r, c)         from the scale of the first element on
    place   (int64, int64)         row and column of the first element in its matrix
    shape   (int64, int64)         rows and columns
    extent  (int64, int64)         rows and columns of the matrix that one scale serves
    out     float32 (n,)           written
    ======  =====================  ==========================================================================
    """
    (row, column), (rows, columns), (by_rows, by_columns) = place, shape, extent
    halves = kind == E2M1
    lanes = HALF_LANES if halves else LANES
    for r in range(rows):
        line = scales[(row + r) // by_rows - row // by_rows]
        at, last = r * columns, (r + 1) * columns
        behind = skip + r * (pitch - columns)
        end = min(last, at + by_columns - column % by_columns)
        group = 0
        while at < last:
            scale = line[group]
            if halves and (at + behind) & 1:
                out[at] = _decode_one(kind, codes, at + behind, scale)
                at += 1
            while at + lanes <= end:
                _decode_lanes(kind, codes, at + behind, scale, out[at : at + lanes])
                at += lanes
            while at < end:
                out[at] = _decode_one(kind, codes, at + behind, scale)
                at += 1
            end = min(last, at + by_columns)
            group += 1


@njit(nogil=True)
def turn(tile, out, pitch):
    """Write the rows of a tile as columns.

    =====  =====================  ====================================================
    tile   (rows, n)              float32 or uint8
    out    (words,)               of the same dtype: ``out[j * pitch + i] = tile[i, j]``
    pitch  int64                  elements from one row of the result to the next
    =====  =====================  ====================================================
    """
    rows, n = tile.shape
    for j in range(0, n, _TILE):
        for i in range(0, rows, _TILE):  # a row of the result is written from end to end
            if j + _TILE <= n and i + _TILE <= rows:
                for jj in range(_TILE):
                    begin = (j + jj) * pitch + i
                    to = out[begin : begin + _TILE]
                    for ii in range(_TILE):
                        to[ii] = tile[i + ii, j + jj]
            else:
                for jj in range(j, min(n, j + _TILE)):
                    for ii in range(i, min(rows, i + _TILE)):
                        out[jj * pitch + ii] = tile[ii, jj]
