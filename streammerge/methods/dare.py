"""DARE: drop entries of the task vectors at random, rescale, merge.  https://arxiv.org/abs/2311.03099"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any, Literal

from streammerge.methods.algebra import (
    Ask,
    divisor,
    drop,
    elect,
    rescale_by_norm,
    rescale_by_probability,
)
from streammerge.methods.recipes import TaskVector, TaskVectorMerge
from streammerge.methods.registry import Access, PerModel, Scope, method
from streammerge.methods.requests import Answer, Request

_PAPER = "Yu et al. 2024, https://arxiv.org/abs/2311.03099"
_DECLARED: dict[str, Any] = {
    "base": "required",
    "bounds": {"density": (0.0, 1.0)},
    "ignored": {"int8_mask": "it has no effect on the numbers"},
    "paper": _PAPER,
}
Rescale = Literal["paper", "l1", "none"]
Steps = Generator[list[Request], list[Answer], TaskVectorMerge]


def _drop_and_rescale(weight: Sequence[float], density: Sequence[float], rescale: Rescale) -> Ask:
    vectors = drop([TaskVector(i, w) for i, w in enumerate(weight)], density)
    if rescale == "paper":
        return rescale_by_probability(vectors, density)
    if rescale == "l1":
        vectors = yield from rescale_by_norm(vectors)
    return vectors


@method(
    "dare_linear",
    access=Access.TENSOR,
    presets={"paper": {}, "mergekit": {"rescale": "l1"}},
    **_DECLARED,
)
def dare_linear(
    scope: Scope,
    *,
    weight: PerModel[float] = 1.0,  # type: ignore[assignment]
    density: PerModel[float] = 1.0,  # type: ignore[assignment]
    normalize: bool = False,
    lambda_: float = 1.0,
    rescale: Literal["paper", "l1", "none"] = "paper",
) -> Steps:
    """Drop and rescale, then task arithmetic: theta = theta_0 + lambda * sum_i w_i m_i delta_i / density_i.

    Each entry of each task vector survives with probability `density` (= 1 - p), independently. `rescale`:
    1/density (`paper`, unbiased), the factor that restores the L1 norm of the tensor (`l1`, mergekit's),
    or `none`.
    """
    vectors = yield from _drop_and_rescale(weight, density, rescale)
    return TaskVectorMerge(tuple(vectors), divisor=divisor(weight, normalize), scale=lambda_)


@method(
    "dare_ties",
    access=Access.MODEL,
    presets={
        "paper": {"zero_sign": "majority"},
        "mergekit": {"rescale": "l1", "zero_sign": "positive"},
    },
    **_DECLARED,
)
def dare_ties(
    scope: Scope,
    *,
    weight: PerModel[float] = 1.0,  # type: ignore[assignment]
    density: PerModel[float] = 1.0,  # type: ignore[assignment]
    normalize: bool = False,
    lambda_: float = 1.0,
    rescale: Literal["paper", "l1", "none"] = "paper",
    zero_sign: Literal["zero", "positive", "majority"] = "zero",
) -> Steps:
    """Drop and rescale, then TIES' sign election and disjoint merge, without a magnitude trim.

    Agreeing entries are summed; `normalize` divides by their weights. `zero_sign` as for `ties`.
    """
    vectors = yield from _drop_and_rescale(weight, density, rescale)
    return (yield from elect(vectors, zero_sign=zero_sign, normalize=normalize, scale=lambda_))
