"""The mid-ranks of the magnitudes of a row, by counting: no row is sorted.

A monotonic function puts the magnitudes into buckets, so the counts of the buckets give the ranks at which each begins and
ends. Where all entries of a bucket are equal they share the middle of these ranks; on the lattice of bf16's differences
nearly all buckets are so. Every other entry is compared with the entries of its own bucket. Both are exact.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from streammerge.kernels import loop, njit
from streammerge.kernels.blocks import (
    bits_from_f32,
    eight_at_most,
    f32_from_bits,
    ones,
    quotient,
    signs_set,
    trailing_zeros,
)
from streammerge.kernels.deltas import MAGNITUDE
from streammerge.numerics.bits import has_multiply_add

INFINITE = np.uint32(0x7F800000)
SMALLEST = np.float32(2.0**-100)
"""The least magnitude that the buckets are spread over: 8192 / SMALLEST is still finite."""
_MOST_BUCKETS = 8192
_MANY = 256
"""Entries of a mixed bucket above which it is sorted, so that a rank takes a binary search."""


class Ranking(NamedTuple):
    """The scratch buffers for rows of n elements."""

    places: NDArray[np.uint32]
    """(n,): the bucket of each entry"""
    mixed: NDArray[np.uint32]
    """(n + 4,): the indices of the entries whose buckets hold different magnitudes"""
    grouped: NDArray[np.uint32]
    """(n + 16,): the patterns of these entries plus 1, bucket by bucket"""
    buckets: NDArray[np.uint64]
    """(buckets,): from the lowest bit: 32 bits count the entries, one tells whether they differ, 31 are the last pattern"""
    ends: NDArray[np.uint32]
    """(buckets,): where the entries begin, and once they are grouped where they end"""
    shares: NDArray[np.float64]
    """(buckets,): what the entries get if they are equal, else -1"""


@njit(nogil=True)
def ranking(length):
    """Return the buffers for rows of `length` elements: a bucket for every two, as long as they fit in the cache."""
    buckets = 64
    while 2 * buckets < length and buckets < _MOST_BUCKETS:
        buckets *= 2
    return Ranking(
        np.empty(length, np.uint32),
        np.empty(length + 4, np.uint32),
        np.empty(length + 16, np.uint32),
        np.empty(buckets, np.uint64),
        np.empty(buckets, np.uint32),
        np.empty(buckets, np.float64),
    )


@loop()
def shares_by_rank(delta, n, low, spread, buffers, shares):
    """Write low + spread * (r - 1) / (n - 1) for each entry of a row, where r is the mid-rank of its magnitude.

    Magnitudes are ranked by their patterns, so non-finite entries have the highest ranks.

    =======  ==============  ============================================
    delta    float32 (>=n,)  the row
    n        int64           number of entries, at least 2
    low      float64         the value of rank 1; not negative, nor is low + spread
    spread   float64         the value of rank n minus that
    buffers  Ranking         overwritten
    shares   float64 (>=n,)  written
    =======  ==============  ============================================
    """
    places, mixed, grouped, buckets, ends, of_buckets = buffers
    _place(delta, n, places, len(buckets))
    _count(delta, n, places, buckets)
    _shares_of_buckets(n, low, spread, buckets, ends, of_buckets)
    left = _settle(n, places, of_buckets, shares, mixed)
    if left > 0:
        _group(delta, left, mixed, places, ends, grouped)
        _settle_mixed(delta, n, left, low, spread, buffers, shares)


@loop()
def _place(delta, n, places, buckets):
    """Write the bucket of each entry: 0 for zeros, then buckets of equal width up to the largest finite magnitude.

    Multiplication rounds monotonically, so that no bucket holds a magnitude above one of the next bucket. The last one
    also holds what is not finite.
    """
    largest = np.uint32(0)
    for i in range(n):
        key = np.uint32(bits_from_f32(delta[i]) & MAGNITUDE)
        largest = max(largest, key if key < INFINITE else np.uint32(0))
    last = np.float32(buckets - 2)
    size = f32_from_bits(largest)
    # Denormals may have no finite factor: then all but the zeros share the last bucket.
    scale = last / max(size, SMALLEST)
    for i in range(n):
        size = abs(delta[i])
        place = size * scale
        above = np.int32(not size <= np.float32(0))
        places[i] = np.uint32(np.int32(place if place < last else last) + above)


@loop()
def _count(delta, n, places, buckets):
    """Count the entries of each bucket, and note where one differs from the one before.

    All of a bucket is in one number: the lattice has the same few buckets again and again, and a processor that has loaded
    one of several numbers too early starts over.
    """
    buckets[:] = np.uint64(0)
    for i in range(n):
        place = places[i]
        key = np.uint64(bits_from_f32(delta[i]) & MAGNITUDE)
        before = buckets[place]
        differs = np.uint64((before >> np.uint64(33)) != key) & np.uint64(np.uint32(before) != 0)
        kept = before & np.uint64(0x1FFFFFFFF)
        buckets[place] = ((key << np.uint64(33)) | (differs << np.uint64(32)) | kept) + np.uint64(1)


@loop(error_model="numpy")
def _shares_of_buckets(n, low, spread, buckets, ends, shares):
    """Write what the entries of each bucket get if they are equal, and the rank (from 0) at which the bucket begins."""
    total = np.uint32(0)
    for bucket in range(len(buckets)):
        ends[bucket] = total
        total = np.uint32(total + np.uint32(buckets[bucket]))
    last = np.float64(n - 1)
    reciprocal = 1.0 / last
    if has_multiply_add():  # the quotient of half an integer needs no more of what `divide` asks for
        for bucket in range(len(buckets)):
            share = low + spread * quotient(_middle(buckets[bucket], ends[bucket]), last, reciprocal)
            shares[bucket] = share if buckets[bucket] & np.uint64(1 << 32) == 0 else -1.0
    else:
        for bucket in range(len(buckets)):
            share = low + spread * (_middle(buckets[bucket], ends[bucket]) / last)
            shares[bucket] = share if buckets[bucket] & np.uint64(1 << 32) == 0 else -1.0


@loop(forceinline=True)
def _middle(bucket, first):
    """Return the middle of the ranks (from 0) of a bucket's entries, exactly."""
    return 0.5 * (2.0 * np.float64(first) + (np.float64(np.uint32(bucket)) - 1.0))


