"""The surviving task vector of one model over a block: subtract, drop, cut. Mirrors `kernels/deltas.py`."""

import triton
import triton.language as tl

from .blocks import f32_bits, from_bits, widen, words

# The tie policies of a cut, numbered as in `streammerge.kernels.deltas`.
NO_CUT = tl.constexpr(-1)
ALL = tl.constexpr(1)
THIN = tl.constexpr(2)
INDEX = tl.constexpr(3)

# The columns of a table of task vectors, int64; see `streammerge.backends.fused.tables`.
ADDRESS = tl.constexpr(0)
CODE = tl.constexpr(1)
DROP = tl.constexpr(2)
DROP_END = tl.constexpr(3)
DROP_KEY = tl.constexpr(4)
CUT = tl.constexpr(8)
OUTLIERS = tl.constexpr(11)
CUT_KEY = tl.constexpr(14)
COEFFICIENT = tl.constexpr(18)
WEIGHT = tl.constexpr(19)
RESCALE = tl.constexpr(20)
ROW = tl.constexpr(21)

INFINITE = tl.constexpr(0x7F800000)


@triton.jit
def kept_by(size, rule, key, limit, cut_key, element, first, BLOCK: tl.constexpr):
    """Return which magnitude patterns (uint32) a cut keeps."""
    threshold = key.to(tl.uint32)
    tied = size == threshold
    keep = size > threshold
    if rule == ALL:
        keep = keep | tied
    if rule == INDEX:
        keep = keep | (tied & (element < limit))
    if rule == THIN:
        if tl.max(tied.to(tl.int32)) > 0:  # few blocks hold a tie
            keep = keep | (tied & (words(first, cut_key, BLOCK).to(tl.int64) < limit))
    return keep


@triton.jit
def survivors(row, base, element, first, at, mask, BLOCK: tl.constexpr):
    """Return the surviving entries of a task vector, fp32, 0 elsewhere; and which they are. `row` points into its table."""
    delta = widen(tl.load(row + ADDRESS), tl.load(row + CODE), at, mask) - base
    size = f32_bits(delta) & 0x7FFFFFFF
    infinite = size >= INFINITE  # never dropped nor an outlier: the check on the output must see it
    keep = mask
    drop = tl.load(row + DROP)
    drop_end = tl.load(row + DROP_END)
    if (drop > 0) | (drop_end > 0):
        w = words(first, row + DROP_KEY, BLOCK).to(tl.int64)
        stays = (w > drop) | ((w == drop) & (element >= drop_end)) | infinite
        keep = keep & stays
        size = tl.where(stays, size, 0)
    rule = tl.load(row + CUT)
    if rule != NO_CUT:
        # A dropped entry is 0 for the cut: where the threshold is 0 it may be kept, as 0.
        key, limit = tl.load(row + CUT + 1), tl.load(row + CUT + 2)
        keep = mask & kept_by(size, rule, key, limit, row + CUT_KEY, element, first, BLOCK)
        rule = tl.load(row + OUTLIERS)
        if rule != NO_CUT:
            key, limit = tl.load(row + OUTLIERS + 1), tl.load(row + OUTLIERS + 2)
            outlier = kept_by(size, rule, key, limit, row + CUT_KEY, element, first, BLOCK)
            keep = keep & (~outlier | infinite)
    sign = f32_bits(delta) & 0x80000000
    return from_bits(tl.where(keep & (size > 0), size | sign, 0)), keep
