"""The masked task vector of one model over one block: widen, subtract, drop, cut."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from streammerge.kernels import loop, njit
from streammerge.kernels.blocks import (
    BLOCK,
    bits_from_f32,
    bytes_set,
    f32_from_bits,
    ones,
    trailing_zeros,
    widen_at,
    words,
    words_at,
)
from streammerge.kernels.operands import BF16
from streammerge.kernels.widths import width_of
from streammerge.numerics import finite

MAGNITUDE = np.uint32(0x7FFFFFFF)
LARGEST = np.float32(finite.LARGEST)
"""The largest finite fp32 number."""

NO_CUT, ABOVE, ALL, THIN, INDEX = -1, 0, 1, 2, 3
"""The tie policies for magnitudes equal to the threshold; see `task_vectors.Cut`."""


class Scratch(NamedTuple):
    """The scratch buffers of `delta_block`."""

    x: NDArray[np.float32]
    """(BLOCK,): widened values"""
    words: NDArray[np.uint32]
    """(BLOCK + 8,): random words"""
    at_threshold: NDArray[np.uint8]
    """(BLOCK,): 1 where a magnitude equals the cut's threshold"""
    places: NDArray[np.int64]
    """(BLOCK + 8,): indices of these ties"""


@njit(nogil=True)
def scratch():
    """Return the buffers for `delta_block`; allocate them once per kernel call."""
    return Scratch(
        np.empty(BLOCK, np.float32),
        np.empty(BLOCK + 8, np.uint32),
        np.empty(BLOCK, np.uint8),
        np.empty(BLOCK + 8, np.int64),
    )


@loop()
def delta_block(half, full, offset, code, base, element, n, drop, drop_key, cut, cut_key, out, buffers):
    """Write the surviving task vector of at most `BLOCK` elements into `out`, 0 elsewhere; return the number of survivors.

    ==========  ==============  ============================================
    half, full  uint16, uint32  the buffer, as in `Operands`
    offset      int64           byte offset of the model's block
    code        int64           the model's dtype
    base        float32 (n,)    the same elements of the base
    element     int64           flat index of the first element
    n           int64           number of elements
    drop        int64 (2,)      the drop, a row of `Masks`; and so on
    drop_key    uint32 (4,)
    cut         int64 (6,)
    cut_key     uint32 (4,)
    out         float32 (>=n,)  written
    buffers     Scratch         overwritten
    ==========  ==============  ============================================
    """
    x, w, at_threshold, _ = buffers
    drops = drop[0] > 0 or drop[1] > 0
    if code == BF16 and cut[0] != NO_CUT and not drops:
        kept = _cut_bf16(n, half[offset >> 1 : (offset >> 1) + n], base, cut, out, at_threshold)
        return kept - _settle_cut(element, n, cut, cut_key, out, buffers)
    # A cut in place would not vectorise (LLVM makes its stores conditional), so it reads x and writes out.
    delta = out if cut[0] == NO_CUT else x
    if code == BF16:
        source = half[offset >> 1 : (offset >> 1) + n]
        for i in range(n):
            delta[i] = f32_from_bits(np.uint32(source[i]) << np.uint32(16)) - base[i]
    else:
        widen_at(half, full, offset, code, n, x)
        for i in range(n):
            delta[i] = x[i] - base[i]
    kept = n
    if drops:
        least, end = np.uint64(drop[0]), drop[1]
        shift = words(element, n, drop_key, w)
        if drop[0] > 0:
            kept = _drop_block(n, np.uint32(drop[0] - 1), w[shift : shift + n], delta)
        for i in range(
            max(0, min(n, end - element))
        ):  # exact count: the rare words equal to the last dropped one
            if np.uint64(w[shift + i]) == least and (bits_from_f32(delta[i]) & MAGNITUDE) < np.uint32(
                0x7F800000
            ):
                delta[i] = np.float32(0)
                kept -= 1
    if cut[0] != NO_CUT:
        kept = _cut_block(n, cut, delta, out, at_threshold)
        kept -= _settle_cut(element, n, cut, cut_key, out, buffers)
    return kept


