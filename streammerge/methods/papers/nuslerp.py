"""NuSLERP: SLERP of two models, or of their task vectors, at a point set by their weights; by tensor, row or column."""

from __future__ import annotations

from streammerge.algebra.extent import Extent
from streammerge.methods.gram_space import Combination, arc, combine
from streammerge.methods.registry import PerModel, method, per_model
from streammerge.methods.tensor_context import TensorContext


@method(
    "nuslerp",
    cost=1.8,
    access=Extent.TENSOR,
    base="optional",
    models=(2, 2),
    ignored={"int8_mask": "it has no effect on the numbers"},
    paper="https://github.com/arcee-ai/mergekit (method of its own)",
)
def nuslerp(
    context: TensorContext,
    *,
    weight: PerModel[float] = per_model(1.0),
    nuslerp_flatten: bool = True,
    nuslerp_row_wise: bool = False,
) -> Combination:
    """Spherical interpolation of two models at t = w_2 / (w_1 + w_2), or, with a base, of their task vectors.

    Where the weights cancel, t = 1/2. `nuslerp_flatten: false` interpolates each row of a matrix (along the last axis; a
    1-D tensor is one row) by its own angle. `nuslerp_row_wise: true` interpolates each column (along the first axis)
    instead: the name is mergekit's, where it is reversed as well.
    """
    total = weight[0] + weight[1]
    t = weight[1] / total if abs(total) >= 1e-6 else 0.5
    vectors = context.task_vectors((1.0, 1.0)) if context.has_base else ()
    by = Extent.TENSOR if nuslerp_flatten else Extent.COLUMN if nuslerp_row_wise else Extent.ROW
    return combine(arc, n=2, vectors=vectors, by=by, t=t)
