"""Steps that several methods share, named with the papers' verbs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from streammerge.algebra.extent import Extent
from streammerge.algebra.rules import MatrixMerge, TaskVectorMerge, WeightedSum
from streammerge.algebra.rules.matrix_merge import Combine
from streammerge.algebra.task_vectors import Cut, TaskVector, TiePolicy
from streammerge.errors import ConfigError
from streammerge.methods.drop import Vectors
from streammerge.methods.tensor_context import TensorContext
from streammerge.numerics import philox as rng
from streammerge.statistics.asking import Steps, ask, ask_all
from streammerge.statistics.kinds import Band, SignTotal, Threshold, TieIndex, TopK

ZeroSign = Literal["zero", "positive", "majority"]


def divisor(weights: Sequence[float], normalize: bool) -> float:
    """Return the divisor of a weighted sum: with `normalize` the sum of weights, or 1 if that is 0; else 1."""
    total = sum(weights)
    return total if normalize and abs(total) >= 1e-8 else 1.0


def trim(
    context: TensorContext,
    vectors: Sequence[TaskVector],
    densities: Sequence[float],
    *,
    trim_scope: Extent,
    ties: TiePolicy,
    plus_one: bool,
) -> Vectors:
    """Keep the top `density` fraction of each vector's magnitudes (TIES, step 1).

    A density of 1 or more keeps the whole vector; 0 or less removes all of it.

    Raises
    ------
    ConfigError
        After a drop with which a second cut by magnitude has no one meaning.
    """
    partial = [i for i, density in enumerate(densities) if 0 < density < 1]
    trimmed = [replace(v, drop=2**32) if d <= 0 else v for v, d in zip(vectors, densities, strict=True)]
    if not partial:
        return trimmed
    if any(vector.cut is not None for vector in vectors):
        raise ConfigError("drop_mask: magnitude and a trim cut by magnitude twice: set density: 1")
    if trim_scope == Extent.MODEL and context.dropped and context.rescaled_by_norm:
        raise ConfigError(
            "drop_rescale: l1 has a factor per tensor, which `trim_scope: model` cannot compare across tensors; "
            "use drop_rescale: paper, or trim_scope: tensor"
        )
    ranked = [vector.unweighted for vector in vectors]
    thresholds = yield from ask_all([TopK(ranked[i], densities[i], plus_one, trim_scope) for i in partial])
    limits: list[int] = [0] * len(partial)
    if ties == "index":
        pairs = zip(partial, thresholds, strict=True)
        ends = yield from ask_all([TieIndex(ranked[i], threshold, trim_scope) for i, threshold in pairs])
        limits = [_limit_here(context, end) for end in ends]
    for i, threshold, limit in zip(partial, thresholds, limits, strict=True):
        trimmed[i] = replace(trimmed[i], cut=_cut(threshold, ties, limit))
    return trimmed


def keep_band(
    vectors: Sequence[TaskVector], densities: Sequence[float], gammas: Sequence[float], *, ties: TiePolicy
) -> Vectors:
    """Drop the fraction `gamma` of largest magnitudes of each vector and keep the next `density`.

    Raises
    ------
    ConfigError
        After a drop with which a second cut by magnitude has no one meaning.
    """
    partial = [i for i, density in enumerate(densities) if density < 1]
    if partial and any(vector.cut is not None for vector in vectors):
        raise ConfigError("drop_mask: magnitude and this method cut by magnitude twice: set density: 1")
    if not partial:
        return list(vectors)
    edges: tuple[Literal["upper", "lower"], ...] = ("upper", "lower")
    asked = [(i, edge) for i in partial for edge in edges]
    ranked = [vector.unweighted for vector in vectors]
    thresholds = yield from ask_all([Band(ranked[i], densities[i], gammas[i], edge) for i, edge in asked])
    ends = [(0, 0)] * len(asked)
    if ties == "index":
        pairs = zip(asked, thresholds, strict=True)
        ends = yield from ask_all([TieIndex(ranked[i], threshold) for (i, _), threshold in pairs])
    cuts = {
        key: _cut(threshold, ties, end[1])
        for key, threshold, end in zip(asked, thresholds, ends, strict=True)
    }
    return [
        replace(vector, cut=cuts[i, "lower"], outliers=cuts[i, "upper"]) if i in partial else vector
        for i, vector in enumerate(vectors)
    ]


def _cut(threshold: Threshold, ties: TiePolicy, end: int) -> Cut:
    """Return the cut at a threshold. With ``ties: index``, ties before element `end` are kept."""
    limit = rng.threshold(threshold.needed / threshold.ties) if ties == "thin" else end
    return Cut(threshold.key, ties, limit)


def _limit_here(context: TensorContext, end: tuple[int, int]) -> int:
    """Return the element of this tensor before which ties are kept, given the (tensor, element) where they end."""
    ordinal, element = end
    if context.ordinal == ordinal:
        return element
    return 2**62 if context.ordinal < ordinal else 0


def weighted_average(context: TensorContext, weights: Sequence[float]) -> WeightedSum | TaskVectorMerge:
    """Return sum_i w_i theta_i / sum_i w_i of the models, after the drop if there is one."""
    total = sum(weights)
    if not context.dropped:
        return WeightedSum(tuple(weights), total)
    return TaskVectorMerge(tuple(context.task_vectors(weights)), divisor=total)


def elect(
    vectors: Sequence[TaskVector], *, zero_sign: ZeroSign, normalize: bool, scale: float
) -> Steps[TaskVectorMerge]:
    """Merge the entries of the elected sign (TIES, steps 2 and 3).

    ``majority`` gives an undecided element the sign that prevails over the whole model; if that is undecided too, the
    sign is negative, as in the published code.
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
    total = yield from ask(SignTotal(merge))
    return replace(merge, zero_sign=1 if total > 0 else -1)


def merge_matrices(
    context: TensorContext, weights: Sequence[float], combine: Combine, scale: float
) -> MatrixMerge | TaskVectorMerge:
    """Merge the matrices of a tensor by a function of them; a tensor of the rest gets the mean of the task vectors."""
    vectors = tuple(context.task_vectors(weights))
    if context.matrix is None:
        return TaskVectorMerge(vectors, divisor=float(len(vectors)), scale=scale)
    return MatrixMerge(vectors, context.matrix, combine, scale, context.deltas)


def correct_matrices(
    context: TensorContext, weights: Sequence[float], combine: Combine, scale: float
) -> MatrixMerge | TaskVectorMerge:
    """The same for a method that corrects the first model, a merge of the others; the rest keeps what that merge gave it."""
    merged, *others = context.task_vectors(weights)
    if context.matrix is None:
        unused = (replace(vector, weight=0.0) for vector in others)
        return TaskVectorMerge((merged, *unused), scale=scale)
    return MatrixMerge((merged, *others), context.matrix, combine, scale, context.deltas)
