"""Drops by the rank of a magnitude in its row (DELLA). Mirrors `kernels/ranks.py`, by a sort of each row.

Magnitudes are sorted as integers: in runs of RUN by counting, then runs are merged in pairs, where the place of each is found
by bisection in the other run. Equal magnitudes may lie in any order, for a rank is where they begin and end.
"""

import triton
import triton.language as tl

from .blocks import add_count, f32_bits, f64_at, i32_at, i64_at, kernel, real, widen, words
from .deltas import ADDRESS, CODE, DROP_KEY, INFINITE, ROW

# The columns of a table of drops by rank, int64; see `streammerge.backends.fused.tables`.
LEAST = tl.constexpr(0)
SPREAD = tl.constexpr(1)
UNBIASED = tl.constexpr(2)
RANKS = tl.constexpr(3)

RUN = tl.constexpr(128)


@triton.jit
def part_of_row(length, BLOCK: tl.constexpr):
    """Return where this program's row begins (int64), and its elements, counted from there; the axis has the parts of all rows."""
    parts = (length + BLOCK - 1) // BLOCK
    begin = (tl.program_id(0) // parts).to(tl.int64) * length
    return begin, (tl.program_id(0) % parts).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def place_in(keys, first, last, key, reach, upper, mask):
    """Return how many of the ascending `keys` `first` to `last` are less than `key`; with `upper` also those that are equal.

    `reach` is the largest power of two that is not more than any of the lengths.
    """
    low = first
    step = reach
    while step > 0:
        at = low + step - 1
        there = mask & (at < last)
        other = tl.load(keys + at, there, other=0)
        low = tl.where(there & ((other < key) | ((upper != 0) & (other == key))), low + step, low)
        step = step // 2
    return low - first


@kernel
def sort_runs(table, base, base_code, n, length, keys, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """Write the magnitudes of task vectors, int32 patterns (k, n), each run of BLOCK of a row in ascending order.

    The second axis of the grid is the vector. A place is counted: how many of the run are less, or equal and earlier.
    """
    vector = tl.program_id(1).to(tl.int64)
    row = i64_at(table) + vector * ROW
    address, code = tl.load(row + ADDRESS), tl.load(row + CODE)
    begin, at = part_of_row(length, BLOCK)
    mask = at < length
    first = tl.min(at)
    key = (
        f32_bits(widen(address, code, begin + at, mask) - widen(base, base_code, begin + at, mask))
        & 0x7FFFFFFF
    )
    place = tl.zeros((BLOCK,), tl.int32)
    for tile in range(0, BLOCK, TILE):
        other = first + tile + tl.arange(0, TILE)
        there = other < length
        apart = widen(address, code, begin + other, there) - widen(base, base_code, begin + other, there)
        size = f32_bits(apart) & 0x7FFFFFFF
        before = (size[None, :] < key[:, None]) | (
            (size[None, :] == key[:, None]) & (other[None, :] < at[:, None])
        )
        place += tl.sum((before & there[None, :]).to(tl.int32), 1)
    tl.store(i32_at(keys) + vector * n + begin + first + place, key.to(tl.int32, bitcast=True), mask)


@kernel
def merge_runs(keys, n, length, run, out, BLOCK: tl.constexpr):
    """Merge sorted runs of `run` keys (a power of two) of each row in pairs, int32 (k, n)."""
    begin, at = part_of_row(length, BLOCK)
    mask = at < length
    rows = i32_at(keys) + tl.program_id(1).to(tl.int64) * n + begin
    key = tl.load(rows + at, mask, other=0)
    number = at // run
    right = number % 2  # 1: of the run that stands behind its partner, and goes behind what is equal there
    partner = (number + 1 - 2 * right) * run
    last = tl.minimum(partner + run, length)
    found = place_in(rows, tl.minimum(partner, length), last, key, run, right, mask)
    target = (number - right) * run + at % run + found
    tl.store(i32_at(out) + tl.program_id(1).to(tl.int64) * n + begin + target, key, mask)


@kernel
def ranked(table, drops, base, base_code, start, n, length, keys, reach, left, counts, BLOCK: tl.constexpr):
    """Write the entries that survive a drop by rank, fp64 (k, n), 0 elsewhere; count them by vector.

    The axes of the grid are the parts of all rows, and the vectors. The rank of an entry is where the entries of its row that
    are equal begin and end in the sorted `keys`; `reach` is the largest power of two that is not more than `length`.
    """
    vector = tl.program_id(1).to(tl.int64)
    row, how = i64_at(table) + vector * ROW, i64_at(drops) + vector * RANKS
    address, code = tl.load(row + ADDRESS), tl.load(row + CODE)
    parts = (length + 3 + BLOCK - 1) // BLOCK  # of a row that starts anywhere in a group of four words
    begin = (tl.program_id(0) // parts).to(tl.int64) * length
    first = ((start + begin) & ~3) + (tl.program_id(0) % parts).to(tl.int64) * BLOCK
    at = first - start + tl.arange(0, BLOCK)
    mask = (at >= begin) & (at < begin + length)
    delta = widen(address, code, at, mask) - widen(base, base_code, at, mask)
    key = f32_bits(delta) & 0x7FFFFFFF
    least, spread = real(tl.load(how + LEAST)), real(tl.load(how + SPREAD))
    flat = (spread == 0.0) | (length == 1)
    if flat:
        q = least + spread * 0.5 + tl.zeros((BLOCK,), tl.float64)
    else:
        rows = i32_at(keys) + vector * n + begin
        none = at * 0
        pattern = key.to(tl.int32, bitcast=True)
        smaller = place_in(rows, none, none + length, pattern, reach, 0, mask)
        with_equal = place_in(rows, none, none + length, pattern, reach, 1, mask)
        place = 0.5 * (smaller + with_equal - 1).to(tl.float64)
        q = least + spread * (place / (length - 1).to(tl.float64))
    limit = tl.floor(q * 4294967296.0 + 0.5).to(tl.int64)
    word = words(first, row + DROP_KEY, BLOCK).to(tl.int64)
    keep = mask & ((word < limit) | (key >= INFINITE))
    divisor = tl.where(tl.load(how + UNBIASED) != 0, q, 1.0)
    entries = tl.where(keep, delta.to(tl.float64) / divisor, 0.0)
    tl.store(f64_at(left) + vector * n + at, entries, mask)
    add_count(counts, vector, tl.sum(keep.to(tl.int32)))
