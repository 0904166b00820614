"""The masked task vector of one model over one block: widen, subtract, drop, cut."""

import numpy as np
from numba import njit

from streammerge.kernels.blocks import (
    BLOCK,
    bits_from_f32,
    f32_from_bits,
    widen,
    word_at,
    words,
)

MAGNITUDE = np.uint32(0x7FFFFFFF)

NO_CUT, ABOVE, ALL, THIN, INDEX = -1, 0, 1, 2, 3
"""What happens to an element whose magnitude equals the threshold: see `recipes.Cut`."""


@njit(nogil=True, cache=True)
def delta_block(half, full, offset, code, base, element, n, drop, drop_key, cut, cut_key, out, x, w):
    """Write the surviving delta of `n` elements from `element` on into `out`, else 0; count them.

    `base` holds the block of the base in fp32; `offset` is the model's byte offset of this block;
    `drop` is (the integer threshold below which a random word drops its element, the element before which a
    word equal to it does too), 0 for none; `cut` is (rule, magnitude pattern, limit). `x` and `w` are scratch.
    """
    widen(half, full, offset, code, n, x)
    for i in range(n):
        out[i] = x[i] - base[i]
    kept = n
    if drop[0] > 0 or drop[1] > 0:
        least, end = np.uint64(drop[0]), drop[1]
        shift = words(element, n, drop_key, w)
        kept = 0
        for i in range(n):
            # What is not finite is never dropped: it must show in the output, where it is found.
            finite = (bits_from_f32(out[i]) & MAGNITUDE) < np.uint32(0x7F800000)
            keep = (np.uint64(w[shift + i]) >= least) | (not finite)
            out[i] = out[i] if keep else np.float32(0)
            kept += keep
        for i in range(max(0, min(n, end - element))):  # an exact count: the rare words that equal the last
            if np.uint64(w[shift + i]) == least and (bits_from_f32(out[i]) & MAGNITUDE) < np.uint32(
                0x7F800000
            ):
                out[i] = np.float32(0)
                kept -= 1
    if cut[0] != NO_CUT:
        kept = _cut_block(element, n, cut, cut_key, out, w)
    return kept


@njit(nogil=True, cache=True)
def _cut_block(element, n, cut, cut_key, out, w):
    """Zero what the cut removes. Elements at the threshold itself are settled one by one."""
    rule, threshold, limit = cut[0], np.uint32(cut[1]), cut[2]
    least = np.uint32(threshold + np.uint32(rule == ABOVE))
    kept = np.uint32(0)
    ties = np.uint32(0)
    for i in range(n):
        # The casts keep the loop in 32-bit lanes: numba widens every integer sum to 64.
        bits = bits_from_f32(out[i])
        magnitude = np.uint32(bits & MAGNITUDE)
        keep = magnitude >= least
        ties = np.uint32(ties + np.uint32(magnitude == threshold))
        kept = np.uint32(kept + np.uint32(keep))
        out[i] = f32_from_bits(bits if keep else np.uint32(0))
    total = np.int64(kept)
    if ties == 0 or rule in (ABOVE, ALL):
        return total
    places = np.empty(BLOCK, np.uint32)
    n_ties = 0
    for i in range(n):  # gathered without a branch
        places[n_ties] = np.uint32(i)
        n_ties += (bits_from_f32(out[i]) & MAGNITUDE) == threshold
    all_words = rule == THIN and n_ties * 8 > n  # many: cheaper drawn for the whole block
    shift = words(element, n, cut_key, w) if all_words else 0
    for t in range(n_ties):
        i = np.int64(places[t])
        if rule == INDEX:
            keep = element + i < limit
        elif all_words:
            keep = np.int64(w[shift + i]) < limit
        else:
            keep = np.int64(word_at(element + i, cut_key)) < limit
        if not keep:
            out[i] = np.float32(0)
            total -= 1
    return total


