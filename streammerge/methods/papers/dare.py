"""DARE: drop entries of the task vectors at random, rescale, merge.  https://arxiv.org/abs/2311.03099

Each method here is a drop (`streammerge.methods.drop`) followed by a known method, under mergekit's name. `dare_fisher`
is in `fisher.py`.
"""

from __future__ import annotations

from typing import Literal

from streammerge.algebra.extent import Extent
from streammerge.algebra.rules import TaskVectorMerge
from streammerge.methods.drop import DARE, DARE_TEXT
from streammerge.methods.registry import PerModel, method, per_model
from streammerge.methods.steps import divisor, elect
from streammerge.methods.tensor_context import TensorContext
from streammerge.statistics.asking import Steps

_IGNORED = {"int8_mask": "it has no effect on the numbers"}
_PAPER = "Yu et al. 2024, https://arxiv.org/abs/2311.03099"


@method(
    "dare_linear",
    cost=1.3,
    access=Extent.TENSOR,
    base="required",
    drop=DARE,
    presets={"paper": {}, "mergekit": {"rescale": "l1"}},
    ignored=_IGNORED,
    paper=_PAPER,
    text=f"""Drop and rescale, then task arithmetic: theta_0 + lambda * sum_i w_i m_i delta_i / density_i.
    {DARE_TEXT}
    `normalize: true` divides by the sum of weights: the mean of the models after the drop.
    """,
)
def dare_linear(
    context: TensorContext,
    *,
    weight: PerModel[float] = per_model(1.0),
    normalize: bool = False,
    lambda_: float = 1.0,
) -> TaskVectorMerge:
    """Sum the dropped task vectors."""
    vectors = context.task_vectors(weight)
    return TaskVectorMerge(tuple(vectors), divisor=divisor(weight, normalize), scale=lambda_)


@method(
    "dare_ties",
    cost=1.3,
    access=Extent.MODEL,
    base="required",
    drop=DARE,
    presets={
        "paper": {"zero_sign": "majority"},
        "mergekit": {"rescale": "l1", "zero_sign": "positive"},
    },
    ignored=_IGNORED,
    paper=_PAPER,
    text=f"""Drop and rescale, then TIES' sign election and disjoint merge, without a magnitude trim.
    {DARE_TEXT}
    Agreeing entries are summed; `normalize` divides by the sum of their weights. `zero_sign` means what it means for
    `ties`. The paper's own combination also trims: use `ties` with `drop_rate` for it.
    """,
)
def dare_ties(
    context: TensorContext,
    *,
    weight: PerModel[float] = per_model(1.0),
    normalize: bool = False,
    lambda_: float = 1.0,
    zero_sign: Literal["zero", "positive", "majority"] = "zero",
) -> Steps[TaskVectorMerge]:
    """Elect signs among the dropped task vectors and sum the agreeing entries."""
    vectors = context.task_vectors(weight)
    return (yield from elect(vectors, zero_sign=zero_sign, normalize=normalize, scale=lambda_))
