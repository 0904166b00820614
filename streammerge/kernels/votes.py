"""Merges in which the models vote on each element, on the tiles of `deltas.survivors`.

`ConsensusMerge` and `LargestAgreeing` have the formulas.
"""

import numpy as np

from streammerge.kernels import loop, njit
from streammerge.kernels.blocks import BLOCK
from streammerge.kernels.merge import _add_scaled, _shift


@loop()
def _add_up(deltas, coefficients, start, m, total):
    """Write the sum of the task vectors of a block, in the order of the models."""
    total[:] = 0.0
    for model in range(len(coefficients)):
        _add_scaled(m, deltas[model, start : start + m], coefficients[model], total)


@njit(nogil=True)
def consensus_merge(base, deltas, coefficients, k, threshold, scale, out):
    """Write the base plus the scaled sum of the task vectors where at least `k` models need the element.

    ============  ===============  ============================================
    base          float32 (n,)     the base
    deltas        float32 (v, n)   the surviving task vectors of a tile
    coefficients  float64 (v,)     their factors
    k             int64            the models that must need it
    threshold     float64          a model needs it if its entry exceeds this share of the others' sum
    scale         float64          the factor of the sum
    out           float64 (n,)     written
    ============  ===============  ============================================
    """
    _consensus(base, deltas, coefficients, k, threshold, scale, out, np.empty(BLOCK), np.empty(BLOCK))


@loop()
def _consensus(base, deltas, coefficients, k, threshold, scale, out, total, needed):
    for start in range(0, len(out), BLOCK):
        m = min(BLOCK, len(out) - start)
        _add_up(deltas, coefficients, start, m, total)
        needed[:] = 0.0
        for model in range(len(coefficients)):
            _add_need(deltas[model, start : start + m], coefficients[model], threshold, m, total, needed)
        for i in range(m):
            # What is not finite is kept, so that the check on the output sees it.
            kept = needed[i] >= np.float64(k) or not abs(total[i]) < np.inf
            total[i] = total[i] if kept else 0.0
        _shift(m, base[start:], scale, total, out[start:])


@loop()
def _add_need(entries, coefficient, threshold, m, total, needed):
    for i in range(m):
        tau = coefficient * np.float64(entries[i])
        needed[i] += 1.0 if abs(tau) > threshold * abs(total[i] - tau) else 0.0


@njit(nogil=True)
def largest_agreeing(base, deltas, coefficients, scale, out):
    """Write the base plus the scaled entry of the largest magnitude among those of the sum's sign.

    ============  ===============  ============================================
    base          float32 (n,)     the base
    deltas        float32 (v, n)   the surviving task vectors of a tile
    coefficients  float64 (v,)     their factors
    scale         float64          the factor of the entry
    out           float64 (n,)     written
    ============  ===============  ============================================
    """
    _largest(base, deltas, coefficients, scale, out, np.empty(BLOCK), np.empty(BLOCK), np.empty(BLOCK))


@loop()
def _largest(base, deltas, coefficients, scale, out, total, up, down):
    for start in range(0, len(out), BLOCK):
        m = min(BLOCK, len(out) - start)
        _add_up(deltas, coefficients, start, m, total)
        up[:] = 0.0
        down[:] = 0.0
        for model in range(len(coefficients)):
            _widen_range(deltas[model, start : start + m], coefficients[model], m, up, down)
        for i in range(m):
            largest = up[i] if total[i] > 0.0 else down[i]
            largest = 0.0 if total[i] == 0.0 else largest
            total[i] = largest if abs(total[i]) < np.inf else total[i]
        _shift(m, base[start:], scale, total, out[start:])


@loop()
def _widen_range(entries, coefficient, m, up, down):
    """Raise the largest and lower the smallest entries; where one is not finite, the sum takes their place."""
    for i in range(m):
        tau = coefficient * np.float64(entries[i])
        up[i] = tau if tau > up[i] else up[i]
        down[i] = tau if tau < down[i] else down[i]
