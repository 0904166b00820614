"""RAM: keep what one model alone has learnt whole, and average what several have.  https://arxiv.org/abs/2601.13572"""

from __future__ import annotations

from streammerge.algebra.extent import Extent
from streammerge.algebra.rules import TouchedMerge
from streammerge.methods.registry import method
from streammerge.methods.tensor_context import TensorContext
from streammerge.statistics.asking import Steps, ask
from streammerge.statistics.kinds import Touches

_PAPER = "Yuan et al. 2026, https://arxiv.org/abs/2601.13572"
_BOUNDS = {"epsilon": (0.0, float("inf")), "alpha": (0.0, float("inf"))}


@method("ram", base="required", bounds=_BOUNDS, paper=_PAPER)
def ram(context: TensorContext, *, epsilon: float = 1e-5) -> TouchedMerge:
    """theta = theta_0 + the mean of the deltas above `epsilon` in magnitude, over the models that have one there.

    An element that one model alone has touched takes its whole delta; one that none has stays the base's.
    """
    vectors = tuple(context.task_vectors((1.0,) * context.n_models))
    return TouchedMerge(vectors, epsilon, (1.0,) * len(vectors))


@method("ramplus_tl", access=Extent.TENSOR, base="required", bounds=_BOUNDS, paper=_PAPER)
def ramplus_tl(
    context: TensorContext, *, r: float = 0.1, alpha: float = 0.2, epsilon: float = 1e-5
) -> Steps[TouchedMerge]:
    """RAM, with what one model alone has touched made larger, the more of that model's changes others share.

    Its delta there is multiplied by 1 + r * min(rho, alpha), rho = how many elements of the tensor it shares with
    others / how many it has touched alone. (The paper counts over the whole model; mergekit and this, over each tensor.)
    """
    vectors = tuple(context.task_vectors((1.0,) * context.n_models))
    touched = yield from ask(Touches(vectors, epsilon))
    pairs = zip(touched.unique, touched.shared, strict=True)
    factors = tuple(1.0 + r * min(shared / unique, alpha) if unique else 1.0 for unique, shared in pairs)
    return TouchedMerge(vectors, epsilon, factors)
