"""Surviving entries in fp32, and their fp64 sums in the order of the CPU. Mirrors `abs_sums`, `dots` and `add_products`."""

import triton.language as tl

from .blocks import add_count, f32_at, f32_bits, f64_at, i64_at, kernel, places, real, widen
from .deltas import INFINITE, ROW, survivors

# The columns of a table of pairs, int64; see `streammerge.backends.fused.tables`.
LEFT = tl.constexpr(0)
LEFT_FACTOR = tl.constexpr(1)
RIGHT = tl.constexpr(2)
RIGHT_FACTOR = tl.constexpr(3)
PAIR = tl.constexpr(4)

# What is summed; with any other number, products.
SIZES = tl.constexpr(1)
WIDE_SIZES = tl.constexpr(2)
"""Magnitudes in fp64, without those that fp32 does not hold."""
LARGEST = tl.constexpr(3.4028234663852886e38)


@kernel
def surviving(table, base, base_code, start, n, rows, finite, counts, BLOCK: tl.constexpr):
    """Write the surviving entries of each vector of the table, fp32 (k, n); the second axis of the grid is the vector.

    With `finite` what is not finite becomes 0, since it has no part in sums. `counts` takes the survivors of each vector.
    """
    vector = tl.program_id(1).to(tl.int64)
    first, element, at, mask = places(start, n, BLOCK)
    theta_0 = widen(base, base_code, at, mask)
    delta, keep = survivors(i64_at(table) + vector * ROW, theta_0, element, first, at, mask, BLOCK)
    add_count(counts, vector, tl.sum(keep.to(tl.int32)))
    size = f32_bits(delta) & 0x7FFFFFFF
    delta = tl.where((finite != 0) & (size >= INFINITE), 0.0, delta)
    tl.store(f32_at(rows) + vector * n + at, delta, mask)


@kernel
def lane_sums(pairs, n, length, partials, KIND: tl.constexpr, GROUPS: tl.constexpr):
    """Write fp64 sums over groups of `length` elements, (groups, pairs): eight lanes, each in order, added pairwise.

    A pair is two rows of fp32 and their factors, and the sum is of (factor * x) * (factor * y); or it is of the abs(x) of
    one row. The second axis of the grid is the pair. A program has GROUPS groups and walks down their lines of eight: the
    order of the sum is the loop's.
    """
    pair = i64_at(pairs) + tl.program_id(1).to(tl.int64) * PAIR
    left, right = tl.load(pair + LEFT), tl.load(pair + RIGHT)
    left_factor, right_factor = real(tl.load(pair + LEFT_FACTOR)), real(tl.load(pair + RIGHT_FACTOR))
    group = tl.program_id(0).to(tl.int64) * GROUPS
    lane = tl.arange(0, GROUPS * 8)
    begin = (group + (lane >> 3)) * length
    stop = tl.minimum(begin + length, n)
    local = begin + (lane & 7)
    total = tl.zeros((GROUPS * 8,), tl.float64)
    most = tl.minimum(length, n - group * length)  # elements of the first group, the longest
    for line in range((most + 7) >> 3):
        at = local + line * 8
        if KIND == WIDE_SIZES:
            size = tl.abs(tl.load(f64_at(left) + at, at < stop, other=0.0))
            total += tl.where(size <= LARGEST, size, 0.0)
        else:
            x = tl.load(f32_at(left) + at, at < stop, other=0.0)
            if KIND == SIZES:
                total += tl.abs(x).to(tl.float64)
            else:
                y = tl.load(f32_at(right) + at, at < stop, other=0.0)
                total += (left_factor * x.to(tl.float64)) * (right_factor * y.to(tl.float64))
    for _ in tl.static_range(3):  # ((0 + 1) + (2 + 3)) + ((4 + 5) + (6 + 7))
        even, odd = tl.split(tl.reshape(total, (total.shape[0] // 2, 2)))
        total = even + odd
    where = group + tl.arange(0, GROUPS)
    columns = tl.num_programs(1)
    tl.store(f64_at(partials) + where * columns + tl.program_id(1), total, where * length < n)


@kernel
def column_sums(pairs, n_rows, columns, at_once, sums, BLOCK: tl.constexpr):
    """Add products of pairs over the rows of matrices to `sums`, fp64 (pairs, columns); at most `at_once` rows at a time."""
    pair = i64_at(pairs) + tl.program_id(1).to(tl.int64) * PAIR
    left, right = f32_at(tl.load(pair + LEFT)), f32_at(tl.load(pair + RIGHT))
    left_factor, right_factor = real(tl.load(pair + LEFT_FACTOR)), real(tl.load(pair + RIGHT_FACTOR))
    column = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = column < columns
    target = f64_at(sums) + tl.program_id(1).to(tl.int64) * columns + column
    total = tl.load(target, mask, other=0.0)
    part = tl.zeros((BLOCK,), tl.float64)
    for row in range(n_rows):
        at = row * columns + column
        x = left_factor * tl.load(left + at, mask, other=0.0).to(tl.float64)
        y = right_factor * tl.load(right + at, mask, other=0.0).to(tl.float64)
        part += x * y
        if ((row + 1) % at_once == 0) | (row + 1 == n_rows):
            total += part
            part = tl.zeros((BLOCK,), tl.float64)
    tl.store(target, total, mask)


@kernel
def square_sums(values, code, n, partials, counts, GROUPS: tl.constexpr):
    """Write the fp64 sums of squares of an operand per 4096 elements, as `lane_sums`; count what is negative or not finite."""
    group = tl.program_id(0).to(tl.int64) * GROUPS
    lane = tl.arange(0, GROUPS * 8)
    local = (group + (lane >> 3)) * 4096 + (lane & 7)
    total = tl.zeros((GROUPS * 8,), tl.float64)
    bad = tl.zeros((GROUPS * 8,), tl.int32)
    for line in range((tl.minimum(4096, n - group * 4096) + 7) >> 3):
        at = local + line * 8
        f = widen(values, code, at, at < n)
        x = f.to(tl.float64)
        total += x * x
        bad += ((f < 0.0) | ((f32_bits(f) & 0x7FFFFFFF) >= INFINITE)).to(tl.int32)
    add_count(counts, 0, tl.sum(bad))
    for _ in tl.static_range(3):
        even, odd = tl.split(tl.reshape(total, (total.shape[0] // 2, 2)))
        total = even + odd
    where = group + tl.arange(0, GROUPS)
    tl.store(f64_at(partials) + where, total, where * 4096 < n)
