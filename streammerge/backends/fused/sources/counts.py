"""Counts of magnitude patterns: in a window, tied, and the exact threshold of a rank. Mirrors `kernels/magnitudes.py`."""

import triton
import triton.language as tl

from .blocks import add_count, f32_bits, i32_at, i64_at, kernel, places_of, widen
from .deltas import ROW, survivors

# The columns of a table of searches, int64; see `streammerge.backends.fused.tables`.
LOW = tl.constexpr(0)
"""The lowest pattern of the window; in the end the threshold."""
RANK = tl.constexpr(1)
"""The rank in the window, from 1, in descending order; in the end the rank among the ties."""
TIES = tl.constexpr(2)
"""In the end the number of elements at the threshold."""
HIGHEST = tl.constexpr(3)
"""The largest pattern."""
SEARCH = tl.constexpr(4)


@triton.jit
def magnitudes(part, table, vector, base, base_code, start, n, BLOCK: tl.constexpr):
    """Return the places and patterns (int64) of a vector's magnitudes in a part of a block, and which elements exist."""
    first, element, at, mask = places_of(part, start, n, BLOCK)
    theta_0 = widen(base, base_code, at, mask)
    delta, _ = survivors(i64_at(table) + vector * ROW, theta_0, element, first, at, mask, BLOCK)
    return at, (f32_bits(delta) & 0x7FFFFFFF).to(tl.int64), mask


@kernel
def keys_in_window(table, base, base_code, start, n, low, high, shift, bins, counts, BLOCK: tl.constexpr):
    """Count patterns: those above `high` and the highest of all into `counts`, those in the window into `bins`."""
    _, key, mask = magnitudes(tl.program_id(0).to(tl.int64), table, n * 0, base, base_code, start, n, BLOCK)
    add_count(counts, 0, tl.sum((mask & (key > high)).to(tl.int32)))
    tl.atomic_max(i64_at(counts) + 1, tl.max(tl.where(mask, key, 0)), sem="relaxed")
    inside = mask & (key >= low) & (key <= high)
    place = (key - low) >> shift
    # Deltas of 0 are often the most: counted here, since thousands of additions to one place would queue.
    at_zero = inside & (place == 0)
    tl.atomic_add(i32_at(bins), tl.sum(at_zero.to(tl.int32)), sem="relaxed")
    tl.atomic_add(i32_at(bins) + place, tl.full((BLOCK,), 1, tl.int32), inside & ~at_zero, sem="relaxed")


@kernel
def ties_per_run(table, base, base_code, start, n, key, size, counts, BLOCK: tl.constexpr):
    """Count the elements with the pattern `key` in each run of `size` elements."""
    at, found, mask = magnitudes(
        tl.program_id(0).to(tl.int64), table, n * 0, base, base_code, start, n, BLOCK
    )
    tied = mask & (found == key)
    tl.atomic_add(i64_at(counts) + at // size, tl.full((BLOCK,), 1, tl.int64), tied, sem="relaxed")


@kernel
def count_digits(
    table,
    base,
    base_code,
    start,
    n,
    searches,
    bins,
    shift,
    BINS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Count patterns by their digit from bit `shift` on, in the window of BINS digits of each vector's search.

    The second axis of the grid is the vector. `bins` is int32 (k, BINS). A program counts PARTS parts on its own before it
    adds to them: the digits of most deltas are few, and thousands of additions to one place would queue.
    """
    vector = tl.program_id(1).to(tl.int64)
    search = i64_at(searches) + vector * SEARCH
    low = tl.load(search + LOW)
    begin = tl.program_id(0).to(tl.int64) * PARTS
    count = tl.zeros((BINS,), tl.int32)
    highest = low * 0
    for i in range(tl.minimum(PARTS, (n + 3 + BLOCK - 1) // BLOCK - begin)):
        _, key, mask = magnitudes(begin + i, table, vector, base, base_code, start, n, BLOCK)
        highest = tl.maximum(highest, tl.max(tl.where(mask, key, 0)))
        digit = (key - low) >> shift
        inside = mask & (digit >= 0) & (digit < BINS)
        count += tl.histogram(tl.where(inside, digit, 0).to(tl.int32), BINS, inside)
    if shift == 20:  # the first pass
        tl.atomic_max(search + HIGHEST, highest, sem="relaxed")
    own = i32_at(bins) + vector * BINS + tl.arange(0, BINS)
    tl.atomic_add(own, count, count > 0, sem="relaxed")


@kernel
def count_digits_at_once(
    table, base, base_code, start, n, searches, bins, shift, BINS: tl.constexpr, BLOCK: tl.constexpr
):
    """Do the same, one part a program, and add each digit at once: Triton 3.9 does not compile `count_digits` for AMD."""
    vector = tl.program_id(1).to(tl.int64)
    search = i64_at(searches) + vector * SEARCH
    part = tl.program_id(0).to(tl.int64)
    _, key, mask = magnitudes(part, table, vector, base, base_code, start, n, BLOCK)
    if shift == 20:  # the first pass
        tl.atomic_max(search + HIGHEST, tl.max(tl.where(mask, key, 0)), sem="relaxed")
    digit = (key - tl.load(search + LOW)) >> shift
    inside = mask & (digit >= 0) & (digit < BINS)
    own = i32_at(bins) + vector * BINS
    tl.atomic_add(own + digit, tl.full((BLOCK,), 1, tl.int32), inside, sem="relaxed")


@kernel
def narrow(searches, bins, shift, BINS: tl.constexpr):
    """Narrow each search to the digit that holds its rank, and clear the bins. One program for each vector."""
    vector = tl.program_id(0).to(tl.int64)
    search = i64_at(searches) + vector * SEARCH
    digit = tl.arange(0, BINS)
    own = i32_at(bins) + vector * BINS + digit
    count = tl.load(own)
    rank = tl.load(search + RANK)
    from_top = tl.cumsum(count, 0, reverse=True).to(tl.int64)  # of the digit and all higher ones
    found = tl.max(tl.where(from_top >= rank, digit, 0))
    higher = tl.sum(tl.where(digit > found, count, 0).to(tl.int64))
    tl.store(search + LOW, tl.load(search + LOW) + (found.to(tl.int64) << shift))
    tl.store(search + RANK, rank - higher)
    tl.store(search + TIES, tl.sum(tl.where(digit == found, count, 0).to(tl.int64)))
    tl.store(own, tl.zeros((BINS,), tl.int32))
