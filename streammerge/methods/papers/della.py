"""DELLA: drop entries by the rank of their magnitude in their row, rescale, merge.  https://arxiv.org/abs/2406.11617"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from streammerge.algebra.extent import Extent
from streammerge.algebra.rules import TaskVectorMerge
from streammerge.algebra.task_vectors import RankDrop
from streammerge.errors import ConfigError
from streammerge.methods.drop import Vectors, rescale_by_norm
from streammerge.methods.registry import PerModel, method, per_model
from streammerge.methods.steps import ZeroSign, divisor, elect
from streammerge.methods.tensor_context import TensorContext
from streammerge.statistics.asking import Steps

_PAPER = "Deep et al. 2024, https://arxiv.org/abs/2406.11617"
_IGNORED = {"int8_mask": "it has no effect on the numbers"}
_BOUNDS = {"density": (0.0, 1.0), "epsilon": (0.0, 1.0)}
_DROP = """
    The entry of rank r among the n of its row, by ascending magnitude (equal magnitudes share their mean rank), survives
    with probability q = density - epsilon + 2 epsilon (r - 1) / (n - 1), independently. Survivors are rescaled by 1/q
    (`rescale: paper`, unbiased), by the factor that restores the tensor's L1 norm (`l1`, mergekit's), or not at all
    (`none`). A density of 1 drops nothing, a density of 0 everything. For any other density, density - epsilon and
    density + epsilon must lie strictly between 0 and 1.
    """
Rescale = Literal["paper", "l1", "none"]


def _magprune(
    context: TensorContext,
    weight: Sequence[float],
    density: Sequence[float],
    epsilon: Sequence[float],
    rescale: Rescale,
) -> Vectors:
    """Drop from each task vector by rank (MagPrune).

    Raises
    ------
    ConfigError
        If a probability falls outside (0, 1), or if a drop comes before.
    """
    if context.dropped:
        raise ConfigError("`della` already drops parameters; remove `drop_rate`")
    whole = context.task_vectors(weight)
    vectors = []
    for vector, rho, half in zip(whole, density, epsilon, strict=True):
        if 0 < rho < 1 and not (rho - half > 0 and rho + half < 1):
            raise ConfigError(
                f"epsilon: density {rho:g} and epsilon {half:g} give probabilities from {rho - half:g} to {rho + half:g}; they "
                "must lie strictly between 0 and 1: use a smaller epsilon"
            )
        low, spread = (rho - half, 2 * half) if 0 < rho < 1 else (rho, 0.0)
        vectors.append(replace(vector, rank_drop=RankDrop(low, spread, rescale == "paper")))
    return (yield from rescale_by_norm(whole, vectors)) if rescale == "l1" else vectors


@method(
    "della",
    cost=3.6,
    access=Extent.MODEL,
    base="required",
    paper=_PAPER,
    ignored=_IGNORED,
    bounds=_BOUNDS,
    presets={"paper": {"zero_sign": "majority"}, "mergekit": {"rescale": "l1", "zero_sign": "positive"}},
    text=f"""Drop by rank and rescale, then TIES' sign election and disjoint merge.
    {_DROP}`zero_sign` and `normalize` as for `ties`.""",
)
def della(
    context: TensorContext,
    *,
    weight: PerModel[float] = per_model(1.0),
    density: PerModel[float] = per_model(1.0),
    epsilon: PerModel[float] = per_model(0.15),
    normalize: bool = True,
    lambda_: float = 1.0,
    rescale: Rescale = "paper",
    zero_sign: ZeroSign = "zero",
) -> Steps[TaskVectorMerge]:
    """Drop by rank, then elect signs."""
    vectors = yield from _magprune(context, weight, density, epsilon, rescale)
    return (yield from elect(vectors, zero_sign=zero_sign, normalize=normalize, scale=lambda_))


@method(
    "della_linear",
    cost=2.9,
    access=Extent.TENSOR,
    base="required",
    paper=_PAPER,
    ignored=_IGNORED,
    bounds=_BOUNDS,
    presets={"mergekit": {"rescale": "l1"}},
    text=f"""Drop by rank and rescale, then task arithmetic: theta_0 + lambda * sum_i w_i m_i delta_i / q_i.
    {_DROP}""",
)
def della_linear(
    context: TensorContext,
    *,
    weight: PerModel[float] = per_model(1.0),
    density: PerModel[float] = per_model(1.0),
    epsilon: PerModel[float] = per_model(0.15),
    normalize: bool = False,
    lambda_: float = 1.0,
    rescale: Rescale = "paper",
) -> Steps[TaskVectorMerge]:
    """Drop by rank, then sum."""
    vectors = yield from _magprune(context, weight, density, epsilon, rescale)
    return TaskVectorMerge(tuple(vectors), divisor=divisor(weight, normalize), scale=lambda_)
