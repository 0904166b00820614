"""Statistics of the magnitudes of one model's task vector: patterns by bins, ties, fp64 sums."""

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
)
from streammerge.kernels.deltas import LARGEST, MAGNITUDE, delta_block, scratch
from streammerge.kernels.operands import BF16, F32
from streammerge.kernels.widths import width_of


@loop()
def alone(model):
    """Return the fields of one model."""
    return model.half, model.full, model.offsets[0], model.codes[0]


@loop()
def only(mask):
    """Return the drop and the cuts of one task vector, and their keys."""
    return mask.drops[0], mask.drop_keys[0], mask.cuts[0], mask.cut_keys[0]


AHEAD = 4 * BLOCK
"""Bytes between what is counted and what is asked for meanwhile: two blocks of 16 bits."""


@loop(forceinline=True)
def _bf16_keys(source, base, shift, n, lo, hi, keys):
    """Do the same as `_keys` for ``source - base``, given as patterns: of bf16, and of bf16 (`shift` 16) or fp32 (0)."""
    above, highest = np.uint32(0), np.uint32(0)
    for i in range(n):
        value = f32_from_bits(np.uint32(source[i]) << np.uint32(16))
        delta = value - f32_from_bits(np.uint32(base[i]) << shift)
        key = np.uint32(bits_from_f32(delta) & MAGNITUDE)
        above = np.uint32(above + np.uint32(key > hi))
        highest = max(highest, key)
        keys[i] = np.uint32(key - lo)
    return np.int64(above), highest


@loop()
def bf16_keys(source, base, n, lo, hi, keys):
    """Do the same for a base of bf16; the loop over a whole block has a length that is known when it is compiled."""
    if n == BLOCK:
        return _bf16_keys(source, base, np.uint32(16), BLOCK, lo, hi, keys)
    return _bf16_keys(source, base, np.uint32(16), n, lo, hi, keys)


@loop()
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
    b, out, keys = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32), np.empty(BLOCK, np.uint32)
    return _keys_in_window(model, base, span, mask, window, bins, b, out, keys, keys.ctypes.data, scratch())


@loop()
def _keys_in_window(model, base, span, mask, window, bins, b, out, keys, address, buffers):
    half, full, offset, code = alone(model)
    drop, drop_key, cut, cut_key = only(mask)
    base_half, base_full, base_offset, base_code = base
    element, n = span
    itemsize, base_itemsize = width_of(code), width_of(base_code)
    plain = code == BF16 and drop[0] == 0 and drop[1] == 0
    lo, hi = np.uint32(window.low), np.uint32(window.high)
    width, s = np.uint32(hi - lo), np.uint32(window.shift)
    later, later_base = half.ctypes.data + offset, base_half.ctypes.data + base_offset
    above = 0
    highest = np.uint32(0)
    for start in range(0, n, BLOCK):
        m = min(BLOCK, n - start)
        source = half[(offset >> 1) + start :]
        if plain and base_code == BF16:  # the common cases in a single loop take two thirds of the time
            of_base = base_half[(base_offset >> 1) + start :]
            above_here, highest_here = bf16_keys(source, of_base, m, lo, hi, keys)
        elif plain and base_code == F32:  # a quantised base
            wide = base_full[(base_offset >> 2) + start :]
            above_here, highest_here = _bf16_keys(source, wide, np.uint32(0), m, lo, hi, keys)
        else:
            widen_at(base_half, base_full, base_offset + start * base_itemsize, base_code, m, b)
            delta_block(
                half,
                full,
                offset + start * itemsize,
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
            above_here, highest_here = _keys(out, m, lo, hi, keys)
        above += above_here
        highest = max(highest, highest_here)
        for i in range(m, (m + 63) & ~63):
            keys[i] = np.uint32(0xFFFFFFFF)
        place = 2 * start + AHEAD
        _count_inside(keys, address, m, width, s, bins, later + place, later_base + place)
    return above, highest


@loop()
def _count_inside(keys, address, m, width, shift, bins, later, later_base):
    """Count the keys up to `width` in bins; a window has few, so a loop over the bits of 64 comparisons finds them.

    Meanwhile the elements at two addresses are asked for.
    """
    for first in range(0, m, 64):
        prefetch_row(later + 2 * first)
        prefetch_row(later_base + 2 * first)
        inside = np.uint64(0)
        for eight in range(0, 64, 8):
            inside |= eight_at_most(address + 4 * (first + eight), width) << np.uint64(eight)
        while inside != 0:
            bins[keys[first + np.int64(trailing_zeros(inside))] >> shift] += 1
            inside &= inside - np.uint64(1)


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
    b, out = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    _abs_sums(model, base, span, mask, partials, b, out, np.empty(8, np.float64), scratch())


@loop()
def _abs_sums(model, base, span, mask, partials, b, out, lanes, buffers):
    half, full, offset, code = alone(model)
    drop, drop_key, cut, cut_key = only(mask)
    base_half, base_full, base_offset, base_code = base
    element, n = span
    itemsize, base_itemsize = width_of(code), width_of(base_code)
    for part in range((n + 4095) // 4096):
        lanes[:] = 0.0
        stop = min(n, (part + 1) * 4096)
        for start in range(part * 4096, stop, BLOCK):
            m = min(BLOCK, stop - start)
            widen_at(base_half, base_full, base_offset + start * base_itemsize, base_code, m, b)
            delta_block(
                half,
                full,
                offset + start * itemsize,
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
            _add_sizes(out, m, lanes)
        partials[part] = ((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) + (
            (lanes[4] + lanes[5]) + (lanes[6] + lanes[7])
        )


@loop()
def _add_sizes(values, n, lanes):
    """Add the magnitudes of the values to eight lanes, in turn; those of NaN and infinity count as 0."""
    l0, l1, l2, l3, l4, l5, l6, l7 = (
        lanes[0],
        lanes[1],
        lanes[2],
        lanes[3],
        lanes[4],
        lanes[5],
        lanes[6],
        lanes[7],
    )
    for i in range(0, n, 8):
        l0 += _size(values[i])
        l1 += _size(values[i + 1])
        l2 += _size(values[i + 2])
        l3 += _size(values[i + 3])
        l4 += _size(values[i + 4])
        l5 += _size(values[i + 5])
        l6 += _size(values[i + 6])
        l7 += _size(values[i + 7])
    lanes[0], lanes[1], lanes[2], lanes[3] = l0, l1, l2, l3
    lanes[4], lanes[5], lanes[6], lanes[7] = l4, l5, l6, l7


@loop()
def _size(value):
    size = abs(value)
    return np.float64(size) if size <= LARGEST else 0.0


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
    b, out = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    _ties_per_run(model, base, span, mask, key, size, counts, b, out, scratch())


@loop()
def _ties_per_run(model, base, span, mask, key, size, counts, b, out, buffers):
    half, full, offset, code = alone(model)
    drop, drop_key, cut, cut_key = only(mask)
    base_half, base_full, base_offset, base_code = base
    element, n = span
    itemsize, base_itemsize = width_of(code), width_of(base_code)
    for start in range(0, n, BLOCK):
        m = min(BLOCK, n - start)
        widen_at(base_half, base_full, base_offset + start * base_itemsize, base_code, m, b)
        delta_block(
            half,
            full,
            offset + start * itemsize,
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
        for i in range(m):
            if (bits_from_f32(out[i]) & MAGNITUDE) == np.uint32(key):
                counts[(start + i) // size] += 1
