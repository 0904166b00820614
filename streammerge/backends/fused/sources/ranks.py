"""Drops by the rank of a magnitude in its row (DELLA). Mirrors `kernels/ranks.py`, without a sort."""

import triton.language as tl

from .blocks import add_count, f32_bits, f64_at, i64_at, kernel, real, widen, words
from .deltas import ADDRESS, CODE, DROP_KEY, INFINITE, ROW

# The columns of a table of drops by rank, int64; see `streammerge.backends.fused.tables`.
LEAST = tl.constexpr(0)
SPREAD = tl.constexpr(1)
UNBIASED = tl.constexpr(2)
RANKS = tl.constexpr(3)


@kernel
def ranked(
    table, drops, base, base_code, start, n, length, left, counts, BLOCK: tl.constexpr, TILE: tl.constexpr
):
    """Write the entries that survive a drop by rank, fp64 (k, n), 0 elsewhere; count them by vector.

    The axes of the grid are the parts of all rows, and the vectors. The rank of an entry is counted: how many of its row
    are smaller, and how many are equal. That takes `length` comparisons an entry, but no sort.
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
    smaller = tl.zeros((BLOCK,), tl.int32)
    equal = tl.zeros((BLOCK,), tl.int32)
    least, spread = real(tl.load(how + LEAST)), real(tl.load(how + SPREAD))
    flat = (spread == 0.0) | (length == 1)
    for tile in range(0, tl.where(flat, 0, length), TILE):
        other = begin + tile + tl.arange(0, TILE)
        there = other < begin + length
        apart = widen(address, code, other, there) - widen(base, base_code, other, there)
        size = tl.where(there, f32_bits(apart) & 0x7FFFFFFF, 0xFFFFFFFF)
        smaller += tl.sum((size[None, :] < key[:, None]).to(tl.int32), 1)
        equal += tl.sum((size[None, :] == key[:, None]).to(tl.int32), 1)
    if flat:
        q = least + spread * 0.5 + tl.zeros((BLOCK,), tl.float64)
    else:
        place = 0.5 * (smaller + smaller + equal - 1).to(tl.float64)
        q = least + spread * (place / (length - 1).to(tl.float64))
    limit = tl.floor(q * 4294967296.0 + 0.5).to(tl.int64)
    word = words(first, row + DROP_KEY, BLOCK).to(tl.int64)
    keep = mask & ((word < limit) | (key >= INFINITE))
    divisor = tl.where(tl.load(how + UNBIASED) != 0, q, 1.0)
    entries = tl.where(keep, delta.to(tl.float64) / divisor, 0.0)
    tl.store(f64_at(left) + vector * n + at, entries, mask)
    add_count(counts, vector, tl.sum(keep.to(tl.int32)))
