"""Drops by rank: the probability to survive grows with the rank of an entry's magnitude in its row."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from streammerge.kernels import njit
from streammerge.kernels.blocks import BLOCK, bits_from_f32, round_at, widen_at, words
from streammerge.kernels.deltas import LARGEST, MAGNITUDE
from streammerge.kernels.magnitudes import alone
from streammerge.kernels.merge import _add_weights, _elect, _sum_signs
from streammerge.kernels.operands import width_of

_INFINITE = np.uint32(0x7F800000)
_PATIENCE = 16
"""Moves per entry after which insertion sort is given up."""


@njit(nogil=True)
def buckets_for(length):
    """Return the number of buckets that sort a row: one or two per entry, as long as they fit in the cache."""
    count = 256
    while count < length and count < 16384:
        count *= 2
    return count


@njit(nogil=True)
def _insert(entries, n):
    """Sort nearly sorted entries; return False if that takes too many moves."""
    moves = 0
    for i in range(1, n):
        entry = entries[i]
        at = i
        while at > 0 and entries[at - 1] > entry:
            entries[at] = entries[at - 1]
            at -= 1
        entries[at] = entry
        moves += i - at
        if moves > _PATIENCE * n:
            return False
    return True


@njit(nogil=True)
def _sort(delta, n, entries, places, ends):
    """Sort the magnitudes of a row into `entries`, each as pattern << 32 | index.

    Buckets of equal width leave normally distributed deltas nearly sorted; insertion sort finishes, or a comparison
    sort if that takes too long. Non-finite entries go into the last bucket.
    """
    largest = np.float32(0)
    for i in range(n):
        size = abs(delta[i])
        largest = max(largest, size if size <= LARGEST else np.float32(0))
    last = np.float32(len(ends) - 1)
    scale = last / largest if largest > 0 else np.float32(0)
    for i in range(n):  # rounding is monotonic: no bucket holds a magnitude above one of the next bucket
        place = abs(delta[i]) * scale
        places[i] = np.int32(place if place < last else last)
    ends[:] = 0
    for i in range(n):
        ends[places[i]] += 1
    total = 0
    for bucket in range(len(ends)):
        count = ends[bucket]
        ends[bucket] = total
        total += count
    for i in range(n):
        key = np.uint64(bits_from_f32(delta[i]) & MAGNITUDE)
        bucket = places[i]
        entries[ends[bucket]] = (key << np.uint64(32)) | np.uint64(i)
        ends[bucket] += 1
    if not _insert(entries, n):
        entries[:n].sort()


@njit(nogil=True, error_model="numpy")
def _survivors(n, element, key, low, spread, unbiased, buffers, out):
    """Write the surviving entries of the row in `buffers.delta` into `out`, fp64 (n,), else 0; return their number.

    An entry survives with probability low + spread * (r - 1) / (n - 1), where r is the mid-rank of its magnitude; if
    `unbiased` it is divided by that. Non-finite values always survive, so that the output shows them.
    """
    entries, places, ends, w, delta = buffers
    shift = words(element, n, key, w)
    kept = 0
    if spread == 0.0 or n == 1:
        q = low + spread * 0.5
        limit = np.int64(np.floor(q * 4294967296.0 + 0.5))
        for at in range(n):
            infinite = (bits_from_f32(delta[at]) & MAGNITUDE) >= _INFINITE
            keep = np.int64(w[shift + at]) < limit or infinite
            out[at] = np.float64(delta[at]) / (q if unbiased else 1.0) if keep else 0.0
            kept += keep
        return kept
    _sort(delta, n, entries, places, ends)
    first = 0
    while first < n:
        pattern = entries[first] >> np.uint64(32)
        last = first + 1
        while last < n and entries[last] >> np.uint64(32) == pattern:
            last += 1
        q = low + spread * (0.5 * (first + last - 1) / (n - 1))
        limit = (
            np.int64(np.floor(q * 4294967296.0 + 0.5))
            if pattern < np.uint64(_INFINITE)
            else np.int64(1) << 32
        )
        divisor = q if unbiased else 1.0
        for place in range(first, last):
            at = np.int64(entries[place] & np.uint64(0xFFFFFFFF))
            keep = np.int64(w[shift + at]) < limit
            out[at] = np.float64(delta[at]) / divisor if keep else 0.0
            kept += keep
        first = last
    return kept


class RowBuffers(NamedTuple):
    """The scratch buffers of `_survivors`; n is the length of a row."""

    entries: NDArray[np.uint64]
    """(n,): sorted magnitudes, pattern << 32 | index"""
    places: NDArray[np.int32]
    """(n,): the bucket of each entry"""
    ends: NDArray[np.int32]
    """(buckets,): the end of each bucket"""
    words: NDArray[np.uint32]
    """(n + 8,): random words"""
    delta: NDArray[np.float32]
    """(n,): the row of the model minus that of the base"""


@njit(nogil=True)
def _row_buffers(length):
    """Return buffers for rows of `length` elements."""
    return RowBuffers(
        np.empty(length, np.uint64),
        np.empty(length, np.int32),
        np.empty(buckets_for(length), np.int32),
        np.empty(length + 8, np.uint32),
        np.empty(length, np.float32),
    )


@njit(nogil=True)
def _widen_row(half, full, offset, code, n, out):
    for start in range(0, n, BLOCK):
        widen_at(half, full, offset + start * width_of(code), code, min(BLOCK, n - start), out[start:])


@njit(nogil=True)
def _delta_row(half, full, offset, code, base, n, out):
    """Write a model's row minus the base's, in fp32."""
    _widen_row(half, full, offset, code, n, out)
    for at in range(n):
        out[at] -= base[at]


@njit(nogil=True)
def ranked_abs_sums(model, base, span, length, drop, partials):
    """Write the fp64 sum of abs(surviving entry) of each run of 4096 elements, for whole rows.

    The order of the sum is that of `magnitudes.abs_sums`.

    ========  =====================  ============================================
    model     Operands               one model
    base      Operand                the base
    span      Span                   the block; its first element is a multiple of 4096
    length    int64                  elements of a row
    drop      RankDrops              its drop; not unbiased
    partials  float64 (n / 4096 up)  written
    ========  =====================  ============================================
    """
    b, left, buffers = np.empty(length, np.float32), np.empty(length, np.float64), _row_buffers(length)
    lanes = np.zeros(8, np.float64)
    half, full, offset, code = alone(model)
    base_half, base_full, base_offset, base_code = base
    width, base_width = width_of(code), width_of(base_code)
    element, n = span
    key, low, spread, delta = drop.keys[0], drop.lows[0], drop.spreads[0], buffers.delta
    for first in range(0, n, length):
        _widen_row(base_half, base_full, base_offset + first * base_width, base_code, length, b)
        _delta_row(half, full, offset + first * width, code, b, length, delta)
        _survivors(length, element + first, key, low, spread, False, buffers, left)
        for i in range(length):
            at = first + i
            size = abs(left[i])
            lanes[at & 7] += size if size <= np.float64(LARGEST) else 0.0
            if (at & 4095) == 4095 or at == n - 1:
                partials[at >> 12] = ((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) + (
                    (lanes[4] + lanes[5]) + (lanes[6] + lanes[7])
                )
                lanes[:] = 0.0


@njit(nogil=True, error_model="numpy")
def ranked_merge(models, base, span, length, drops, how, out, tally):
    """Do the same as `merge.task_vector_merge` for whole rows and drops by rank.

    ======  ===========  ============================================
    models  Operands     the models, k of them
    base    Operand      the base
    span    Span         the block, of whole rows
    length  int64        elements of a row
    drops   RankDrops    the drops
    how     Combination  weights, signs, scale
    out     Operand      the output; of code `NOTHING` it is not written
    tally   Tally        survivors and elected signs, added to
    ======  ===========  ============================================
    """
    b, left, buffers = np.empty(length, np.float32), np.empty(length, np.float64), _row_buffers(length)
    up, down, merged = np.empty(length), np.empty(length), np.empty(length)
    up_weight, down_weight = np.empty(length), np.empty(length)
    half, full, offsets, codes = models
    base_half, base_full, base_offset, base_code = base
    out_half, out_full, out_offset, out_code = out
    base_width, out_width = width_of(base_code), width_of(out_code)
    element, n = span
    lows, spreads, unbiased, keys = drops
    coefficients, weights, elect, zero_sign, normalize, divisor, scale = how
    kept, signs = tally
    delta = buffers.delta
    bad = 0
    for first in range(0, n, length):
        _widen_row(base_half, base_full, base_offset + first * base_width, base_code, length, b)
        up[:] = 0.0
        if elect:
            down[:] = 0.0
            up_weight[:] = 0.0
            down_weight[:] = 0.0
        for model in range(len(weights)):
            at = offsets[model] + first * width_of(codes[model])
            _delta_row(half, full, at, codes[model], b, length, delta)
            kept[model] += _survivors(
                length, element + first, keys[model], lows[model], spreads[model], unbiased, buffers, left
            )
            coefficient = coefficients[model]
            if elect:
                _sum_signs(length, left, coefficient, up, down)
                if normalize:
                    _add_weights(length, left, coefficient, weights[model], up_weight, down_weight)
            else:
                for i in range(length):
                    up[i] += coefficient * left[i]
        if elect:
            signs[0] += _elect(length, up, down, up_weight, down_weight, zero_sign, normalize, merged)
        else:
            for i in range(length):
                merged[i] = up[i] / divisor
        if out_code >= 0:
            for i in range(length):
                merged[i] = np.float64(b[i]) + scale * merged[i]
            for start in range(0, length, BLOCK):
                at = out_offset + (first + start) * out_width
                bad += round_at(merged[start:], min(BLOCK, length - start), out_half, out_full, at, out_code)
    return bad
