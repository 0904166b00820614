"""SCE: select where the task vectors differ most, calculate weights, erase minority signs.

FuseChat, https://arxiv.org/abs/2408.07990 (section 3.3).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from streammerge.algebra.extent import Extent
from streammerge.algebra.rules import SelectedMerge
from streammerge.algebra.scores import Selection, Spread
from streammerge.algebra.task_vectors import Cut
from streammerge.methods.registry import method
from streammerge.methods.tensor_context import TensorContext
from streammerge.statistics.asking import Steps, ask
from streammerge.statistics.kinds import (
    Largest,
    NonZero,
    Squares,
    TieIndex,
)


@method(
    "sce",
    cost=3.6,
    access=Extent.TENSOR,
    base="required",
    bounds={"select_topk": (0.0, 1.0), "floor": (0.0, 1.0)},
    presets={"mergekit": {"zero_sign": "positive", "floor": 1e-6}},
    ignored={"int8_mask": "it has no effect on the numbers"},
    paper="Wan et al. 2024, https://arxiv.org/abs/2408.07990",
)
def sce(
    context: TensorContext,
    *,
    select_topk: float = 1.0,
    zero_sign: Literal["zero", "positive"] = "zero",
    floor: float = 0.0,
) -> Steps[SelectedMerge]:
    """Select, calculate, erase: theta = theta_0 + sum_i s_i delta_i / sum_i s_i, over the models that agree in sign.

    Select, per tensor, the int(`select_topk` * count) elements of largest variance over the models, where count is the
    number of elements with non-zero variance; all others stay the base's. Variances are rounded to fp32 first; of equal
    variances the lowest index wins. Calculate s_i as the mean over the tensor of the squares of the selected delta_i,
    divided by the sum over all models. Erase entries whose sign differs from that of the models' sum; `zero_sign`
    decides where the sum is 0.

    `floor` is mergekit's guard, 1e-6 there: tensors whose mean squares sum to less get equal weights (as most
    fine-tunes do), and a sum of agreeing weights is never taken to be less.
    """
    vectors = tuple(context.task_vectors((1.0,) * context.n_models))
    selection = None
    if select_topk < 1:
        spread = Spread(vectors)
        nonzero = yield from ask(NonZero(spread))
        threshold = yield from ask(Largest(spread, int(select_topk * nonzero)))
        _, end = yield from ask(TieIndex(spread, threshold))
        selection = Selection(spread, Cut(threshold.key, "index", end))
    squares = yield from ask(Squares(vectors, selection))
    total = sum(squares.totals)
    equal = total == 0 or total / squares.n < floor
    weights = [1.0 / len(vectors) if equal else square / total for square in squares.totals]
    return SelectedMerge(
        tuple(replace(vector, weight=weight) for vector, weight in zip(vectors, weights, strict=True)),
        selection,
        int(zero_sign == "positive"),
        floor,
    )
