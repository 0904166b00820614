"""PCB-Merging: balance the competition of parameters, keep the winners.  https://arxiv.org/abs/2410.02396"""

from __future__ import annotations

import numpy as np

from streammerge.algebra.competition import Competition, Size, value_of
from streammerge.algebra.extent import Extent
from streammerge.algebra.rules.balanced_merge import BalancedMerge
from streammerge.methods.registry import PerModel, method, per_model
from streammerge.methods.tensor_context import TensorContext
from streammerge.statistics.asking import Steps, ask_all
from streammerge.statistics.kinds import Order

TAIL = 1e-4
"""The fraction of magnitudes that is clamped at either end."""


@method(
    "pcb",
    cost=9.5,
    access=Extent.MODEL,
    base="required",
    bounds={"ratio": (0.0, 1.0)},
    paper="Du et al. 2024, https://arxiv.org/abs/2410.02396",
)
def pcb(
    context: TensorContext,
    *,
    weight: PerModel[float] = per_model(1.0),
    ratio: float = 0.1,
    lambda_: float = 1.0,
) -> Steps[BalancedMerge]:
    """Parameter competition: theta = theta_0 + lambda * sum_i s_i c_i / sum_i s_i over the entries that win.

    c_i is delta_i, its magnitude clamped at the 1e-4 smallest and the 1e-4 largest of the model. Its score for T models is
    b_i = exp(T n_i^2) tanh(c_i sum_j c_j), n_i being abs(c_i) from 0 at the model's smallest to 1 at its largest. s_i is 0 for
    all but the `ratio` largest b_i of the model, and rises to 1 at the largest. All quantiles are order statistics over the
    whole model: number int(q n) in ascending order, and int((1 - q) n) - 1 from above, as in the published code; scores are
    fp64, rounded to fp32. The code clamps magnitudes alone, so that its product and its score have the unclamped delta_i; here
    the clamped one enters both. An element that no model wins stays the base's. Each delta_i is multiplied by `weight` first.
    """
    vectors = tuple(context.task_vectors(weight))
    tails = [Order(Size(v), q, below) for v in vectors for q, below in ((TAIL, 0), (1.0 - TAIL, 1))]
    found = yield from ask_all(tails)
    sizes = [_magnitude(key) for key, _ in found]
    ranges = tuple(zip(sizes[::2], sizes[1::2], strict=True))
    places = [Order(Competition(vectors, ranges, i), 1.0 - ratio, 0) for i in range(len(vectors))]
    scores = yield from ask_all(places)
    return BalancedMerge(
        vectors, ranges, tuple((value_of(key), value_of(top)) for key, top in scores), lambda_
    )


def _magnitude(pattern: int) -> float:
    return float(np.array(pattern, np.int32).view(np.float32))
