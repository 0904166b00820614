"""EMR-Merging: elect a sign, take the largest agreeing change.  https://arxiv.org/abs/2405.17461"""

from __future__ import annotations

from streammerge.algebra.rules import LargestAgreeing
from streammerge.methods.registry import PerModel, method, per_model
from streammerge.methods.tensor_context import TensorContext


@method("emr", cost=1.1, base="required", paper="Huang et al. 2024, https://arxiv.org/abs/2405.17461")
def emr(
    context: TensorContext, *, weight: PerModel[float] = per_model(1.0), lambda_: float = 1.0
) -> LargestAgreeing:
    """The largest agreeing change: theta = theta_0 + lambda * s * max abs(delta_i) over the models with sign s.

    s is the sign of sum_i delta_i; where the sum is 0 the base stays. This is the paper's unified task vector. Its masks and
    rescalers, which turn it back into each single model, are not part of one merged model. Each delta_i is multiplied by
    `weight` first.
    """
    return LargestAgreeing(tuple(context.task_vectors(weight)), lambda_)
