"""DARE: drop entries of the task vectors at random, rescale, merge.  https://arxiv.org/abs/2311.03099

Each is another method with a drop before it (`streammerge.methods.drop`), under mergekit's names.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, Literal

from streammerge.algebra.rules import TaskVectorMerge
from streammerge.methods.drop import DARE
from streammerge.methods.papers.fisher import FISHER, fisher
from streammerge.methods.papers.task_arithmetic import task_arithmetic
from streammerge.methods.registry import Access, PerModel, method
from streammerge.methods.steps import elect
from streammerge.methods.tensor_context import Scope
from streammerge.statistics.kinds import Answer, Request

_DARE: dict[str, Any] = {
    "base": "required",
    "drop": DARE,
    "ignored": {"int8_mask": "it has no effect on the numbers"},
    "paper": "Yu et al. 2024, https://arxiv.org/abs/2311.03099",
}
_DROP = """
    Each entry of each task vector survives with probability `density` (= 1 - p), independently. `rescale`:
    1/density (`paper`, unbiased), the factor that restores the L1 norm of the tensor (`l1`, mergekit's),
    or `none`. `mask`: `bernoulli`; `exact`, just the right number of each tensor at random; `magnitude`, the
    smallest go. `shared_mask`: one random mask for all models.
    """

method(
    "dare_linear",
    access=Access.TENSOR,
    presets={"paper": {}, "mergekit": {"rescale": "l1"}},
    text=f"""Drop and rescale, then task arithmetic: theta_0 + lambda * sum_i w_i m_i delta_i / density_i.
    {_DROP}
    `normalize: true` divides by the sum of weights: DARE before averaging, the mean of the dropped models.
    """,
    **_DARE,
)(task_arithmetic)


@method(
    "dare_ties",
    access=Access.MODEL,
    presets={
        "paper": {"zero_sign": "majority"},
        "mergekit": {"rescale": "l1", "zero_sign": "positive"},
    },
    text=f"""Drop and rescale, then TIES' sign election and disjoint merge, without a magnitude trim.
    {_DROP}
    Agreeing entries are summed; `normalize` divides by their weights. `zero_sign` as for `ties`. The paper's
    own combination trims as well: that is `ties` with `drop_rate`.
    """,
    **_DARE,
)
def dare_ties(
    scope: Scope,
    *,
    weight: PerModel[float] = 1.0,
    normalize: bool = False,
    lambda_: float = 1.0,
    zero_sign: Literal["zero", "positive", "majority"] = "zero",
) -> Generator[list[Request], list[Answer], TaskVectorMerge]:
    """Elect signs among the dropped task vectors and sum the agreeing entries."""
    vectors = scope.task_vectors(weight)
    return (yield from elect(vectors, zero_sign=zero_sign, normalize=normalize, scale=lambda_))


method(
    "dare_fisher",
    text=f"""Drop and rescale, then Fisher merging of the models theta_0 + m_i delta_i / density_i.
    {_DROP}
    Everything else as for `fisher`. The diagonals are those of the models as they were, not of the dropped
    ones (the published script estimates them anew on the dropped models, which takes the data).
    """,
    **(FISHER | _DARE),
)(fisher)
