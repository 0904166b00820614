"""RegMean: the least-squares fit of one linear map to each model's outputs on its own inputs.  https://arxiv.org/abs/2212.09849"""

from __future__ import annotations

import math

from streammerge.algebra.rules import RegressionMean, Rule
from streammerge.errors import ConfigError
from streammerge.methods.registry import PerModel, method, per_model
from streammerge.methods.steps import weighted_average
from streammerge.methods.tensor_context import TensorContext
from streammerge.statistics.asking import Steps, ask
from streammerge.statistics.kinds import RegressionOperators


@method(
    "regmean",
    cost=20,
    access="tensor",
    base="template",
    gram=True,
    bounds={"alpha": (0.0, 1.0)},
    paper="Jin et al. 2023, https://arxiv.org/abs/2212.09849",
)
def regmean(
    context: TensorContext,
    *,
    weight: PerModel[float] = per_model(1.0),
    alpha: float = 1.0,
) -> Steps[Rule]:
    """Linear maps by least squares, W = (sum_i W_i G_i) (sum_i G_i)^-1; other tensors by weighted average.

    G_i = w_i X_i^T X_i / n_i is the mean over tokens of the products of the map's inputs; each model's entry in the
    config names its own: ``gram: PATH``. `alpha` multiplies the off-diagonal entries (the paper uses 0.9). The result is
    computed as the average plus a correction, so that directions in which no model has data keep the average.
    """
    if min(weight) < 0 or not 0 < sum(weight) < math.inf:
        raise ConfigError("weight: regmean multiplies sums of squares; use weights of 0 or more, not all 0")
    if context.dropped:
        raise ConfigError("the Gram matrices describe the models before a drop: remove `drop_rate`")
    if not context.gram:
        return weighted_average(context, weight)
    operators = yield from ask(RegressionOperators(alpha, tuple(weight)))
    return RegressionMean(tuple(weight), operators)
