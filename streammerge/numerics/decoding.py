"""Codes decoded to fp32, compiled: the value of a code by integer arithmetic, times its scale, rounded once."""

import numpy as np

from streammerge.numerics.bits import bits_from_f32, f32_from_bits
from streammerge.numerics.jit import njit

LANES = 32
"""Elements in a loop of fixed length, which takes a third of the time."""


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


@njit(nogil=True)
def decode_e4m3(codes, scales, row, column, columns, group_rows, group_columns, out):
    """Write ``value(code) * scale``, each product rounded once to fp32, for some rows of a matrix or a part of one.

    The codes may lie in the last quarter of `out`: each is read before the bytes it lies in are written.

    =============  =======================  ==================================================
    codes          uint8 (n,)               row by row
    scales         float32 (r, c)           from the scale of the first element on
    row, column    int64                    place of the first element in its matrix
    columns        int64                    elements of each row; n is a multiple of it
    group_rows     int64                    rows of the matrix that one scale serves
    group_columns  int64                    columns of the matrix that one scale serves
    out            float32 (n,)             written
    =============  =======================  ==================================================
    """
    at = 0
    for r in range(row, row + codes.size // columns):
        line = scales[r // group_rows - row // group_rows]
        last = at + columns
        end = min(last, at + group_columns - column % group_columns)
        group = 0
        while at < last:
            scale = line[group]
            while at + LANES <= end:
                some, values = codes[at : at + LANES], out[at : at + LANES]
                for i in range(LANES):
                    values[i] = e4m3(some[i]) * scale
                at += LANES
            while at < end:
                out[at] = e4m3(codes[at]) * scale
                at += 1
            end = min(last, at + group_columns)
            group += 1


@njit(nogil=True)
def decode_e5m2(codes, scales, row, column, columns, group_rows, group_columns, out):
    """Do the same for codes of F8_E5M2."""
    at = 0
    for r in range(row, row + codes.size // columns):
        line = scales[r // group_rows - row // group_rows]
        last = at + columns
        end = min(last, at + group_columns - column % group_columns)
        group = 0
        while at < last:
            scale = line[group]
            while at + LANES <= end:
                some, values = codes[at : at + LANES], out[at : at + LANES]
                for i in range(LANES):
                    values[i] = e5m2(some[i]) * scale
                at += LANES
            while at < end:
                out[at] = e5m2(codes[at]) * scale
                at += 1
            end = min(last, at + group_columns)
            group += 1


KERNELS = {"F8_E4M3": decode_e4m3, "F8_E5M2": decode_e5m2}
"""By the kind of codes."""
