"""Elements near a threshold that is not known yet: which ones they are, and what survives of them once it is known."""

import numpy as np

from streammerge.kernels import loop, njit
from streammerge.kernels.blocks import (
    BLOCK,
    bits_from_f32,
    eight_at_most,
    f32_from_bits,
    prefetch_row,
    trailing_zeros,
    widen_at,
    words,
    words_at,
)
from streammerge.kernels.deltas import ABOVE, ALL, INDEX, MAGNITUDE, NO_CUT, THIN, delta_block, scratch
from streammerge.kernels.magnitudes import AHEAD, _keys, alone, bf16_keys, only
from streammerge.kernels.operands import BF16
from streammerge.kernels.widths import width_of


@njit(nogil=True)
def mark_undecided(model, base, span, mask, bounds, bins, marks):
    """Mark the elements that the two cuts treat differently, and count the patterns from the lower to the higher threshold.

    Returns ``(above, highest)`` and adds to ``bins[key - low]``, as `magnitudes.keys_in_window` does.

    ======  ==================  ============================================
    model   Operands            one model
    base    Operand             the base
    span    Span                the block
    mask    Masks               its drop, and the key of the words that thin ties
    bounds  Bounds              the two cuts
    bins    int32 (patterns,)   counts, added to
    marks   uint8 (n,)          1 is written where an element is undecided
    ======  ==================  ============================================
    """
    b, out, keys = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32), np.empty(BLOCK, np.uint32)
    places, w = np.empty(BLOCK + 8, np.int64), np.empty(BLOCK + 8, np.uint32)
    memory = (b, out, keys, keys.ctypes.data, places, w, scratch())
    return _mark_undecided(model, base, span, mask, bounds, bins, marks, memory)


@loop()
def _mark_undecided(model, base, span, mask, bounds, bins, marks, memory):
    half, full, offset, code = alone(model)
    drop, drop_key, cut, cut_key = only(mask)
    base_half, base_full, base_offset, base_code = base
    element, n = span
    policy, low, low_limit, high, high_limit = bounds
    itemsize, base_itemsize = width_of(code), width_of(base_code)
    b, out, keys, address, places, w, buffers = memory
    plain = code == BF16 and base_code == BF16 and drop[0] == 0 and drop[1] == 0
    lo, hi = np.uint32(low), np.uint32(high)
    width = np.uint32(hi - lo)
    later, later_base = half.ctypes.data + offset + AHEAD, base_half.ctypes.data + base_offset + AHEAD
    above = 0
    highest = np.uint32(0)
    for start in range(0, n, BLOCK):
        m = min(BLOCK, n - start)
        if plain:
            source, of_base = half[(offset >> 1) + start :], base_half[(base_offset >> 1) + start :]
            above_here, highest_here = bf16_keys(source, of_base, m, lo, hi, keys)
        else:
            widen_at(base_half, base_full, base_offset + start * base_itemsize, base_code, m, b)
            at = offset + start * itemsize
            delta_block(
                half, full, at, code, b, element + start, m, drop, drop_key, cut, cut_key, out, buffers
            )
            above_here, highest_here = _keys(out, m, lo, hi, keys)
        above += above_here
        highest = max(highest, highest_here)
        for i in range(m, (m + 63) & ~63):
            keys[i] = np.uint32(0xFFFFFFFF)
        for first in range(0, 2 * m, 128):
            prefetch_row(later + 2 * start + first)
            prefetch_row(later_base + 2 * start + first)
        ties = _mark_inside(policy, keys, address, m, width, bins, marks, start, places)
        if ties > 0:
            _draw(policy, element + start, m, places, ties, cut_key, w)
            for t in range(ties):
                place = places[t]
                over = keys[place]
                word = element + start + place if policy == INDEX else np.int64(w[t])
                kept, dropped = over == width and word < high_limit, over == 0 and word >= low_limit
                if not (kept or dropped):
                    marks[start + place] = 1
    return above, highest


