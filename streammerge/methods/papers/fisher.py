"""Fisher merging: the mode of the product of diagonal Laplace posteriors.  https://arxiv.org/abs/2111.09832"""

from __future__ import annotations

import math
from typing import Any, Literal

from streammerge.algebra.extent import Extent
from streammerge.algebra.rules import CopyOf, FisherMean, Rule, TaskVectorMerge
from streammerge.errors import ConfigError
from streammerge.methods.drop import DARE, DARE_TEXT
from streammerge.methods.registry import PerModel, method, per_model
from streammerge.methods.steps import weighted_average
from streammerge.methods.tensor_context import TensorContext
from streammerge.statistics.asking import Steps, ask_all
from streammerge.statistics.kinds import FisherSquares, SquareTotal

_FISHER: dict[str, Any] = {
    "access": Extent.MODEL,
    "fisher": True,
    "bounds": {"floor": (0.0, math.inf)},
    "presets": {
        "paper": {"floor_units": "raw"},
        "mergelm": {"normalize": False, "floor_units": "raw", "floor_on": "all", "floor_how": "add"},
    },
}
"""The declarations shared by the Fisher methods. Presets: Matena and Raffel's code, and the code of DARE's experiments."""


def _rms(squares: SquareTotal) -> float:
    return math.sqrt(squares.total / max(1, squares.n))


def _coefficient(weight: float, squares: SquareTotal, normalize: bool) -> float:
    """Return lambda_i, or lambda_i / norm(F_i); 0 for a diagonal of zeros."""
    if not normalize:
        return weight
    return weight / math.sqrt(squares.total) if squares.total > 0 else 0.0


@method(
    "fisher",
    cost=3.6,
    base="template",
    paper="Matena & Raffel 2022, https://arxiv.org/abs/2111.09832",
    **_FISHER,
)
def fisher(
    context: TensorContext,
    *,
    weight: PerModel[float] = per_model(1.0),
    normalize: bool = True,
    floor: float = 1e-6,
    floor_units: Literal["rms", "raw"] = "rms",
    floor_on: Literal["target", "all"] = "target",
    floor_how: Literal["max", "add"] = "max",
    fallback: Literal["target", "average"] = "target",
) -> Steps[Rule]:
    """Fisher-weighted average: theta = sum_i w_i F_i theta_i / sum_i w_i F_i, per element.

    F_i is the diagonal Fisher information of model i, which its entry in the config names: ``fisher: PATH``.
    `normalize` divides each diagonal by its L2 norm over all merged tensors. The first model is the target: its
    diagonal is raised to at least `floor` times its own root mean square, so that entries about which no model has
    information keep the target's value. `floor_how: add` adds the floor instead, `floor_units: raw` uses `floor`
    itself, `floor_on: all` raises every model's diagonal, and `floor: 0` switches it off. Where all diagonals are 0,
    `fallback` decides: the target, or the average with weights w_i.
    """
    if min(weight) < 0 or not 0 < sum(weight) < math.inf:
        raise ConfigError("weight: Fisher merging multiplies precisions; use weights of 0 or more, not all 0")
    squares = [SquareTotal(1.0, 1)] * context.n_models
    if normalize or (floor > 0 and floor_units == "rms"):
        squares = yield from ask_all([FisherSquares(i) for i in range(context.n_models)])
    if not context.fisher:
        if fallback == "average":
            return weighted_average(context, weight)
        return TaskVectorMerge((context.dropped[0],)) if context.dropped else CopyOf(0)
    units = [_rms(s) if floor_units == "rms" else 1.0 for s in squares]
    return FisherMean(
        tuple(_coefficient(w, s, normalize) for w, s in zip(weight, squares, strict=True)),
        tuple(floor * unit if i == 0 or floor_on == "all" else 0.0 for i, unit in enumerate(units)),
        floor_how == "add",
        tuple(weight) if fallback == "average" else (),
        context.dropped,
    )


method(
    "dare_fisher",
    cost=4.4,
    base="required",
    drop=DARE,
    ignored={"int8_mask": "it has no effect on the numbers"},
    paper="Yu et al. 2024, https://arxiv.org/abs/2311.03099",
    text=f"""Drop and rescale, then Fisher merging of the models theta_0 + m_i delta_i / density_i.
    {DARE_TEXT}
    Everything else is as for `fisher`. The diagonals are those of the original models, not of the dropped ones
    (the published script estimates them again on the dropped models, which needs the data).
    """,
    **_FISHER,
)(fisher)
