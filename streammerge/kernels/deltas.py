"""The masked task vector of one model over one block: widen, subtract, drop, cut."""

import numpy as np

from streammerge.kernels import njit
from streammerge.kernels.blocks import (
    BF16,
    BLOCK,
    bits_from_f32,
    eight_at_most,
    f32_from_bits,
    trailing_zeros,
    widen,
    words,
    words_at,
)
from streammerge.numerics import finite

MAGNITUDE = np.uint32(0x7FFFFFFF)
LARGEST = np.float32(finite.LARGEST)
"""The largest finite fp32 number."""

NO_CUT, ABOVE, ALL, THIN, INDEX = -1, 0, 1, 2, 3
"""What happens to an element whose magnitude equals the threshold: see `rules.Cut`."""


@njit(nogil=True)
def scratch():
    """Return the buffers that `delta_block` works in; made once, since it is called for every block."""
    return (
        np.empty(BLOCK, np.float32),
        np.empty(BLOCK + 8, np.uint32),
        np.empty(BLOCK, np.uint8),
        np.empty(BLOCK + 8, np.int64),
    )


@njit(nogil=True)
def delta_block(half, full, offset, code, base, element, n, drop, drop_key, cut, cut_key, out, buffers):
    """Write the surviving delta of `n` elements from `element` on into `out`, else 0; count them.

    `base` holds the block of the base in fp32; `offset` is the model's byte offset of this block;
    `drop` is (the integer threshold below which a random word drops its element, the element before which a
    word equal to it does too), 0 for none; `cut` is (rule, magnitude pattern, limit), and the same of the outliers.
    """
    x, w, at_threshold, _ = buffers
    # A cut in place would not vectorise (LLVM makes its stores conditional): it goes from x to out.
    delta = out if cut[0] == NO_CUT else x
    if code == BF16:
        source = half[offset >> 1 : (offset >> 1) + n]
        for i in range(n):
            delta[i] = f32_from_bits(np.uint32(source[i]) << np.uint32(16)) - base[i]
    else:
        widen(half, full, offset, code, n, x)
        for i in range(n):
            delta[i] = x[i] - base[i]
    kept = n
    if drop[0] > 0 or drop[1] > 0:
        least, end = np.uint64(drop[0]), drop[1]
        shift = words(element, n, drop_key, w)
        if drop[0] > 0:
            kept = _drop_block(n, np.uint32(drop[0] - 1), w[shift : shift + n], delta)
        for i in range(max(0, min(n, end - element))):  # an exact count: the rare words that equal the last
            if np.uint64(w[shift + i]) == least and (bits_from_f32(delta[i]) & MAGNITUDE) < np.uint32(
                0x7F800000
            ):
                delta[i] = np.float32(0)
                kept -= 1
    if cut[0] != NO_CUT:
        kept = _cut_block(n, cut, delta, out, at_threshold)
        if cut[0] in (THIN, INDEX):
            kept -= _settle_ties(element, n, cut, cut_key, out, buffers, False)
        if cut[3] != NO_CUT:
            kept -= _remove_outliers(element, n, cut[3:], cut_key, out, buffers)
    return kept


@njit(nogil=True)
def survivors(
    half,
    full,
    offsets,
    codes,
    base_offset,
    base_code,
    element,
    n,
    drops,
    drop_keys,
    cuts,
    cut_keys,
    base,
    deltas,
    kept,
):
    """Write the surviving deltas of every model, (models, n), and the base, all fp32; add how many survive to `kept`."""
    buffers = scratch()
    for start in range(0, n, BLOCK):
        m = min(BLOCK, n - start)
        b = base[start : start + m]
        widen(half, full, base_offset + start * (4 if base_code == 2 else 2), base_code, m, b)
        for model in range(len(offsets)):
            at = offsets[model] + start * (4 if codes[model] == 2 else 2)
            kept[model] += delta_block(
                half,
                full,
                at,
                codes[model],
                b,
                element + start,
                m,
                drops[model],
                drop_keys[model],
                cuts[model],
                cut_keys[model],
                deltas[model, start : start + m],
                buffers,
            )


