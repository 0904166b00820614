"""RAM: keep changes of a single model in full, average shared changes.  https://arxiv.org/abs/2601.13572"""

from __future__ import annotations

from streammerge.algebra.extent import Extent
from streammerge.algebra.rules import TouchedMerge
from streammerge.methods.registry import method
from streammerge.methods.tensor_context import TensorContext
from streammerge.statistics.asking import Steps, ask
from streammerge.statistics.kinds import Touches

_PAPER = "Yuan et al. 2026, https://arxiv.org/abs/2601.13572"
_BOUNDS = {"epsilon": (0.0, float("inf")), "alpha": (0.0, float("inf"))}


@method("ram", cost=2.2, base="required", bounds=_BOUNDS, paper=_PAPER)
def ram(context: TensorContext, *, epsilon: float = 1e-5) -> TouchedMerge:
    """theta = theta_0 + the mean of those deltas of an element whose magnitude exceeds `epsilon`.

    An element that a single model changed takes that model's whole delta; an element that none changed stays the base's.
    """
    vectors = tuple(context.task_vectors((1.0,) * context.n_models))
    return TouchedMerge(vectors, epsilon, (1.0,) * len(vectors))


@method("ramplus_tl", cost=2.4, access=Extent.TENSOR, base="required", bounds=_BOUNDS, paper=_PAPER)
def ramplus_tl(
    context: TensorContext, *, r: float = 0.1, alpha: float = 0.2, epsilon: float = 1e-5
) -> Steps[TouchedMerge]:
    """RAM that amplifies the changes made by a single model, the more so the more of its other changes are shared.

    The delta of an element that only one model changed is multiplied by 1 + r * min(rho, alpha), where rho = (number of
    elements that this model and others changed) / (number that only it changed). The counts are per tensor, as in
    mergekit; the paper counts over the whole model.
    """
    vectors = tuple(context.task_vectors((1.0,) * context.n_models))
    touched = yield from ask(Touches(vectors, epsilon))
    pairs = zip(touched.unique, touched.shared, strict=True)
    factors = tuple(1.0 + r * min(shared / unique, alpha) if unique else 1.0 for unique, shared in pairs)
    return TouchedMerge(vectors, epsilon, factors)
