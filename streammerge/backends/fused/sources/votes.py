"""The merges in which the models vote on each element, or touched it. Mirrors `kernels/votes.py` and `kernels/scores.py`."""

import triton
import triton.language as tl

from .blocks import add_count, f64_at, i64_at, kernel, places, real, round_out, widen
from .deltas import COEFFICIENT, RESCALE, ROW, survivors


@triton.jit
def weighted(row, theta_0, element, first, at, mask, BLOCK: tl.constexpr):
    """Return the entries of a task vector, fp64, and which survive."""
    delta, keep = survivors(row, theta_0, element, first, at, mask, BLOCK)
    return real(tl.load(row + COEFFICIENT)) * delta.to(tl.float64), keep


@kernel
def vote(
    table,
    k,
    base,
    base_code,
    start,
    n,
    least,
    threshold,
    scale,
    out,
    out_code,
    counts,
    AGREE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write base + scale * change, where the change follows from the k task vectors and their sum.

    With `AGREE` it is the sum where at least `least` models need the element, whose entries exceed `threshold` times what
    the others sum to; see `rules.ConsensusMerge`. Otherwise it is the largest entry of the sum's sign; see
    `rules.LargestAgreeing`. Where the sum is not finite, it is the sum. `threshold` and `scale` have the bits of fp64.
    `counts` takes what is not finite, then the survivors of each vector.
    """
    first, element, at, mask = places(start, n, BLOCK)
    theta_0 = widen(base, base_code, at, mask)
    total = tl.zeros((BLOCK,), tl.float64)
    up = tl.zeros((BLOCK,), tl.float64)
    down = tl.zeros((BLOCK,), tl.float64)
    rows = i64_at(table)
    for i in range(k):
        tau, keep = weighted(rows + i * ROW, theta_0, element, first, at, mask, BLOCK)
        add_count(counts, 1 + i, tl.sum(keep.to(tl.int32)))
        total += tau
        up = tl.where(tau > up, tau, up)
        down = tl.where(tau < down, tau, down)
    infinite = (total - total) != 0.0
    if AGREE:
        needed = tl.zeros((BLOCK,), tl.int64)
        for i in range(k):
            tau, _ = weighted(rows + i * ROW, theta_0, element, first, at, mask, BLOCK)
            needed += (tl.abs(tau) > real(threshold) * tl.abs(total - tau)).to(tl.int64)
        change = tl.where((needed >= least) | infinite, total, 0.0)
    else:
        change = tl.where(total > 0.0, up, tl.where(total < 0.0, down, 0.0))
        change = tl.where(infinite, total, change)
    result = theta_0.to(tl.float64) + real(scale) * change
    add_count(counts, 0, round_out(result, out, out_code, at, mask))


@triton.jit
def touched_entries(row, epsilon, theta_0, element, first, at, mask, BLOCK: tl.constexpr):
    """Return the entries of a task vector above `epsilon` in magnitude, fp64, 0 elsewhere; which they are; which survive."""
    delta, keep = survivors(row, theta_0, element, first, at, mask, BLOCK)
    tau = real(tl.load(row + RESCALE)) * delta.to(tl.float64)
    touched = mask & ~(tl.abs(tau) <= real(epsilon))  # a NaN too
    return tl.where(touched, tau, 0.0), touched, keep


@kernel
def touched_merge(
    table, factors, k, base, base_code, start, n, epsilon, out, out_code, counts, BLOCK: tl.constexpr
):
    """Write base + the mean of the entries that models touched; one that a single model touched times its factor (fp64).

    `counts` takes what is not finite, then the survivors of each vector.
    """
    first, element, at, mask = places(start, n, BLOCK)
    theta_0 = widen(base, base_code, at, mask)
    total = tl.zeros((BLOCK,), tl.float64)
    unique = tl.zeros((BLOCK,), tl.float64)
    count = tl.zeros((BLOCK,), tl.float64)
    for i in range(k):
        row = i64_at(table) + i * ROW
        tau, touched, keep = touched_entries(row, epsilon, theta_0, element, first, at, mask, BLOCK)
        add_count(counts, 1 + i, tl.sum(keep.to(tl.int32)))
        total += tau
        unique += tl.load(f64_at(factors) + i) * tau
        count += touched.to(tl.float64)
    mean = total / tl.where(count > 1.0, count, 1.0)
    result = theta_0.to(tl.float64) + tl.where(count == 1.0, unique, mean)
    add_count(counts, 0, round_out(result, out, out_code, at, mask))


@kernel
def touches(table, k, base, base_code, start, n, epsilon, counts, BLOCK: tl.constexpr):
    """Count the elements that each model touched alone, then those that each touched with others."""
    first, element, at, mask = places(start, n, BLOCK)
    theta_0 = widen(base, base_code, at, mask)
    count = tl.zeros((BLOCK,), tl.int32)
    rows = i64_at(table)
    for i in range(k):
        _, touched, _ = touched_entries(rows + i * ROW, epsilon, theta_0, element, first, at, mask, BLOCK)
        count += touched.to(tl.int32)
    for i in range(k):
        _, touched, _ = touched_entries(rows + i * ROW, epsilon, theta_0, element, first, at, mask, BLOCK)
        add_count(counts, i, tl.sum((touched & (count == 1)).to(tl.int32)))
        add_count(counts, k + i, tl.sum((touched & (count > 1)).to(tl.int32)))
