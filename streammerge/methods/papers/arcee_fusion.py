"""Arcee Fusion: take only the most important entries of a second model."""

from __future__ import annotations

import numpy as np

from streammerge.algebra.extent import Extent
from streammerge.algebra.rules import SelectedMerge
from streammerge.algebra.scores import Importance, Selection
from streammerge.algebra.task_vectors import Cut
from streammerge.methods.registry import method
from streammerge.methods.tensor_context import TensorContext
from streammerge.statistics.asking import Steps, ask_all
from streammerge.statistics.kinds import Quantile, Threshold


@method(
    "arcee_fusion",
    cost=14,
    access=Extent.TENSOR,
    base="required",
    models=(1, 1),
    paper="https://github.com/arcee-ai/mergekit (method of its own)",
)
def arcee_fusion(context: TensorContext) -> Steps[SelectedMerge]:
    """theta = theta_0 + delta where the importance reaches the tensor's median + 1.5 (Q3 - Q1), else theta_0.

    Importance is abs(delta) times the Kullback-Leibler divergence between the softmax of the model's row and that of
    the base's row; a row runs along the last axis, and 1e-8 is added to every probability. The quantiles are order
    statistics of the whole tensor, number int(q (n - 1)) in ascending order (mergekit draws a random sample above a
    million elements). If at least three quarters of a tensor have no importance, the threshold is 0 and the whole
    tensor is taken from the second model.
    """
    (vector,) = context.task_vectors((1.0,))
    importance = Importance(vector)
    lower, median, upper = yield from ask_all([Quantile(importance, q) for q in (0.25, 0.5, 0.75)])
    limit = _value(median) + 1.5 * (_value(upper) - _value(lower))
    return SelectedMerge((vector,), Selection(importance, Cut(_pattern_from(limit), "all")))


def _value(threshold: Threshold) -> float:
    return float(np.array(threshold.key, np.int32).view(np.float32))


def _pattern_from(limit: float) -> int:
    """Return the bit pattern of the smallest fp32 number >= `limit`; `limit` is >= 0."""
    with np.errstate(over="ignore"):
        nearest = np.float32(limit)
    least = np.nextafter(nearest, np.float32(np.inf)) if float(nearest) < limit else nearest
    return int(least.view(np.int32))
