"""Quantised weights decoded to fp32 on the device. Mirrors `numerics/decoding.py` and `numerics/unpacking.py`."""

import triton
import triton.language as tl

from .blocks import f32_at, f32_bits, from_bits, i32_at, i64_at, kernel, u8_at

# The kinds of codes, numbered as in `streammerge.numerics.decoding`.
E4M3 = tl.constexpr(0)
E5M2 = tl.constexpr(1)


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
def cells(rows, columns, BLOCK: tl.constexpr):
    """Return this program's elements of a matrix, their rows and columns, and which exist."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return at, at // columns, at % columns, at < rows * columns


@triton.jit
def nibble(raw, at, high_first, mask):
    """Return code `at` of the codes of four bits in bytes (uint32)."""
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
    groups,
    row,
    column,
    rows,
    columns,
    by_rows,
    by_columns,
    out,
    BLOCK: tl.constexpr,
):
    """Write ``value(code) * scale`` for a rectangle of a matrix; the arguments are those of `numerics.decoding.decode`.

    `groups` is the number of scales in a row of `scales`.
    """
    at, r, c, mask = cells(rows, columns, BLOCK)
    line = (row + r) // by_rows - row // by_rows
    group = (column + c) // by_columns - column // by_columns
    scale = tl.load(f32_at(scales) + line * groups + group, mask, other=0.0)
    place = skip + r * pitch + c
    if kind > E5M2:
        code = nibble(codes, place, 0, mask)
    else:
        code = tl.load(u8_at(codes) + place, mask, other=0).to(tl.uint32)
    tl.store(f32_at(out) + at, value_of(kind, code) * scale, mask)


@kernel
def unpack(raw, pitch, skip, bits, shifts, lines, n, out, BLOCK: tl.constexpr):
    """Write integers of a few bits, one to a byte; the arguments are those of `numerics.unpacking.unpack`."""
    at, line, c, mask = cells(lines, n, BLOCK)
    bit = skip + (c >> 3) * 8 * bits + tl.load(i64_at(shifts) + (c & 7), mask, other=0)
    byte = u8_at(raw) + line * pitch + (bit >> 3)
    pair = tl.load(byte, mask, other=0).to(tl.uint32) | (tl.load(byte + 1, mask, other=0).to(tl.uint32) << 8)
    code = (pair >> (bit & 7).to(tl.uint32)) & ((1 << bits) - 1).to(tl.uint32)
    tl.store(u8_at(out) + at, code.to(tl.uint8), mask)


@kernel
def scale_integers(
    codes,
    pitch,
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
    out_pitch,
    BLOCK: tl.constexpr,
):
    """Write ``(integer - zero point) * scale / divisor``; the arguments are those of `numerics.unpacking.scale_integers`.

    `groups` is the number of scales in a row. The addresses of `zeros` and `columns_of` are 0 if there are none.
    """
    _, r, c, mask = cells(rows, columns, BLOCK)
    if columns_of != 0:
        group = tl.load(i64_at(columns_of) + c, mask, other=0)
    else:
        group = (column + c) // by_columns - column // by_columns
    cell = ((row + r) // by_rows - row // by_rows) * groups + group
    code = tl.load(u8_at(codes) + r * pitch + c, mask, other=0).to(tl.int32)
    value = ((code ^ flip.to(tl.int32)) + offset.to(tl.int32)).to(tl.float32)
    if zeros != 0:
        value = value - tl.load(f32_at(zeros) + cell, mask, other=0.0)
    scale = tl.load(f32_at(scales) + cell, mask, other=0.0)
    if divisor == 1:
        value = value * scale
    else:
        exact = value.to(tl.float64) * scale.to(tl.float64)
        value = (exact / divisor.to(tl.float64)).to(tl.float32)
    tl.store(f32_at(out) + r * out_pitch + c, value, mask)


@kernel
def look_up(raw, skip, high_first, tables, rows, before, group, n, out, BLOCK: tl.constexpr):
    """Write the values of codes of 4 bits in their groups' tables; the arguments are those of `numerics.unpacking.look_up`."""
    at, _, _, mask = cells(n, 1, BLOCK)
    code = nibble(raw, at + skip, high_first, mask).to(tl.int64)
    table = tl.load(i32_at(rows) + (at + before) // group, mask, other=0).to(tl.int64)
    tl.store(f32_at(out) + at, tl.load(f32_at(tables) + table * 16 + code, mask, other=0.0), mask)