@njit(nogil=True)
def _remove_outliers(element, n, cut, cut_key, out, buffers):
    """Zero the entries of `out` that the cut of the outliers keeps; return how many that were not zero already."""
    before, _, at_threshold, _ = buffers
    before[:n] = out[:n]
    threshold = np.uint32(cut[1])
    least = np.uint32(threshold + np.uint32(cut[0] != ALL))  # ties are settled below, or stay
    removed = np.uint32(0)
    for i in range(n):
        bits = bits_from_f32(before[i])
        magnitude = np.uint32(bits & MAGNITUDE)
        # What is not finite stays: it must show in the output, where it is found.
        remove = (magnitude >= least) & (magnitude < np.uint32(0x7F800000))
        at_threshold[i] = np.uint8((magnitude == threshold) & (magnitude < np.uint32(0x7F800000)))
        removed = np.uint32(removed + np.uint32(remove))
        out[i] = f32_from_bits(np.uint32(0) if remove else bits)
    count = np.int64(removed)
    if cut[0] in (THIN, INDEX):
        count += _settle_ties(element, n, cut, cut_key, out, buffers, True)
    return count


@njit(nogil=True)
def _drop_block(n, last, w, out):
    """Zero the elements whose word is at most `last`; return how many are left."""
    kept = np.uint32(0)
    for i in range(n):
        # What is not finite is never dropped: it must show in the output, where it is found.
        bits = bits_from_f32(out[i])
        infinite = np.uint32(bits & MAGNITUDE) >= np.uint32(0x7F800000)
        keep = (np.uint32(w[i]) > last) | infinite
        kept = np.uint32(kept + np.uint32(keep))  # in 32-bit lanes: numba widens every integer sum to 64
        out[i] = f32_from_bits(bits if keep else np.uint32(0))
    return np.int64(kept)


@njit(nogil=True)
def _cut_block(n, cut, delta, out, at_threshold):
    """Write what the cut keeps into `out`, and which elements equal the threshold; return how many are kept."""
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


@njit(nogil=True)
def _settle_ties(element, n, cut, cut_key, out, buffers, inverted):
    """Zero the elements at the threshold that a thinning or an index removes, `inverted` those it keeps; count them."""
    _, w, at_threshold, places = buffers
    rule, limit = cut[0], cut[2]
    at_threshold[n : (n + 7) & ~7] = 0
    eights = at_threshold.view(np.uint64)
    ties = 0
    for eight in range((n + 7) >> 3):
        flags = eights[eight]
        while flags != 0:
            places[ties] = 8 * eight + np.int64(trailing_zeros(flags) >> np.uint64(3))
            ties += 1
            flags &= flags - np.uint64(1)
    if ties == 0:
        return 0
    shift = 0
    if rule == THIN:
        if ties * 4 > n:  # many: cheaper drawn for the whole block
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
def _bf16_keys(source, base, n, lo, hi, keys):
    """Do what `_keys` does to ``source - base``, both the patterns of bf16."""
    above, highest = np.uint32(0), np.uint32(0)
    for i in range(n):
        delta = f32_from_bits(np.uint32(source[i]) << np.uint32(16)) - f32_from_bits(
            np.uint32(base[i]) << np.uint32(16)
        )
        key = np.uint32(bits_from_f32(delta) & MAGNITUDE)
        above = np.uint32(above + np.uint32(key > hi))
        highest = max(highest, key)
        keys[i] = np.uint32(key - lo)
    return np.int64(above), highest


@njit(nogil=True)
def _keys(deltas, n, lo, hi, keys):
    """Write ``pattern - lo`` of magnitudes into `keys`; return the count above `hi`, and the highest."""
    above, highest = np.uint32(0), np.uint32(0)
    for i in range(n):
        # The casts keep the loop in 32-bit lanes: numba widens every integer sum to 64.
        key = np.uint32(bits_from_f32(deltas[i]) & MAGNITUDE)
        above = np.uint32(above + np.uint32(key > hi))
        highest = max(highest, key)
        keys[i] = np.uint32(key - lo)
    return np.int64(above), highest