@loop()
def _settle_cut(element, n, cut, cut_key, out, buffers):
    """Remove the ties and the outliers that the cut has kept; return their number."""
    removed = 0
    if cut[0] in (THIN, INDEX):
        removed += _settle_ties(element, n, cut, cut_key, out, buffers, False)
    if cut[3] != NO_CUT:
        removed += _remove_outliers(element, n, cut[3:], cut_key, out, buffers)
    return removed


@njit(nogil=True)
def survivors(models, base, first, span, masks, base_out, deltas, kept):
    """Write a tile: the base and the surviving task vectors of all models, all fp32.

    ========  ==============  ============================================
    models    Operands        the models, k of them
    base      Operand         the base
    first     int64           first element of the tile in the operands
    span      Span            the tile
    masks     Masks           the drops and the cuts
    base_out  float32 (n,)    written
    deltas    float32 (k, n)  written
    kept      int64 (k,)      survivors, added to
    ========  ==============  ============================================
    """
    _survivors(models, base, first, span, masks, base_out, deltas, kept, scratch())


@loop()
def _survivors(models, base, first, span, masks, base_out, deltas, kept, buffers):
    half, full, offsets, codes = models
    base_half, base_full, base_offset, base_code = base
    base_itemsize = width_of(base_code)
    element, n = span
    drops, drop_keys, cuts, cut_keys = masks
    for start in range(0, n, BLOCK):
        m = min(BLOCK, n - start)
        b = base_out[start : start + m]
        widen_at(base_half, base_full, base_offset + (first + start) * base_itemsize, base_code, m, b)
        for i in range(len(offsets)):
            at = offsets[i] + (first + start) * width_of(codes[i])
            out = deltas[i, start : start + m]
            drop, drop_key, cut, cut_key = drops[i], drop_keys[i], cuts[i], cut_keys[i]
            kept[i] += delta_block(
                half, full, at, codes[i], b, element + start, m, drop, drop_key, cut, cut_key, out, buffers
            )


@loop()
def _remove_outliers(element, n, cut, cut_key, out, buffers):
    """Zero the entries of `out` that the outliers' cut keeps; return how many were not zero before."""
    before, at_threshold = buffers.x, buffers.at_threshold
    for i in range(n):
        before[i] = out[i]
    threshold = np.uint32(cut[1])
    least = np.uint32(threshold + np.uint32(cut[0] != ALL))  # ties are settled below, or kept
    removed = np.uint32(0)
    for i in range(n):
        bits = bits_from_f32(before[i])
        magnitude = np.uint32(bits & MAGNITUDE)
        # Keep non-finite values: the check on the output must see them.
        remove = (magnitude >= least) & (magnitude < np.uint32(0x7F800000))
        at_threshold[i] = np.uint8((magnitude == threshold) & (magnitude < np.uint32(0x7F800000)))
        removed = np.uint32(removed + np.uint32(remove))
        out[i] = f32_from_bits(np.uint32(0) if remove else bits)
    count = np.int64(removed)
    if cut[0] in (THIN, INDEX):
        count += _settle_ties(element, n, cut, cut_key, out, buffers, True)
    return count


@loop()
def _drop_block(n, last, w, out):
    """Zero the elements whose word is at most `last`; return the number of remaining elements."""
    kept = np.uint32(0)
    for i in range(n):
        # Never drop a non-finite value: the check on the output must see it.
        bits = bits_from_f32(out[i])
        infinite = np.uint32(bits & MAGNITUDE) >= np.uint32(0x7F800000)
        keep = (np.uint32(w[i]) > last) | infinite
        kept = np.uint32(kept + np.uint32(keep))  # in 32-bit lanes: numba widens every integer sum to 64
        out[i] = f32_from_bits(bits if keep else np.uint32(0))
    return np.int64(kept)


