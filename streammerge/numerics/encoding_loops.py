"""The loops of `streammerge.numerics.encoding`, compiled: codes of quantised tensors, a row at a time."""

import numpy as np

from streammerge.numerics.jit import njit

_AT_ONCE = 512
"""Quotients that are kept between the division and the rounding."""
_LARGEST = np.uint32(0x7E)
_LEAST_NORMAL = np.uint32(121 << 23)
_ANCHOR = np.float32(2.0**14)
"""A number whose last place is the spacing of the subnormals of F8_E4M3."""
_ANCHOR_BITS = np.uint32(0x46800000)


@njit(nogil=True)
def largest_patterns(patterns, height, width, out):
    """Take the largest magnitude of each block of a matrix into account.

    =========  ===================  ===================================================
    patterns   uint32 (rows, n)     of finite fp32 numbers
    out        uint32 (grid rows, grid columns)  raised to the pattern of the largest
    =========  ===================  ===================================================
    """
    rows, columns = patterns.shape
    for i in range(rows):
        for g in range(out.shape[1]):
            row = patterns[i, g * width : min(columns, (g + 1) * width)]
            top = np.uint32(0)
            for j in range(row.size):
                top = max(top, np.uint32(row[j] & np.uint32(0x7FFFFFFF)))
            out[i // height, g] = max(out[i // height, g], top)


@njit(nogil=True)
def write_f8(values, scales, height, width, out):
    """Write values divided by the scales of their blocks as codes of F8_E4M3, rounded to nearest even and saturated.

    ======  ======================================  ===============
    values  float32 (rows, n)                       finite
    scales  float32 (grid rows, grid columns)       above zero
    out     uint8 (rows, n)                         written
    ======  ======================================  ===============
    """
    rows, columns = values.shape
    quotients, shifted = np.empty(_AT_ONCE, np.float32), np.empty(_AT_ONCE, np.float32)
    bits, small = quotients.view(np.uint32), shifted.view(np.uint32)
    for i in range(rows):
        for g in range(scales.shape[1]):
            scale = scales[i // height, g]
            end = min(columns, (g + 1) * width)
            for first in range(g * width, end, _AT_ONCE):
                n = min(_AT_ONCE, end - first)
                row, codes = values[i, first : first + n], out[i, first : first + n]
                for j in range(n):
                    quotients[j] = row[j] / scale
                for j in range(n):
                    shifted[j] = abs(quotients[j]) + _ANCHOR
                for j in range(n):
                    size = np.uint32(bits[j] & np.uint32(0x7FFFFFFF))
                    odd = np.uint32((size >> np.uint32(20)) & np.uint32(1))
                    near = np.uint32(size - np.uint32(120 << 23) + np.uint32(0x7FFFF)) + odd
                    normal = np.uint32(np.uint32(near) >> np.uint32(20))
                    code = normal if size >= _LEAST_NORMAL else np.uint32(small[j] - _ANCHOR_BITS)
                    code = min(code, _LARGEST)
                    codes[j] = np.uint8(code | ((bits[j] >> np.uint32(24)) & np.uint32(0x80)))


@njit(nogil=True)
def write_f4(values, factor, divisors, height, width, out):
    """Write values times a factor, divided by the divisors of their blocks, as codes of E2M1, the first in the low nibble.

    They are rounded to nearest even and saturated; where a divisor is zero, so are the codes.

    ========  =================================  ===============
    values    float32 (rows, n), n even          finite
    factor    float32                            not negative
    divisors  float32 (grid rows, grid columns)  not negative
    out       uint8 (rows, n / 2)                written
    ========  =================================  ===============
    """
    rows, columns = values.shape
    codes = np.empty(columns, np.uint8)
    for i in range(rows):
        for g in range(divisors.shape[1]):
            divisor = divisors[i // height, g]
            row = values[i, g * width : min(columns, (g + 1) * width)]
            part = codes[g * width : min(columns, (g + 1) * width)]
            if divisor == 0:
                part[:] = 0
                continue
            for j in range(row.size):
                size = abs(np.float32(row[j] * factor) / divisor)
                code = np.uint8(size > np.float32(0.25)) + np.uint8(size >= np.float32(0.75))
                code += np.uint8(size > np.float32(1.25)) + np.uint8(size >= np.float32(1.75))
                code += np.uint8(size > np.float32(2.5)) + np.uint8(size >= np.float32(3.5))
                code += np.uint8(size > np.float32(5.0))
                part[j] = np.uint8(code | (np.uint8(row[j] < 0) << 3))
        for j in range(columns // 2):
            out[i, j] = codes[2 * j] | (codes[2 * j + 1] << 4)


@njit(nogil=True)
def write_integers(values, scales, height, width, bits, out):
    """Write values divided by the scales of their blocks as integers, rounded to nearest even and saturated.

    ======  =================================  ====================================
    values  float32 (rows, n)                  finite
    scales  float32 (grid rows, grid columns)  above zero
    bits    int64                              of a code, 8 at most
    out     int8 (rows, n)                     written
    ======  =================================  ====================================
    """
    rows, columns = values.shape
    least, largest = np.float32(-(1 << (bits - 1))), np.float32((1 << (bits - 1)) - 1)
    for i in range(rows):
        for g in range(scales.shape[1]):
            scale = scales[i // height, g]
            row = values[i, g * width : min(columns, (g + 1) * width)]
            part = out[i, g * width : min(columns, (g + 1) * width)]
            for j in range(row.size):
                part[j] = np.int8(max(least, min(largest, np.float32(np.rint(row[j] / scale)))))
