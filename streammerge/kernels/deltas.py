"""The masked task vector of one model over one block: widen, subtract, drop, cut."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from streammerge.kernels import njit
from streammerge.kernels.blocks import (
    BLOCK,
    bits_from_f32,
    eight_at_most,
    f32_from_bits,
    trailing_zeros,
    widen,
    widen_at,
    words,
    words_at,
)
from streammerge.kernels.operands import BF16, Mask, width_of
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


@njit(nogil=True)
def delta_block(half, full, offset, code, base, element, n, mask, out, buffers):
    """Write the surviving task vector of at most `BLOCK` elements into `out`, 0 elsewhere; return the number of survivors.

    ==========  ==============  ============================================
    half, full  uint16, uint32  the buffer, as in `Operands`
    offset      int64           byte offset of the model's block
    code        int64           the model's dtype
    base        float32 (n,)    the same elements of the base
    element     int64           flat index of the first element
    n           int64           number of elements
    mask        Mask            the drop and the cuts
    out         float32 (>=n,)  written
    buffers     Scratch         overwritten
    ==========  ==============  ============================================
    """
    x, w = buffers.x, buffers.words
    drop, drop_key, cut, cut_key = mask
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
    if drop[0] > 0 or drop[1] > 0:
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
        kept = _cut_block(n, cut, delta, out, buffers.at_threshold)
        if cut[0] in (THIN, INDEX):
            kept -= _settle_ties(element, n, cut, cut_key, out, buffers, False)
        if cut[3] != NO_CUT:
            kept -= _remove_outliers(element, n, cut[3:], cut_key, out, buffers)
    return kept


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
    buffers = scratch()
    half, full, offsets, codes = models
    drops, drop_keys, cuts, cut_keys = masks
    for start in range(0, span.n, BLOCK):
        m = min(BLOCK, span.n - start)
        b = base_out[start : start + m]
        widen(base, first + start, m, b)
        for i in range(len(offsets)):
            at = offsets[i] + (first + start) * width_of(codes[i])
            mask = Mask(drops[i], drop_keys[i], cuts[i], cut_keys[i])
            out = deltas[i, start : start + m]
            kept[i] += delta_block(half, full, at, codes[i], b, span.element + start, m, mask, out, buffers)


@njit(nogil=True)
def alone(model, mask):
    """Return the fields of a single model, and its mask."""
    one = Mask(mask.drops[0], mask.drop_keys[0], mask.cuts[0], mask.cut_keys[0])
    return model.half, model.full, model.offsets[0], model.codes[0], one


@njit(nogil=True)
def _remove_outliers(element, n, cut, cut_key, out, buffers):
    """Zero the entries of `out` that the outliers' cut keeps; return how many were not zero before."""
    before, at_threshold = buffers.x, buffers.at_threshold
    before[:n] = out[:n]
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


@njit(nogil=True)
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


@njit(nogil=True)
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


