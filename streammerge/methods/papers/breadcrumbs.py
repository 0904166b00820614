"""Model Breadcrumbs: drop the largest and the smallest entries of each task vector, merge the rest."""

from __future__ import annotations

from typing import Literal

from streammerge.algebra.extent import Extent
from streammerge.algebra.rules import TaskVectorMerge
from streammerge.algebra.task_vectors import TiePolicy
from streammerge.methods.drop import Vectors, rescale_by_norm
from streammerge.methods.registry import PerModel, method, per_model
from streammerge.methods.steps import ZeroSign, divisor, elect, keep_band
from streammerge.methods.tensor_context import TensorContext
from streammerge.statistics.asking import Steps

_PAPER = "Davari & Belilovsky 2024, https://arxiv.org/abs/2312.06795"
_IGNORED = {"int8_mask": "it has no effect on the numbers"}
_BAND = """
    In each tensor of n entries the int(gamma * n) largest magnitudes are dropped and the next int(density * n) are
    kept; if the two numbers add to more than n, fewer of the largest are dropped. `density: 1`, the default as in
    mergekit, drops nothing. `ties` means what it means for the method `ties`; `rescale: l1` restores the L1 norm.
    """


def _between(
    context: TensorContext,
    weight: PerModel[float],
    density: PerModel[float],
    gamma: PerModel[float],
    ties: TiePolicy,
    rescale: str,
) -> Vectors:
    whole = context.task_vectors(weight)
    vectors = yield from keep_band(whole, density, gamma, ties=ties)
    return (yield from rescale_by_norm(whole, vectors)) if rescale == "l1" else vectors


@method(
    "breadcrumbs",
    cost=3.3,
    access=Extent.TENSOR,
    base="required",
    paper=_PAPER,
    ignored=_IGNORED,
    bounds={"density": (0.0, 1.0), "gamma": (0.0, 1.0)},
    presets={"mergekit": {"ties": "index"}},
    text=f"""Sum of task vectors without outliers and noise: theta_0 + lambda * sum_i w_i m_i delta_i.
    {_BAND}""",
)
def breadcrumbs(
    context: TensorContext,
    *,
    weight: PerModel[float] = per_model(1.0),
    density: PerModel[float] = per_model(1.0),
    gamma: PerModel[float] = per_model(0.01),
    normalize: bool = False,
    lambda_: float = 1.0,
    ties: Literal["thin", "all", "index", "drop"] = "thin",
    rescale: Literal["none", "l1"] = "none",
) -> Steps[TaskVectorMerge]:
    """Keep the band of each task vector, then sum."""
    vectors = yield from _between(context, weight, density, gamma, ties, rescale)
    return TaskVectorMerge(tuple(vectors), divisor=divisor(weight, normalize), scale=lambda_)


@method(
    "breadcrumbs_ties",
    cost=2.9,
    access=Extent.MODEL,
    base="required",
    paper=_PAPER,
    ignored=_IGNORED,
    bounds={"density": (0.0, 1.0), "gamma": (0.0, 1.0)},
    presets={"mergekit": {"ties": "index", "zero_sign": "positive"}},
    text=f"""Breadcrumbs, then TIES' sign election: the agreeing entries are summed.
    {_BAND}`zero_sign` and `normalize` as for `ties`.""",
)
def breadcrumbs_ties(
    context: TensorContext,
    *,
    weight: PerModel[float] = per_model(1.0),
    density: PerModel[float] = per_model(1.0),
    gamma: PerModel[float] = per_model(0.01),
    normalize: bool = False,
    lambda_: float = 1.0,
    ties: Literal["thin", "all", "index", "drop"] = "thin",
    zero_sign: ZeroSign = "zero",
    rescale: Literal["none", "l1"] = "none",
) -> Steps[TaskVectorMerge]:
    """Keep the band of each task vector, then elect signs."""
    vectors = yield from _between(context, weight, density, gamma, ties, rescale)
    return (yield from elect(vectors, zero_sign=zero_sign, normalize=normalize, scale=lambda_))
