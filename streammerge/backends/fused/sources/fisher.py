"""The mean of models weighted by their Fisher diagonals. Mirrors `kernels/fisher.py`."""

import triton.language as tl

from .blocks import add_count, i64_at, kernel, places, real, round_out, widen
from .deltas import ADDRESS, CODE, RESCALE, ROW, survivors

# The columns of a table of certainties, int64; see `streammerge.backends.fused.tables`.
FISHER = tl.constexpr(0)
FISHER_CODE = tl.constexpr(1)
FACTOR = tl.constexpr(2)
FLOOR = tl.constexpr(3)
SHARE = tl.constexpr(4)
CERTAIN = tl.constexpr(5)


@kernel
def fisher_mean(
    table,
    certainties,
    k,
    base,
    base_code,
    start,
    n,
    add,
    shares,
    out,
    out_code,
    counts,
    VECTORS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write sum a_i theta_i / sum a_i, a_i = factor * floored F_i; see `rules.FisherMean`.

    With `VECTORS` the models are base + rescale * surviving entry. `shares` is the sum (fp64) of the weights of the average
    that stands in where all F are 0; if it is 0, the first model's value does. `counts` takes what is not finite (or a
    negative F), the elements that floors decided, and the survivors of each model.
    """
    first, element, at, mask = places(start, n, BLOCK)
    theta_0 = widen(base, base_code, at, mask)
    zero = tl.zeros((BLOCK,), tl.float64)
    target, low, high = zero, zero, zero
    moved, raised, total, mean = zero, zero, zero, zero
    for i in range(k):
        row, certain = i64_at(table) + i * ROW, i64_at(certainties) + i * CERTAIN
        if VECTORS:
            delta, keep = survivors(row, theta_0, element, first, at, mask, BLOCK)
            add_count(counts, 2 + i, tl.sum(keep.to(tl.int32)))
            theta = theta_0.to(tl.float64) + real(tl.load(row + RESCALE)) * delta.to(tl.float64)
        else:
            theta = widen(tl.load(row + ADDRESS), tl.load(row + CODE), at, mask).to(tl.float64)
        if i == 0:
            target, low, high = theta, theta, theta
        f = widen(tl.load(certain + FISHER), tl.load(certain + FISHER_CODE), at, mask)
        add_count(counts, 0, tl.sum((mask & (f < 0.0)).to(tl.int32)))
        known = f.to(tl.float64)
        factor, floor = real(tl.load(certain + FACTOR)), real(tl.load(certain + FLOOR))
        if add != 0:
            a = known + floor
        else:
            a = tl.where(known < floor, floor, known)
        if floor != 0.0:
            raised += factor * (a - known)
        a = factor * a
        moved += a * (theta - target)
        total += a
        low = tl.where(theta < low, theta, low)
        high = tl.where(theta > high, theta, high)
        mean += real(tl.load(certain + SHARE)) * theta
    add_count(counts, 1, tl.sum((mask & (raised > 0.5 * total)).to(tl.int32)))
    value = target + moved / tl.where(total == 0.0, 1.0, total)
    value = tl.where(value < low, low, value)
    value = tl.where(value > high, high, value)
    by = real(shares)
    if by != 0.0:
        value = tl.where(total == 0.0, mean / by, value)
    else:
        value = tl.where(total == 0.0, target, value)
    add_count(counts, 0, round_out(value, out, out_code, at, mask))