@njit(nogil=True)
def _settle_ties(element, n, cut, cut_key, out, buffers, inverted):
    """Zero the ties that the tie policy removes (if `inverted`, those it keeps); return their number."""
    w, at_threshold, places = buffers.words, buffers.at_threshold, buffers.places
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
def _bf16_keys(source, base, n, lo, hi, keys):
    """Do the same as `_keys` for ``source - base``, both given as bf16 patterns."""
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
def keys_in_window(model, base, span, mask, window, bins):
    """Count the magnitude patterns of a block: in total above the window, in bins inside it.

    Returns ``(above, highest)`` and adds to ``bins[(key - low) >> shift]``. `highest` is the
    largest pattern seen; if all its exponent bits are set, the block contains NaN or infinity.

    ======  ============  ============================================
    model   Operands      one model
    base    Operand       the base
    span    Span          the block
    mask    Masks         its drop; cuts are ignored
    window  Window        the patterns to count
    bins    int32 (>=1,)  counts, added to
    ======  ============  ============================================
    """
    half, full, offset, code, one = alone(model, mask)
    itemsize = width_of(code)
    b, out, buffers = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32), scratch()
    keys = np.empty(BLOCK, np.uint32)
    plain = code == BF16 and base.code == BF16 and one.drop[0] == 0 and one.drop[1] == 0
    lo, hi = np.uint32(window.low), np.uint32(window.high)
    width, s = np.uint32(hi - lo), np.uint32(window.shift)
    above = 0
    highest = np.uint32(0)
    for start in range(0, span.n, BLOCK):
        m = min(BLOCK, span.n - start)
        if plain:  # the common case in a single loop takes two thirds of the time
            at, base_at = (offset >> 1) + start, (base.offset >> 1) + start
            above_here, highest_here = _bf16_keys(
                half[at : at + m], half[base_at : base_at + m], m, lo, hi, keys
            )
        else:
            widen(base, start, m, b)
            delta_block(
                half, full, offset + start * itemsize, code, b, span.element + start, m, one, out, buffers
            )
            above_here, highest_here = _keys(out, m, lo, hi, keys)
        above += above_here
        highest = max(highest, highest_here)
        keys[m : (m + 7) & ~7] = np.uint32(0xFFFFFFFF)
        for eight in range(0, m, 8):  # a narrow window has few hits
            inside = eight_at_most(keys.ctypes.data + 4 * eight, width)
            while inside != 0:
                bins[keys[eight + np.int64(trailing_zeros(inside))] >> s] += 1
                inside &= inside - np.uint64(1)
    return above, highest


@njit(nogil=True)
def abs_sums(model, base, span, mask, partials):
    """Write the fp64 sum of abs(surviving entry) of each run of 4096 elements.

    Each run is summed in eight lanes that are added pairwise: the order does not depend on block, thread or vector width.

    ========  =====================  ============================================
    model     Operands               one model
    base      Operand                the base
    span      Span                   the block; its first element is a multiple of 4096
    mask      Masks                  its drop and cuts
    partials  float64 (n / 4096 up)  written
    ========  =====================  ============================================
    """
    half, full, offset, code, one = alone(model, mask)
    itemsize = width_of(code)
    b, out, buffers = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32), scratch()
    lanes = np.empty(8, np.float64)
    for part in range((span.n + 4095) // 4096):
        lanes[:] = 0.0
        stop = min(span.n, (part + 1) * 4096)
        for start in range(part * 4096, stop, BLOCK):
            m = min(BLOCK, stop - start)
            widen(base, start, m, b)
            delta_block(
                half, full, offset + start * itemsize, code, b, span.element + start, m, one, out, buffers
            )
            for i in range(m, (m + 7) & ~7):
                out[i] = np.float32(0)
            for i in range(0, m, 8):
                for j in range(8):
                    size = abs(out[i + j])
                    lanes[j] += np.float64(size) if size <= LARGEST else 0.0  # without NaN and infinity
        partials[part] = ((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) + (
            (lanes[4] + lanes[5]) + (lanes[6] + lanes[7])
        )


@njit(nogil=True)
def ties_per_run(model, base, span, mask, key, size, counts):
    """Count the elements whose magnitude pattern is `key` in each run of `size` elements.

    ======  ===================  ============================================
    model   Operands             one model
    base    Operand              the base
    span    Span                 the block
    mask    Masks                its drop; there is no cut
    key     int64                the pattern
    size    int64                elements of a run
    counts  int64 (n / size up)  added to
    ======  ===================  ============================================
    """
    half, full, offset, code, one = alone(model, mask)
    itemsize = width_of(code)
    b, out, buffers = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32), scratch()
    for start in range(0, span.n, BLOCK):
        m = min(BLOCK, span.n - start)
        widen(base, start, m, b)
        delta_block(
            half, full, offset + start * itemsize, code, b, span.element + start, m, one, out, buffers
        )
        for i in range(m):
            if (bits_from_f32(out[i]) & MAGNITUDE) == np.uint32(key):
                counts[(start + i) // size] += 1


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