@loop()
def _settle(n, places, of_buckets, shares, mixed):
    """Give each entry the share of its bucket; list the entries of buckets that have none, and return their number."""
    for i in range(n):
        shares[i] = of_buckets[places[i]]
    left = 0
    address = shares.ctypes.data
    whole = n & ~63
    for first in range(0, whole, 64):
        signs = signs_set(address + 8 * first)
        # Four without a branch, of which none may count: few are mixed, and a branch for each could not be foreseen.
        more = left + np.int64(ones(signs))
        for _ in range(4):
            mixed[left] = np.uint32(first + np.int64(trailing_zeros(signs)))
            left += 1
            signs &= signs - np.uint64(1)
        while signs != 0:
            mixed[left] = np.uint32(first + np.int64(trailing_zeros(signs)))
            left += 1
            signs &= signs - np.uint64(1)
        left = more
    for i in range(whole, n):
        mixed[left] = np.uint32(i)
        left += shares[i] < 0.0
    return left


@loop()
def _group(delta, left, mixed, places, ends, grouped):
    """Write the patterns of the listed entries, each plus 1, to the places of their buckets; move the ends there."""
    for t in range(left):
        i = mixed[t]
        place = places[i]
        end = ends[place]
        grouped[end] = np.uint32((bits_from_f32(delta[i]) & MAGNITUDE) + np.uint32(1))
        ends[place] = np.uint32(end + np.uint32(1))


@loop()
def _settle_mixed(delta, n, left, low, spread, buffers, shares):
    """Give each listed entry its share; in a large bucket the share of its last pattern is computed once."""
    places, mixed, grouped, buckets, ends, of_buckets = buffers
    address = grouped.ctypes.data
    for t in range(left):
        i = mixed[t]
        place = places[i]
        key = np.uint32(bits_from_f32(delta[i]) & MAGNITUDE)
        count = np.int64(np.uint32(buckets[place]))
        first = np.int64(ends[place]) - count
        if count <= 16:
            inside = _sixteen_below_and_up_to(address + 4 * first, count, key)
            shares[i] = low + spread * (0.5 * np.float64(2 * first + inside - 1) / np.float64(n - 1))
            continue
        usual = np.uint32(buckets[place] >> np.uint64(33)) == key
        if not usual or of_buckets[place] < 0.0:
            if count <= _MANY:
                inside = _below_and_up_to(address + 4 * first, count, key)
            else:
                bucket = grouped[first : first + count]
                if buckets[place] & np.uint64(1 << 32) != 0:
                    _sort(bucket)
                    buckets[place] ^= np.uint64(1 << 32)  # it is sorted
                inside = _below_and_up_to_in_order(bucket, key)
            share = low + spread * (0.5 * np.float64(2 * first + inside - 1) / np.float64(n - 1))
            of_buckets[place] = share if usual else of_buckets[place]
            shares[i] = share
        else:
            shares[i] = of_buckets[place]


@loop()
def _sort(patterns):
    """Sort patterns in place, as a heap: no order of them takes long, and nothing is allocated."""
    n = len(patterns)
    for first in range(n // 2 - 1, -1, -1):
        _sink(patterns, first, n)
    for last in range(n - 1, 0, -1):
        patterns[0], patterns[last] = patterns[last], patterns[0]
        _sink(patterns, 0, last)


@loop()
def _sink(patterns, at, n):
    """Move an entry of a heap of `n` down to where none below it is larger."""
    entry = patterns[at]
    while 2 * at + 1 < n:
        child = 2 * at + 1
        child += child + 1 < n and patterns[child + 1] > patterns[child]
        if patterns[child] <= entry:
            break
        patterns[at] = patterns[child]
        at = child
    patterns[at] = entry


@loop()
def _below_and_up_to(address, count, key):
    """Return the number of patterns of a bucket below `key`, plus the number of those that are not above it."""
    total = 0
    while count > 0:
        total += _sixteen_below_and_up_to(address, count, key)
        address += 64
        count -= 16
    return total


@loop()
def _sixteen_below_and_up_to(address, count, key):
    """Do the same as `_below_and_up_to` for the first sixteen patterns, or fewer."""
    inside = (np.uint64(1) << np.uint64(min(count, 16))) - np.uint64(1)
    above = np.uint32(key + np.uint32(1))
    below = eight_at_most(address, key) | (eight_at_most(address + 32, key) << np.uint64(8))
    up_to = eight_at_most(address, above) | (eight_at_most(address + 32, above) << np.uint64(8))
    return np.int64(ones((below & inside) | ((up_to & inside) << np.uint64(16))))


@loop()
def _below_and_up_to_in_order(bucket, key):
    """Do the same as `_below_and_up_to` for a bucket that is sorted."""
    total = 0
    for limit in (key + np.uint32(1), key + np.uint32(2)):
        low, high = 0, len(bucket)
        while low < high:
            middle = (low + high) >> 1
            if bucket[middle] < limit:
                low = middle + 1
            else:
                high = middle
        total += low
    return total
