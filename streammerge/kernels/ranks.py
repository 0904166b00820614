"""Drops by rank: entries survive with a probability that grows with the rank of their magnitude in their row."""

import numpy as np

from streammerge.kernels import njit
from streammerge.kernels.blocks import BLOCK, bits_from_f32, round_out, widen, words
from streammerge.kernels.deltas import LARGEST, MAGNITUDE
from streammerge.kernels.merge import _add_weights, _elect, _sum_signs

_INFINITE = np.uint32(0x7F800000)
_PATIENCE = 16
"""Moves for each entry after which sorting by insertion is given up."""


@njit(nogil=True)
def buckets_for(length):
    """Return how many buckets sort a row: one or two for each entry, as far as they stay in the cache."""
    count = 256
    while count < length and count < 16384:
        count *= 2
    return count


@njit(nogil=True)
def _insert(entries, n):
    """Sort entries that nearly are; return whether that came to an end within bounds."""
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
    """Sort the magnitudes of a row into `entries`, each as pattern << 32 | place.

    By buckets of equal width up to the largest, which leaves normal deltas nearly sorted, then by insertion; where
    that takes too long, by comparison. What is not finite goes into the last bucket.
    """
    largest = np.float32(0)
    for i in range(n):
        size = abs(delta[i])
        largest = max(largest, size if size <= LARGEST else np.float32(0))
    last = np.float32(len(ends) - 1)
    scale = last / largest if largest > 0 else np.float32(0)
    for i in range(n):  # rounding keeps the order: no bucket holds a magnitude above one of the next
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
def _survivors(delta, n, element, key, low, spread, unbiased, buffers, out):
    """Write the entries of a row that survive into `out`, fp64, else 0; return how many do.

    An entry survives with probability low + spread * (r - 1) / (n - 1), r the mid-rank of its magnitude; where
    `unbiased` it is divided by that. What is not finite always survives: it must be found.
    """
    entries, places, ends, w, _ = buffers
    shift = words(element, n, key, w)
    kept = 0
    if spread == 0.0 or n == 1:
        q = low + spread * 0.5
        limit = np.int64(np.floor(q * 4294967296.0 + 0.5))
        for i in range(n):
            infinite = (bits_from_f32(delta[i]) & MAGNITUDE) >= _INFINITE
            keep = np.int64(w[shift + i]) < limit or infinite
            out[i] = np.float64(delta[i]) / (q if unbiased else 1.0) if keep else 0.0
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
        for at in range(first, last):
            i = np.int64(entries[at] & np.uint64(0xFFFFFFFF))
            keep = np.int64(w[shift + i]) < limit
            out[i] = np.float64(delta[i]) / divisor if keep else 0.0
            kept += keep
        first = last
    return kept


@njit(nogil=True)
def _row_buffers(length):
    """Return what `_survivors` works in, made once: a row's sorted entries, places, buckets, words and deltas."""
    return (
        np.empty(length, np.uint64),
        np.empty(length, np.int32),
        np.empty(buckets_for(length), np.int32),
        np.empty(length + 8, np.uint32),
        np.empty(length, np.float32),
    )


@njit(nogil=True)
def _delta_row(half, full, offset, code, base, n, out):
    """Write a model's row minus the base's, in fp32."""
    width = 4 if code == 2 else 2
    for start in range(0, n, BLOCK):
        m = min(BLOCK, n - start)
        widen(half, full, offset + start * width, code, m, out[start:])
    for i in range(n):
        out[i] -= base[i]


@njit(nogil=True)
def _widen_row(half, full, offset, code, n, out):
    width = 4 if code == 2 else 2
    for start in range(0, n, BLOCK):
        widen(half, full, offset + start * width, code, min(BLOCK, n - start), out[start:])


@njit(nogil=True)
def ranked_abs_sums(
    half, full, offset, code, base_offset, base_code, element, n, length, low, spread, key, partials
):
    """Write the fp64 sum of abs(surviving delta) of each 4096-element block of whole rows into `partials`.

    In the lanes and the order of `deltas.abs_sums`.
    """
    b, left, buffers = np.empty(length, np.float32), np.empty(length, np.float64), _row_buffers(length)
    lanes = np.zeros(8, np.float64)
    for first in range(0, n, length):
        _widen_row(half, full, base_offset + first * (4 if base_code == 2 else 2), base_code, length, b)
        _delta_row(half, full, offset + first * (4 if code == 2 else 2), code, b, length, buffers[4])
        _survivors(buffers[4], length, element + first, key, low, spread, False, buffers, left)
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
def ranked_merge(
    half,
    full,
    offsets,
    codes,
    base_offset,
    base_code,
    element,
    n,
    length,
    lows,
    spreads,
    unbiased,
    keys,
    coefficients,
    weights,
    elect,
    zero_sign,
    normalize,
    divisor,
    scale,
    out_offset,
    out_code,
    kept,
    signs,
):
    """Do what `merge.task_vector_merge` does, for rows of `length` elements and drops by rank.

    Where `unbiased` an entry that survives is divided by the probability that it does.
    """
    b, left, buffers = np.empty(length, np.float32), np.empty(length, np.float64), _row_buffers(length)
    up, down, merged = np.empty(length), np.empty(length), np.empty(length)
    up_weight, down_weight = np.empty(length), np.empty(length)
    base_width, out_width = (4 if base_code == 2 else 2), (4 if out_code == 2 else 2)
    bad = 0
    for first in range(0, n, length):
        _widen_row(half, full, base_offset + first * base_width, base_code, length, b)
        up[:] = 0.0
        if elect:
            down[:] = 0.0
            up_weight[:] = 0.0
            down_weight[:] = 0.0
        for model in range(len(weights)):
            width = 4 if codes[model] == 2 else 2
            _delta_row(half, full, offsets[model] + first * width, codes[model], b, length, buffers[4])
            kept[model] += _survivors(
                buffers[4],
                length,
                element + first,
                keys[model],
                lows[model],
                spreads[model],
                unbiased,
                buffers,
                left,
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
                m = min(BLOCK, length - start)
                bad += round_out(
                    merged[start:], m, half, full, out_offset + (first + start) * out_width, out_code
                )
    return bad
