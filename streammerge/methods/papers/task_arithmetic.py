"""Task arithmetic: add, subtract and combine task vectors."""

from __future__ import annotations

from streammerge.algebra.rules import TaskVectorMerge
from streammerge.methods.registry import PerModel, method, per_model
from streammerge.methods.steps import divisor
from streammerge.methods.tensor_context import TensorContext

_UNUSED = "`task_arithmetic` does not sparsify, neither here nor in mergekit"


@method(
    "task_arithmetic",
    cost=1.1,
    base="required",
    paper="Ilharco et al. 2023, https://arxiv.org/abs/2212.04089",
    ignored={
        "density": _UNUSED,
        "rescale": _UNUSED,
        "int8_mask": "it has no effect on the numbers",
    },
)
def task_arithmetic(
    context: TensorContext,
    *,
    weight: PerModel[float] = per_model(1.0),
    normalize: bool = False,
    lambda_: float = 1.0,
) -> TaskVectorMerge:
    """Sum of task vectors: theta = theta_0 + lambda * sum_i w_i (theta_i - theta_0).

    Addition combines tasks; a negative weight forgets one. The analogy "A is to B as C is to D" takes
    weights +1 for B and C, -1 for A, and the common ancestor as base.
    """
    vectors = context.task_vectors(weight)
    return TaskVectorMerge(tuple(vectors), divisor=divisor(weight, normalize), scale=lambda_)