@loop()
def _mark_inside(policy, keys, address, m, width, bins, marks, start, places):
    """Count the keys up to `width`, and mark those that no word decides; return the number of others, and write `places`."""
    ties = 0
    for first in range(0, m, 64):  # few patterns are inside
        inside = np.uint64(0)
        for eight in range(0, 64, 8):
            inside |= eight_at_most(address + 4 * (first + eight), width) << np.uint64(eight)
        while inside != 0:
            place = first + np.int64(trailing_zeros(inside))
            over = keys[place]
            bins[over] += 1
            if policy == ABOVE:
                marks[start + place] |= over != np.uint32(0)
            elif policy == ALL:
                marks[start + place] |= over != width
            elif over == np.uint32(0) or over == width:
                places[ties] = place
                ties += 1
            else:
                marks[start + place] = 1
            inside &= inside - np.uint64(1)
    return ties


@loop()
def _draw(policy, element, n, places, ties, key, w):
    """Write the words of tied elements into `w`, in order."""
    if policy != THIN:
        return
    if ties * 4 > n:  # many ties: drawing words for the whole block is cheaper
        shift = words(element, n, key, w)
        for t in range(
            ties
        ):  # a place is never smaller than its number, so no word is overwritten before it is read
            w[t] = w[shift + places[t]]
    else:
        words_at(element, places, ties, key, w)


@loop()
def _keeps(policy, threshold, limit, key, element, word):
    """Return whether a cut keeps a magnitude."""
    number = element if policy == INDEX else word
    kept_tie = policy == ALL or (policy >= THIN and number < limit)
    return key > threshold or (key == threshold and kept_tie)


@loop()
def _survives(cut, key, element, word):
    """Return whether an entry survives the cut, and is no outlier; `cut` is a row of `Masks`."""
    kept = cut[0] == NO_CUT or _keeps(cut[0], cut[1], cut[2], key, element, word)
    return kept and (cut[3] == NO_CUT or not _keeps(cut[3], cut[4], cut[5], key, element, word))


@njit(nogil=True)
def remove_dropped(models, base, elements, before, after, change):
    """Give scattered elements that do not survive the value of the base, so that their task vectors are 0. All are finite.

    ========  ============  ============================================
    models    Operands      the models, fp32, k of them
    base      Operand       the base, fp32
    elements  int64 (n,)    flat index of each element in the whole tensor
    before    Masks         the drops, and earlier cuts
    after     Masks         the same drops, and the cuts
    change    int64 (k,)    the survivors of `after` minus those of `before`, added to
    ========  ============  ============================================
    """
    keys, w = np.empty(BLOCK, np.uint32), np.empty(BLOCK + 8, np.uint32)
    places, tied = np.empty(BLOCK + 8, np.int64), np.empty(BLOCK, np.int64)
    _remove_dropped(models, base, elements, before, after, change, keys, w, places, tied)


@loop()
def _remove_dropped(models, base, elements, before, after, change, keys, w, places, tied):
    full, offsets = models.full, models.offsets
    first_base = base.offset >> 2
    drops, drop_keys, cuts, cut_keys = after
    for i in range(len(offsets)):
        drop, cut, earlier = drops[i], cuts[i], before.cuts[i]
        for start in range(0, len(elements), BLOCK):
            m = min(BLOCK, len(elements) - start)
            of_base, of_model = first_base + start, (offsets[i] >> 2) + start
            for j in range(m):
                delta = f32_from_bits(full[of_model + j]) - f32_from_bits(full[of_base + j])
                keys[j] = bits_from_f32(delta) & MAGNITUDE
            if drop[0] > 0 or drop[1] > 0:
                for j in range(m):
                    places[j] = elements[start + j]
                words_at(0, places, m, drop_keys[i], w)
                for j in range(m):
                    word, element = np.int64(w[j]), elements[start + j]
                    if word < drop[0] or (word == drop[0] and element < drop[1]):
                        keys[j] = np.uint32(0)  # a dropped entry counts as 0 for the cut
                        full[of_model + j] = full[of_base + j]
            ties = 0
            for j in range(m):
                key = np.int64(keys[j])
                if key == cut[1] or key == cut[4] or key == earlier[1] or key == earlier[4]:
                    tied[ties] = j
                    places[ties] = elements[start + j]
                    ties += 1
            words_at(0, places, ties, cut_keys[i], w)
            t = 0
            for j in range(m):
                key, element, word = np.int64(keys[j]), elements[start + j], np.int64(0)
                if t < ties and tied[t] == j:
                    word = np.int64(w[t])
                    t += 1
                survives = _survives(cut, key, element, word)
                change[i] += np.int64(survives) - np.int64(_survives(earlier, key, element, word))
                if not survives:
                    full[of_model + j] = full[of_base + j]