@njit(nogil=True, cache=True)
def keys_in_window(half, full, offset, code, base_offset, base_code, element, n,
                   drop, drop_key, low, high, shift, bins):  # fmt: skip
    """Count the magnitude patterns of a piece: those above `high`; those in the window, in bins.

    Returns ``(above, highest)`` and adds to ``bins[(key - low) >> shift]``. `highest` is the
    largest pattern seen: one with all exponent bits set betrays a NaN or an infinity.
    """
    x, b, out = (
        np.empty(BLOCK, np.float32),
        np.empty(BLOCK, np.float32),
        np.empty(BLOCK, np.float32),
    )
    w, keys = np.empty(BLOCK + 8, np.uint32), np.empty(BLOCK, np.uint32)
    hits = np.empty(BLOCK, np.uint32)
    no_cut = np.array([NO_CUT, 0, 0], np.int64)
    lo, hi = np.uint32(low), np.uint32(high)
    width, s = np.uint32(hi - lo), np.uint32(shift)
    above = 0
    highest = np.uint32(0)
    for start in range(0, n, BLOCK):
        m = min(BLOCK, n - start)
        widen(half, full, base_offset + start * (4 if base_code == 2 else 2), base_code, m, b)
        delta_block(half, full, offset + start * (4 if code == 2 else 2), code, b,
                    element + start, m, drop, drop_key, no_cut, drop_key, out, x, w)  # fmt: skip
        above_here = np.uint32(0)
        for i in range(m):
            # The casts keep the loop in 32-bit lanes: numba widens every integer sum to 64.
            key = np.uint32(bits_from_f32(out[i]) & MAGNITUDE)
            above_here = np.uint32(above_here + np.uint32(key > hi))
            highest = max(highest, key)
            keys[i] = np.uint32(key - lo)
        above += above_here
        n_hits = 0
        for i in range(m):  # gathered without a branch; in a narrow window they are few
            hits[n_hits] = keys[i]
            n_hits += keys[i] <= width
        for i in range(n_hits):
            bins[hits[i] >> s] += 1
    return above, highest


@njit(nogil=True, cache=True)
def abs_sums(half, full, offset, code, base_offset, base_code, element, n,
             drop, drop_key, cut, cut_key, partials):  # fmt: skip
    """Write the fp64 sum of abs(surviving delta) of each 4096-element block into `partials`.

    Eight lanes per block, added pairwise: a fixed order, whatever the chunk, thread or vector width.
    `element` is a multiple of 4096.
    """
    x, b, out = (
        np.empty(BLOCK, np.float32),
        np.empty(BLOCK, np.float32),
        np.empty(BLOCK, np.float32),
    )
    w, lanes = np.empty(BLOCK + 8, np.uint32), np.empty(8, np.float64)
    for part in range((n + 4095) // 4096):
        lanes[:] = 0.0
        stop = min(n, (part + 1) * 4096)
        for start in range(part * 4096, stop, BLOCK):
            m = min(BLOCK, stop - start)
            widen(half, full, base_offset + start * (4 if base_code == 2 else 2), base_code, m, b)
            delta_block(half, full, offset + start * (4 if code == 2 else 2), code, b,
                        element + start, m, drop, drop_key, cut, cut_key, out, x, w)  # fmt: skip
            for i in range(m, (m + 7) & ~7):
                out[i] = np.float32(0)
            for i in range(0, m, 8):
                for j in range(8):
                    lanes[j] += abs(np.float64(out[i + j]))
        partials[part] = ((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) + (
            (lanes[4] + lanes[5]) + (lanes[6] + lanes[7])
        )


@njit(nogil=True, cache=True)
def ties_per_block(half, full, offset, code, base_offset, base_code, n, key, element,
                   drop, drop_key, counts, size):  # fmt: skip
    """Count the elements whose magnitude pattern is `key` in each run of `size` elements."""
    x, b, out = (
        np.empty(BLOCK, np.float32),
        np.empty(BLOCK, np.float32),
        np.empty(BLOCK, np.float32),
    )
    w = np.empty(BLOCK + 8, np.uint32)
    no_cut = np.array([NO_CUT, 0, 0], np.int64)
    for start in range(0, n, BLOCK):
        m = min(BLOCK, n - start)
        widen(half, full, base_offset + start * (4 if base_code == 2 else 2), base_code, m, b)
        delta_block(half, full, offset + start * (4 if code == 2 else 2), code, b,
                    element + start, m, drop, drop_key, no_cut, drop_key, out, x, w)  # fmt: skip
        for i in range(m):
            if (bits_from_f32(out[i]) & MAGNITUDE) == np.uint32(key):
                counts[(start + i) // size] += 1


@njit(nogil=True, cache=True)
def words_between(element, n, key, low, high, found_words, found_elements):
    """Count the random words below `low`; write those up to `high` and their elements; return both counts.

    Stops writing where the arrays are full; the count goes on.
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
