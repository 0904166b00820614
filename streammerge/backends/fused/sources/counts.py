"""Counts of magnitude patterns: in a window, tied, and the exact threshold of a rank. Mirrors `kernels/magnitudes.py`."""

import triton
import triton.language as tl

from .blocks import add_count, f32_bits, i32_at, i64_at, kernel, places, widen
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
def magnitudes(table, vector, base, base_code, start, n, BLOCK: tl.constexpr):
    """Return the places and patterns (int64) of a vector's magnitudes, and which elements exist."""
    first, element, at, mask = places(start, n, BLOCK)
    theta_0 = widen(base, base_code, at, mask)
    delta, _ = survivors(i64_at(table) + vector * ROW, theta_0, element, first, at, mask, BLOCK)
    return at, (f32_bits(delta) & 0x7FFFFFFF).to(tl.int64), mask


@kernel
def keys_in_window(
    table, base, base_code, start, n, low, high, shift, bins, counts, BLOCK: tl.constexpr
):  # fmt: skip
    """Count patterns: those above `high` and the highest of all into `counts`, those in the window into `bins`."""
    _, key, mask = magnitudes(table, n * 0, base, base_code, start, n, BLOCK)
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
    at, found, mask = magnitudes(table, n * 0, base, base_code, start, n, BLOCK)
    tied = mask & (found == key)
    tl.atomic_add(i64_at(counts) + at // size, tl.full((BLOCK,), 1, tl.int64), tied, sem="relaxed")


@kernel
def count_digits(
    table, base, base_code, start, n, searches, bins, shift, BINS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Count patterns by their digit from bit `shift` on, in the window of BINS digits of each vector's search.

    The second axis of the grid is the vector. `bins` is int32 (k, BINS).
    """
    vector = tl.program_id(1).to(tl.int64)
    search = i64_at(searches) + vector * SEARCH
    _, key, mask = magnitudes(table, vector, base, base_code, start, n, BLOCK)
    if shift == 20:  # the first pass
        tl.atomic_max(search + HIGHEST, tl.max(tl.where(mask, key, 0)), sem="relaxed")
    digit = (key - tl.load(search + LOW)) >> shift
    inside = mask & (digit >= 0) & (digit < BINS)
    own = i32_at(bins) + vector * BINS
    at_zero = inside & (digit == 0)
    tl.atomic_add(own, tl.sum(at_zero.to(tl.int32)), sem="relaxed")
    tl.atomic_add(own + digit, tl.full((BLOCK,), 1, tl.int32), inside & ~at_zero, sem="relaxed")


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
