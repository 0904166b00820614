"""Consensus task arithmetic: keep the changes that several models need.  https://arxiv.org/abs/2405.07813"""

from __future__ import annotations

from streammerge.algebra.rules import ConsensusMerge
from streammerge.methods.registry import PerModel, method, per_model
from streammerge.methods.tensor_context import TensorContext


@method(
    "consensus",
    cost=1.1,
    base="required",
    bounds={"k": (1.0, float("inf")), "lambda_mask": (0.0, float("inf"))},
    paper="Wang et al. 2024, https://arxiv.org/abs/2405.07813",
)
def consensus(
    context: TensorContext,
    *,
    weight: PerModel[float] = per_model(1.0),
    k: int = 2,
    lambda_mask: float = 0.4,
    lambda_: float = 1.0,
) -> ConsensusMerge:
    """Sum of task vectors at the elements that `k` models or more need: theta = theta_0 + lambda * m * sum_i delta_i.

    Model i needs an element (its TALL mask) if abs(delta_i) > `lambda_mask` * abs(sum_j delta_j - delta_i): its own change
    is large next to that of all others. Elements that one model alone needs, or none, stay the base's. Each delta_i is
    multiplied by `weight` first. The paper chooses `lambda_mask` per task between 0.2 and 0.6, by validation data.
    """
    return ConsensusMerge(tuple(context.task_vectors(weight)), k, lambda_mask, lambda_)
