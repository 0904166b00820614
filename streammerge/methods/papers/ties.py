"""TIES-Merging: trim, elect sign, disjoint merge.  https://arxiv.org/abs/2306.01708"""

from __future__ import annotations

from typing import Literal

from streammerge.algebra.extent import Extent
from streammerge.algebra.rules import TaskVectorMerge
from streammerge.algebra.task_vectors import TiePolicy
from streammerge.methods.drop import rescale_by_norm
from streammerge.methods.registry import PerModel, method, per_model
from streammerge.methods.steps import elect, trim
from streammerge.methods.tensor_context import TensorContext
from streammerge.statistics.asking import Steps


@method(
    "ties",
    cost=1.7,
    access=Extent.MODEL,
    base="required",
    bounds={"density": (0.0, 1.0)},
    presets={
        "paper": {
            "density": 0.2,
            "trim_scope": "model",
            "count": "floor+1",
            "ties": "all",
            "zero_sign": "majority",
        },
        "mergekit": {"trim_scope": "tensor", "count": "floor", "ties": "index", "zero_sign": "positive"},
    },
    ignored={"int8_mask": "it has no effect on the numbers"},
    paper="Yadav et al. 2023, https://arxiv.org/abs/2306.01708",
)
def ties(
    context: TensorContext,
    *,
    weight: PerModel[float] = per_model(1.0),
    density: PerModel[float] = per_model(1.0),
    normalize: bool = True,
    lambda_: float = 1.0,
    trim_scope: Literal["tensor", "model"] = "tensor",
    count: Literal["floor", "floor+1"] = "floor",
    ties: Literal["thin", "all", "index", "drop"] = "thin",
    zero_sign: Literal["zero", "positive", "majority"] = "zero",
    rescale: Literal["none", "l1"] = "none",
) -> Steps[TaskVectorMerge]:
    """Trim, elect sign, disjoint merge: theta = theta_0 + lambda * mean of the agreeing trimmed deltas.

    tau_i is w_i * (theta_i - theta_0) on its top `density` magnitudes, and 0 elsewhere. gamma is the sign with the
    larger total magnitude. The result adds the tau_i of sign gamma, divided by the sum of their weights if
    `normalize` (with unit weights: their mean, as in the paper).

    `trim_scope` takes the quantile over each tensor, or over the whole model (the paper). `ties` decides about
    elements equal to the threshold: `thin` keeps a random draw that makes the count right, `all` keeps them, `index`
    keeps the lowest indices, `drop` drops them. `zero_sign` decides where the signs cancel: no sign, `+` (mergekit), or
    the `majority` over the model (the published code).
    """
    trim_policy: TiePolicy = ties
    whole = context.task_vectors(weight)
    vectors = yield from trim(
        context,
        whole,
        density,
        trim_scope=Extent(trim_scope),
        ties=trim_policy,
        plus_one=count == "floor+1",
    )
    if rescale == "l1":
        vectors = yield from rescale_by_norm(whole, vectors)
    return (yield from elect(vectors, zero_sign=zero_sign, normalize=normalize, scale=lambda_))