@loop()
def _cut_block(n, cut, delta, out, at_threshold):
    """Write the entries that the cut keeps into `out`, and mark ties; return the number kept."""
    threshold = np.uint32(cut[1])
    least = np.uint32(threshold + np.uint32(cut[0] == ABOVE))
    kept = np.uint32(0)
    for i in range(n):
        # The casts keep the loop in 32-bit lanes: numba widens every integer sum to 64.
        bits = bits_from_f32(delta[i])
        magnitude = np.uint32(bits & MAGNITUDE)
        keep = magnitude >= least
        at_threshold[i] = np.uint8(magnitude == threshold)
        kept = np.uint32(kept + np.uint32(keep))
        out[i] = f32_from_bits(bits if keep else np.uint32(0))
    return np.int64(kept)


@loop()
def _cut_bf16(n, source, base, cut, out, at_threshold):
    """Do what `_cut_block` does for ``source - base``, given patterns of bf16, which nothing was dropped from."""
    threshold = np.uint32(cut[1])
    least = np.uint32(threshold + np.uint32(cut[0] == ABOVE))
    kept = np.uint32(0)
    for i in range(n):
        bits = bits_from_f32(f32_from_bits(np.uint32(source[i]) << np.uint32(16)) - base[i])
        magnitude = np.uint32(bits & MAGNITUDE)
        keep = magnitude >= least
        at_threshold[i] = np.uint8(magnitude == threshold)
        kept = np.uint32(kept + np.uint32(keep))
        out[i] = f32_from_bits(bits if keep else np.uint32(0))
    return np.int64(kept)


@loop()
def _settle_ties(element, n, cut, cut_key, out, buffers, inverted):
    """Zero the ties that the tie policy removes (if `inverted`, those it keeps); return their number."""
    w, at_threshold, places = buffers.words, buffers.at_threshold, buffers.places
    rule, limit = cut[0], cut[2]
    at_threshold[n : (n + 63) & ~63] = 0
    address = at_threshold.ctypes.data
    ties = 0
    for first in range(0, n, 64):
        flags = bytes_set(address + first)
        # Four places without a branch, of which none may count: ties are too rare for a branch to be foreseen.
        more = ties + np.int64(ones(flags))
        for _ in range(4):
            places[ties] = first + np.int64(trailing_zeros(flags))
            ties += 1
            flags &= flags - np.uint64(1)
        while flags != 0:
            places[ties] = first + np.int64(trailing_zeros(flags))
            ties += 1
            flags &= flags - np.uint64(1)
        ties = more
    if ties == 0:
        return 0
    shift = 0
    if rule == THIN:
        if ties * 4 > n:  # many ties: drawing words for the whole block is cheaper
            shift = words(element, n, cut_key, w)
            for t in range(ties):
                w[t] = w[shift + places[t]]
        else:
            words_at(element, places, ties, cut_key, w)
    removed = 0
    for t in range(ties):
        i = np.int64(places[t])
        keep = (element + i < limit if rule == INDEX else np.int64(w[t]) < limit) != inverted
        out[i] = out[i] if keep else np.float32(0)
        removed += not keep
    return removed


@njit(nogil=True)
def words_between(element, n, key, low, high, found_words, found_elements):
    """Count the random words below `low`, and write those from `low` to `high` with their elements; return both counts.

    When the arrays are full it stops writing and continues counting.

    ==============  ============  ============================================
    element         int64         flat index of the first element
    n               int64         number of elements
    key             uint32 (4,)   Philox key
    low, high       int64         first and last word that is written
    found_words     int64 (>=1,)  written
    found_elements  int64 (>=1,)  written, flat indices
    ==============  ============  ============================================
    """
    w = np.empty(BLOCK + 8, np.uint32)
    below, found = 0, 0
    for start in range(0, n, BLOCK):
        m = min(BLOCK, n - start)
        shift = words(element + start, m, key, w)
        for i in range(m):
            word = np.int64(w[shift + i])
            below += word < low
            if low <= word <= high:
                if found < len(found_words):
                    found_words[found] = word
                    found_elements[found] = element + start + i
                found += 1
    return below, found
