"""Angles and lengths of models, computed from their Gram matrix, for the geometric methods.

Each geometric method returns a sum of the models (or of their task vectors) whose weights follow from the dot
products, so no vector is held in memory. All functions take Gram matrices of shape (rows, k, k) in fp64 and treat
each row independently. A flattened tensor counts as one row; so does a column.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streammerge.algebra.extent import Extent
from streammerge.algebra.rules import ColumnCombination, RowCombination, TaskVectorMerge, WeightedSum
from streammerge.algebra.task_vectors import TaskVector
from streammerge.statistics.asking import Steps, ask
from streammerge.statistics.kinds import ColumnGram, Gram

Matrix = NDArray[np.float64]
_PARALLEL = 1e-8
"""The sine of the angle below which an arc equals a straight line to the last digits of fp64."""

Combination = Steps[WeightedSum | TaskVectorMerge | RowCombination | ColumnCombination]


def combine(
    coefficients: Callable[..., Matrix],
    *,
    n: int,
    vectors: Sequence[TaskVector] = (),
    base: bool = False,
    by: Extent = Extent.TENSOR,
    **parameters: Any,
) -> Combination:
    """Weigh vectors by a function of their Gram matrix, of the whole tensor or of each row or column.

    Parameters
    ----------
    coefficients
        Function of the Gram matrices (rows, k, k) and `parameters` that returns the weights (rows, k).
    n
        Number of models without the base.
    vectors
        Task vectors to weigh and add to the base; empty: weigh the models themselves.
    by
        What counts as one vector: the whole tensor, each row or each column.
    base
        Whether the base is weighed too, as the first vector, if there are no `vectors`.
    """
    if by is Extent.ROW:
        return RowCombination(partial(coefficients, **parameters), tuple(vectors))
    k = len(vectors) or n + base
    if by is Extent.COLUMN:
        columns = yield from ask(ColumnGram(k, tuple(vectors)))
        by_column = coefficients(columns.matrices(), **parameters)
        return ColumnCombination(np.ascontiguousarray(by_column.T), tuple(vectors))
    dots = yield from ask(Gram(k, tuple(vectors)))
    weights = [float(weight) for weight in coefficients(dots.matrix(), **parameters)[0]]
    if vectors:
        return TaskVectorMerge(tuple(_weighed(vector, w) for vector, w in zip(vectors, weights, strict=True)))
    return WeightedSum(tuple(weights[base:]), base_weight=weights[0] if base else 0.0)


def _weighed(vector: TaskVector, weight: float) -> TaskVector:
    return replace(vector, weight=weight)


def lengths(gram: Matrix) -> Matrix:
    """Return the norms of the vectors, (rows, k)."""
    return np.sqrt(np.diagonal(gram, axis1=1, axis2=2))


def cosines(gram: Matrix) -> Matrix:
    """Return the cosines between all vectors, (rows, k, k); a vector of length 0 has cosine 0 with every other."""
    norm = lengths(gram)
    scale = norm[:, :, None] * norm[:, None, :]
    with np.errstate(all="ignore"):
        cosine = np.where(scale > 0, gram / np.where(scale > 0, scale, 1.0), 0.0)
    return np.clip(cosine, -1.0, 1.0)


def arc(gram: Matrix, *, t: float | Matrix, dot_threshold: float = 1.0) -> Matrix:
    """Return the weights of two vectors at fraction `t` of the arc from the first to the second, (rows, 2).

    The weights are sin((1 - t) w) / sin w and sin(t w) / sin w, where w is the angle between the vectors. They follow
    a straight line where the absolute cosine exceeds `dot_threshold`, or where the arc is not defined.
    """
    cosine = cosines(gram)[:, 0, 1]
    angle = np.arccos(cosine)
    sine = np.sin(angle)
    straight = (np.abs(cosine) > dot_threshold) | (sine < _PARALLEL)
    safe = np.where(straight, 1.0, sine)
    first = np.where(straight, 1.0 - t, np.sin((1.0 - t) * angle) / safe)
    second = np.where(straight, t, np.sin(t * angle) / safe)
    return np.stack([first, second], axis=1)
