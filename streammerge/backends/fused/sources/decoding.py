"""Quantised weights decoded on the device: what `numerics/decoding.py` and `unpacking.py` compute, an element for each lane.

A launch decodes fewer than 2**31 elements, so that rows, columns and groups are 32-bit integers, whose division is cheap.
"""

import triton
import triton.language as tl

from .blocks import f32_at, f32_bits, from_bits, i16_at, i32_at, kernel, real, u8_at

# The kinds of codes, numbered as in `streammerge.numerics.decoding`.
E4M3 = tl.constexpr(0)
E5M2 = tl.constexpr(1)
E2M1 = tl.constexpr(2)


@triton.jit
def small_integer(x, unit: tl.constexpr):
    """Return the fp32 pattern of an integer times a power of two, exactly."""
    return f32_bits(x.to(tl.int32).to(tl.float32) * unit)


@triton.jit
def value_of(kind, code):
    """Return the fp32 values of codes (uint32), exactly."""
    if kind == E4M3:
        size, sign = code & 0x7F, (code & 0x80) << 24
        bits = tl.where(size < 8, small_integer(size, 2.0**-9), (size << 20) + (120 << 23))
        bits = tl.where(size == 0x7F, 0x7FC00000, bits) | sign
    elif kind == E5M2:
        size, sign = code & 0x7F, (code & 0x80) << 24
        bits = tl.where(size < 4, small_integer(size, 2.0**-16), (size << 21) + (112 << 23))
        bits = tl.where(size == 0x7C, 0x7F800000, bits)
        bits = tl.where(size > 0x7C, 0x7FC00000, bits) | sign
    else:
        size, sign = code & 7, (code & 8) << 28
        bits = tl.where(size < 2, size * 0x3F000000, (size << 22) + (126 << 23)) | sign
    return from_bits(bits)


@triton.jit
def elements(n, BLOCK: tl.constexpr):
    """Return this program's elements (int32) of `n`, and which exist."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    return at, at < n.to(tl.int32)


@triton.jit
def cells(rows, columns, BLOCK: tl.constexpr):
    """Return the rows and columns of this program's elements of a matrix, and which exist."""
    at, mask = elements(rows * columns, BLOCK)
    wide = columns.to(tl.int32)
    return at // wide, at % wide, mask


@triton.jit
def part_of(place, first, size):
    """Return the number of the part of `size` rows or columns, counted from that of `first` (less than `size`)."""
    return (place + first.to(tl.int32)) // size.to(tl.int32)


@triton.jit
def nibble(raw, at, high_first, mask):
    """Return code `at` (int64) of the codes of four bits in bytes (uint32)."""
    byte = tl.load(u8_at(raw) + (at >> 1), mask, other=0).to(tl.uint32)
    half = (at & 1) ^ high_first  # 1: the high half
    return tl.where(half != 0, byte >> 4, byte & 15)


@kernel
def decode(
    kind,
    codes,
    skip,
    pitch,
    scales,
    powers,
    groups,
    row,
    column,
    rows,
    columns,
    by_rows,
    by_columns,
    out,
    row_step,
    column_step,
    BLOCK: tl.constexpr,
):
    """Write ``value(code) * scale`` in fp32 for a rectangle of a matrix of codes.

    ==================  ======================================================================================
    codes               the first code is number `skip`; from one row to the next there are `pitch` codes
    scales              fp32, a row of `groups` for every `by_rows` rows, and one for every `by_columns` columns
    powers              whether the scales are E8M0 instead: bytes b that stand for 2**(b - 127); no b is 255
    row, column         of the rectangle within the first scale's part, less than `by_rows` and `by_columns`
    rows, columns       of the rectangle
    out                 element (r, c) is written `r * row_step + c * column_step` elements from there
    ==================  ======================================================================================
    """
    r, c, mask = cells(rows, columns, BLOCK)
    cell = part_of(r, row, by_rows) * groups + part_of(c, column, by_columns)
    if powers != 0:
        power = tl.load(u8_at(scales) + cell, mask, other=0).to(tl.uint32)
        scale = from_bits(tl.where(power == 0, 1 << 22, power << 23))
    else:
        scale = tl.load(f32_at(scales) + cell, mask, other=0.0)
    place = skip + r * pitch + c
    if kind == E2M1:
        code = nibble(codes, place, 0, mask)
    else:
        code = tl.load(u8_at(codes) + place, mask, other=0).to(tl.uint32)
    tl.store(f32_at(out) + r * row_step + c * column_step, value_of(kind, code) * scale, mask)


