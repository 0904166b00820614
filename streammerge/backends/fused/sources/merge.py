"""The merges of an element: a weighted sum, and task vectors, summed or by elected sign. Mirrors `kernels/merge.py`."""

import triton
import triton.language as tl

from .blocks import add_count, f64_at, i64_at, kernel, places, real, round_out, widen
from .deltas import ADDRESS, CODE, COEFFICIENT, ROW, WEIGHT, survivors


@kernel
def weighted_sum(table, k, divisor, n, out, out_code, counts, BLOCK: tl.constexpr):
    """Write sum_i w_i x_i / divisor, summed in fp64 in the order of the table's k rows; count what is not finite."""
    _, _, at, mask = places(n * 0, n, BLOCK)
    total = tl.zeros((BLOCK,), tl.float64)
    rows = i64_at(table)
    for i in range(k):
        row = rows + i * ROW
        x = widen(tl.load(row + ADDRESS), tl.load(row + CODE), at, mask)
        total += real(tl.load(row + COEFFICIENT)) * x.to(tl.float64)
    by = real(divisor)
    if by != 1.0:
        total = total / by
    add_count(counts, 0, round_out(total, out, out_code, at, mask))


@triton.jit
def add_signs(tau, weight, up, down, up_weight, down_weight):
    """Add entries to the totals and weights of their signs; a NaN goes up, so that the output shows it."""
    up += tl.where(tau < 0.0, 0.0, tau)
    down -= tl.where(tau < 0.0, tau, 0.0)
    up_weight += tl.where(tau > 0.0, weight, 0.0)
    down_weight += tl.where(tau < 0.0, weight, 0.0)
    return up, down, up_weight, down_weight


@triton.jit
def elected(up, down, up_weight, down_weight, zero_sign, normalize):
    """Return the merged entries of the elected sign."""
    lead = up - down
    negative = (lead < 0.0) | ((lead == 0.0) & (zero_sign < 0))
    merged = tl.where(negative, -down, up)
    merged = tl.where((lead == 0.0) & (zero_sign == 0), 0.0, merged)
    weight = tl.where(negative, down_weight, up_weight)
    return merged / tl.where((normalize != 0) & (weight != 0.0), weight, 1.0)


@triton.jit
def sign_total(up, down, mask):
    """Return the number of elements that elect + minus the number that elect -."""
    lead = up - down
    ups, downs = tl.sum((mask & (lead > 0.0)).to(tl.int32)), tl.sum((mask & (lead < 0.0)).to(tl.int32))
    return ups - downs


@kernel
def task_vector_merge(
    table,
    k,
    base,
    base_code,
    start,
    n,
    zero_sign,
    normalize,
    divisor,
    scales,
    outs,
    m,
    out_code,
    counts,
    left,
    ELECT: tl.constexpr,
    RANKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write base + scale * merged task vectors for m scales (fp64), each to its own address of `outs` (int64).

    `counts` takes the number of elected signs, the survivors of each of the k vectors, then what is not finite in each
    output. With `RANKED` the surviving entries are read from `left`, fp64 (k, n), and not counted: `ranks` has done both.
    """
    first, element, at, mask = places(start, n, BLOCK)
    theta_0 = widen(base, base_code, at, mask)
    up = tl.zeros((BLOCK,), tl.float64)
    down = tl.zeros((BLOCK,), tl.float64)
    up_weight = tl.zeros((BLOCK,), tl.float64)
    down_weight = tl.zeros((BLOCK,), tl.float64)
    rows = i64_at(table)
    for i in range(k):
        row = rows + i * ROW
        if RANKED:
            entries = tl.load(f64_at(left) + i * n + at, mask, other=0.0)
        else:
            delta, keep = survivors(row, theta_0, element, first, at, mask, BLOCK)
            add_count(counts, 1 + i, tl.sum(keep.to(tl.int32)))
            entries = delta.to(tl.float64)
        tau = real(tl.load(row + COEFFICIENT)) * entries
        if ELECT:
            weight = real(tl.load(row + WEIGHT))
            up, down, up_weight, down_weight = add_signs(tau, weight, up, down, up_weight, down_weight)
        else:
            up += tau
    merged = up
    if ELECT:
        merged = elected(up, down, up_weight, down_weight, zero_sign, normalize)
        add_count(counts, 0, sign_total(up, down, mask))
    else:
        by = real(divisor)
        if by != 1.0:
            merged = merged / by
    for i in range(m):
        scaled = tl.load(f64_at(scales) + i) * merged
        result = theta_0.to(tl.float64) + scaled
        add_count(counts, 1 + k + i, round_out(result, tl.load(i64_at(outs) + i), out_code, at, mask))
