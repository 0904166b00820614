"""Isotropic merging: the (weighted) average of the models."""

from __future__ import annotations

from streammerge.algebra.rules import TaskVectorMerge, WeightedSum
from streammerge.errors import ConfigError
from streammerge.methods.registry import PerModel, method, per_model
from streammerge.methods.steps import weighted_average
from streammerge.methods.tensor_context import TensorContext


@method("linear", cost=1.1, base="member", paper="Wortsman et al. 2022, https://arxiv.org/abs/2203.05482")
def linear(
    context: TensorContext, *, weight: PerModel[float] = per_model(1.0), normalize: bool = True
) -> WeightedSum | TaskVectorMerge:
    """Weighted average: theta = sum_i w_i theta_i / sum_i w_i.

    Without weights it is the uniform average, isotropic merging: each model's posterior is taken to be an
    isotropic Gaussian at its weights (Matena & Raffel 2022, section 2). ``normalize: false`` does not divide
    the sum. With `normalize`, a sum of weights that is zero or negative is an error.
    """
    if not normalize:
        if context.dropped:
            raise ConfigError("normalize: false cannot follow a drop: use `task_arithmetic`")
        return WeightedSum(tuple(weight))
    total = sum(weight)
    if not total > 0:
        raise ConfigError(
            f"the weights sum to {total:g}: `linear` divides by their sum; use positive weights or normalize: false"
        )
    return weighted_average(context, weight)
