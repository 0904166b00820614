"""Steps that several methods share, named by the papers' verbs."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import replace
from typing import Literal, cast

from streammerge.methods import rng
from streammerge.methods.recipes import Cut, TaskVector, TaskVectorMerge, TiePolicy
from streammerge.methods.registry import Scope
from streammerge.methods.requests import (
    AbsSum,
    Answer,
    Request,
    SignTotal,
    Threshold,
    TieIndex,
    TopK,
)
from streammerge.methods.requests import Scope as TrimScope

Ask = Generator[list[Request], list[Answer], "list[TaskVector]"]
ZeroSign = Literal["zero", "positive", "majority"]


def divisor(weights: Sequence[float], normalize: bool) -> float:
    """Return what a plain sum is divided by: the sum of weights, or 1 where that vanishes."""
    total = sum(weights)
    return total if normalize and abs(total) >= 1e-8 else 1.0


def trim(
    scope: Scope, vectors: Sequence[TaskVector], densities: Sequence[float], *,
    trim_scope: TrimScope, ties: TiePolicy, plus_one: bool,
) -> Ask:  # fmt: skip
    """Keep the top `density` fraction of each vector's magnitudes (TIES, step 1).

    A density of 1 or more keeps the vector as it is; 0 or less removes it whole.
    """
    partial = [i for i, density in enumerate(densities) if 0 < density < 1]
    trimmed = [replace(v, drop=2**32) if d <= 0 else v for v, d in zip(vectors, densities, strict=True)]
    if not partial:
        return trimmed
    thresholds = yield [TopK(vectors[i], densities[i], plus_one, trim_scope) for i in partial]
    limits: list[int] = [0] * len(partial)
    if ties == "index":
        ends = yield [
            TieIndex(vectors[i], cast(Threshold, t), trim_scope)
            for i, t in zip(partial, thresholds, strict=True)
        ]
        limits = [_limit_here(scope, cast(tuple[int, int], end)) for end in ends]
    for i, threshold, limit in zip(partial, thresholds, limits, strict=True):
        assert isinstance(threshold, Threshold)
        if ties == "thin":
            limit = rng.threshold(threshold.needed / threshold.ties)
        trimmed[i] = replace(trimmed[i], cut=Cut(threshold.key, ties, limit))
    return trimmed


def _limit_here(scope: Scope, end: tuple[int, int]) -> int:
    """Return the element of this tensor before which ties are kept, given where they end overall."""
    ordinal, element = end
    if scope.ordinal == ordinal:
        return element
    return 2**62 if scope.ordinal < ordinal else 0


def drop(vectors: Sequence[TaskVector], densities: Sequence[float]) -> list[TaskVector]:
    """Drop each entry with probability 1 - density, independently (DARE, section 3.2)."""
    return [
        replace(vector, drop=rng.threshold(min(1.0, max(0.0, 1.0 - density))))
        for vector, density in zip(vectors, densities, strict=True)
    ]


def rescale_by_probability(vectors: Sequence[TaskVector], densities: Sequence[float]) -> list[TaskVector]:
    """Divide what survives a random drop by the probability of surviving: unbiased (DARE, section 3.2)."""
    return [
        replace(vector, rescale=1.0 / density if 0 < density < 1 else 1.0)
        for vector, density in zip(vectors, densities, strict=True)
    ]


def rescale_by_norm(vectors: Sequence[TaskVector]) -> Ask:
    """Restore each vector's L1 norm after removal, per tensor, as mergekit's ``rescale: true`` does."""
    touched = [i for i, vector in enumerate(vectors) if vector.drop or vector.cut]
    rescaled = list(vectors)
    if not touched:
        return rescaled
    whole = [replace(vectors[i], drop=0, cut=None) for i in touched]
    sums = yield [AbsSum(v) for v in (*whole, *(vectors[i] for i in touched))]
    for place, i in enumerate(touched):
        before, after = sums[place], sums[len(touched) + place]
        assert isinstance(before, float)
        assert isinstance(after, float)
        rescaled[i] = replace(vectors[i], rescale=before / after if after > 0 else 1.0)
    return rescaled


def elect(
    vectors: Sequence[TaskVector], *, zero_sign: ZeroSign, normalize: bool, scale: float
) -> Generator[list[Request], list[Answer], TaskVectorMerge]:
    """Merge the entries of the elected sign (TIES, steps 2 and 3).

    ``majority`` gives an undecided element the sign that leads over the whole model; where even that
    is undecided the published code takes the negative side, and so does this.
    """
    merge = TaskVectorMerge(
        tuple(vectors),
        elect=True,
        zero_sign=int(zero_sign == "positive"),
        normalize=normalize,
        scale=scale,
    )
    if zero_sign != "majority":
        return merge
    (total,) = yield [SignTotal(merge)]
    assert isinstance(total, int)
    return replace(merge, zero_sign=1 if total > 0 else -1)