@njit(nogil=True)
def keys_in_window(
    half, full, offset, code, base_offset, base_code, element, n, drop, drop_key, low, high, shift, bins
):
    """Count the magnitude patterns of a piece: those above `high`; those in the window, in bins.

    Returns ``(above, highest)`` and adds to ``bins[(key - low) >> shift]``. `highest` is the
    largest pattern seen: one with all exponent bits set betrays a NaN or an infinity.
    """
    b, out, buffers = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32), scratch()
    keys = np.empty(BLOCK, np.uint32)
    plain = code == BF16 and base_code == BF16 and drop[0] == 0 and drop[1] == 0
    no_cut = np.array([NO_CUT, 0, 0, NO_CUT, 0, 0], np.int64)
    lo, hi = np.uint32(low), np.uint32(high)
    width, s = np.uint32(hi - lo), np.uint32(shift)
    above = 0
    highest = np.uint32(0)
    for start in range(0, n, BLOCK):
        m = min(BLOCK, n - start)
        if plain:  # the common case in one loop, at two thirds of the time
            first, base_first = (offset >> 1) + start, (base_offset >> 1) + start
            above_here, highest_here = _bf16_keys(
                half[first : first + m], half[base_first : base_first + m], m, lo, hi, keys
            )
        else:
            widen(half, full, base_offset + start * (4 if base_code == 2 else 2), base_code, m, b)
            delta_block(
                half,
                full,
                offset + start * (4 if code == 2 else 2),
                code,
                b,
                element + start,
                m,
                drop,
                drop_key,
                no_cut,
                drop_key,
                out,
                buffers,
            )
            above_here, highest_here = _keys(out, m, lo, hi, keys)
        above += above_here
        highest = max(highest, highest_here)
        keys[m : (m + 7) & ~7] = np.uint32(0xFFFFFFFF)
        for eight in range(0, m, 8):  # in a narrow window hits are few
            inside = eight_at_most(keys.ctypes.data + 4 * eight, width)
            while inside != 0:
                bins[keys[eight + np.int64(trailing_zeros(inside))] >> s] += 1
                inside &= inside - np.uint64(1)
    return above, highest


@njit(nogil=True)
def abs_sums(
    half, full, offset, code, base_offset, base_code, element, n, drop, drop_key, cut, cut_key, partials
):
    """Write the fp64 sum of abs(surviving delta) of each 4096-element block into `partials`.

    Eight lanes per block, added pairwise: a fixed order, whatever the chunk, thread or vector width.
    `element` is a multiple of 4096.
    """
    b, out, buffers = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32), scratch()
    lanes = np.empty(8, np.float64)
    for part in range((n + 4095) // 4096):
        lanes[:] = 0.0
        stop = min(n, (part + 1) * 4096)
        for start in range(part * 4096, stop, BLOCK):
            m = min(BLOCK, stop - start)
            widen(half, full, base_offset + start * (4 if base_code == 2 else 2), base_code, m, b)
            delta_block(
                half,
                full,
                offset + start * (4 if code == 2 else 2),
                code,
                b,
                element + start,
                m,
                drop,
                drop_key,
                cut,
                cut_key,
                out,
                buffers,
            )
            for i in range(m, (m + 7) & ~7):
                out[i] = np.float32(0)
            for i in range(0, m, 8):
                for j in range(8):
                    size = abs(out[i + j])
                    lanes[j] += np.float64(size) if size <= LARGEST else 0.0  # not of a NaN or an infinity
        partials[part] = ((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) + (
            (lanes[4] + lanes[5]) + (lanes[6] + lanes[7])
        )


@njit(nogil=True)
def ties_per_block(
    half, full, offset, code, base_offset, base_code, n, key, element, drop, drop_key, counts, size
):
    """Count the elements whose magnitude pattern is `key` in each run of `size` elements."""
    b, out, buffers = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32), scratch()
    no_cut = np.array([NO_CUT, 0, 0, NO_CUT, 0, 0], np.int64)
    for start in range(0, n, BLOCK):
        m = min(BLOCK, n - start)
        widen(half, full, base_offset + start * (4 if base_code == 2 else 2), base_code, m, b)
        delta_block(
            half,
            full,
            offset + start * (4 if code == 2 else 2),
            code,
            b,
            element + start,
            m,
            drop,
            drop_key,
            no_cut,
            drop_key,
            out,
            buffers,
        )
        for i in range(m):
            if (bits_from_f32(out[i]) & MAGNITUDE) == np.uint32(key):
                counts[(start + i) // size] += 1


@njit(nogil=True)
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