@kernel
def widen_codes(kind, codes, n, out, BLOCK: tl.constexpr):
    """Write the values of `n` codes of FP8 in bf16, exactly."""
    at, mask = elements(n, BLOCK)
    code = tl.load(u8_at(codes) + at, mask, other=0).to(tl.uint32)
    bits = f32_bits(value_of(kind, code)) >> 16
    tl.store(i16_at(out) + at, bits.to(tl.uint16).to(tl.int16, bitcast=True), mask)


@kernel
def decode_integers(
    codes,
    across_pitch,
    word_pitch,
    bits,
    skip,
    order,
    down,
    flip,
    offset,
    zeros,
    scales,
    groups,
    columns_of,
    row,
    column,
    rows,
    columns,
    by_rows,
    by_columns,
    divisor,
    out,
    row_step,
    BLOCK: tl.constexpr,
):
    """Write ``(integer - zero point) * scale / divisor``, rounded once to fp32, for a rectangle of a matrix.

    ==================  ======================================================================================
    codes               integers of `bits` bits in little-endian words of 32 bits, or one per byte (words of four)
    down                whether integers share words along the rows of the rectangle; 0: along its columns
    across_pitch        bytes from the words of one integer to those of its neighbour in the other direction
    word_pitch          bytes from a word to the next
    skip                integers before the first in its word
    order               eight nibbles: the position of each of eight integers in their word
    flip, offset        bits of a code to invert, and the number to add to it
    zeros               fp32, as `scales`; 0 if there are none
    columns_of          int32: the listed group of each column; 0 if they are in order
    others              see `decode`
    ==================  ======================================================================================
    """
    r, c, mask = cells(rows, columns, BLOCK)
    if columns_of != 0:
        group = tl.load(i32_at(columns_of) + c, mask, other=0)
    else:
        group = part_of(c, column, by_columns)
    cell = part_of(r, row, by_rows) * groups + group
    along = (tl.where(down != 0, r, c) + skip).to(tl.int64)
    along = (along & ~7) + ((order >> ((along & 7) * 4)) & 7)
    bit = along * bits
    line = u8_at(codes) + tl.where(down != 0, c, r) * across_pitch
    low = tl.load(line + (bit >> 5) * word_pitch + ((bit >> 3) & 3), mask, other=0).to(tl.uint32)
    over = bit + 8
    straddles = mask & ((bit & 7) + bits > 8)  # so that no byte after the last is read
    high = tl.load(line + (over >> 5) * word_pitch + ((over >> 3) & 3), straddles, other=0).to(tl.uint32)
    code = ((low | (high << 8)) >> (bit & 7).to(tl.uint32)) & ((1 << bits) - 1).to(tl.uint32)
    value = ((code.to(tl.int32) ^ flip.to(tl.int32)) + offset.to(tl.int32)).to(tl.float32)
    if zeros != 0:
        value = value - tl.load(f32_at(zeros) + cell, mask, other=0.0)
    scale = tl.load(f32_at(scales) + cell, mask, other=0.0)
    if divisor == 1:
        value = value * scale
    else:
        exact = value.to(tl.float64) * scale.to(tl.float64)
        value = (exact / divisor.to(tl.float64)).to(tl.float32)
    tl.store(f32_at(out) + r * row_step + c, value, mask)


@kernel
def decode_twice_scaled(codes, skip, scales, before, group, factor, divides, n, out, BLOCK: tl.constexpr):
    """Write ``code * scale * factor`` of `n` E2M1 codes, or ``code * scale / factor``, rounded once to fp32 (NVFP4).

    The scales are codes of F8_E4M3, one for `group` elements, of which `before` precede the first; `factor` has the bits of
    fp64, which holds the exact product of 30 bits.
    """
    at, mask = elements(n, BLOCK)
    code = nibble(codes, at + skip, 0, mask)
    scale = tl.load(u8_at(scales) + part_of(at, before, group), mask, other=0).to(tl.uint32)
    exact = value_of(E2M1, code).to(tl.float64) * value_of(E4M3, scale).to(tl.float64)
    if divides != 0:
        exact = exact / real(factor)
    else:
        exact = exact * real(factor)
    tl.store(f32_at(out) + at, exact.to(tl.float32), mask)


@kernel
def look_up(codes, skip, high_first, table, scales, before, group, n, out, BLOCK: tl.constexpr):
    """Write ``table[code] * scale`` in fp32 of `n` codes of four bits; scales as in `decode_twice_scaled`, but fp32."""
    at, mask = elements(n, BLOCK)
    code = nibble(codes, at + skip, high_first, mask)
    scale = tl.load(f32_at(scales) + part_of(at, before, group), mask, other=0.0)
    tl.store(f32_at(out) + at, tl.load(f32_at(table) + code, mask, other=0.0) * scale, mask)
