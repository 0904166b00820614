"""Changes of weights that need no arithmetic on the weights themselves: none, or a sum of the models' adapters."""

from __future__ import annotations

import math

from streammerge.algebra.rules import CopyOf, TaskVectorMerge, WeightedSum
from streammerge.checkpoint.refs.adapted import AdaptedRef
from streammerge.checkpoint.refs.difference import SumOfProductsRef
from streammerge.dtypes import FLOATS
from streammerge.formats.refs import RenamedRef, SourceRef
from streammerge.planning.job import Job
from streammerge.planning.needs import tensor_context_of
from streammerge.planning.quantize.base import Material


def sum_of_products(job: Job, base: SourceRef, material: Material) -> SourceRef | None:
    """Return the change of a weight as a sum of the models' adapters; None if it is anything else.

    The merge must be a sum of models whose coefficients add up to one, or of task vectors, none of which is trimmed.
    """
    coefficients = coefficients_of(job, material)
    if coefficients is None:
        return None
    terms = []
    for coefficient, source in zip(coefficients, job.sources, strict=True):
        adapted = source.source if isinstance(source, RenamedRef) else source
        if is_same(adapted, base):
            continue
        if not isinstance(adapted, AdaptedRef) or not is_same(adapted.source, base):
            return None
        if adapted.magnitude is not None or adapted.blocks > 1 or adapted.right is None:
            return None
        terms.append((coefficient, adapted))
    return SumOfProductsRef(base, tuple(terms)) if terms else None


def coefficients_of(job: Job, material: Material) -> list[float] | None:
    """Return the coefficient of each model's change in a merge; None if the merge is no sum of them."""
    method = material.method
    if job.kind != "merge" or method.drops(job.parameters) or method.is_formula:
        return None
    context = tensor_context_of(job)
    if method.rounds(context, job.parameters):
        return None
    rule = method.rule(context, job.parameters)
    found = [0.0] * len(job.sources)
    if isinstance(rule, CopyOf):
        found[rule.model] = 1.0
        return found
    if isinstance(rule, WeightedSum):
        found = [weight / rule.divisor for weight in rule.weights]
        return found if abs(math.fsum(found) + rule.base_weight / rule.divisor - 1) < 1e-12 else None
    if not isinstance(rule, TaskVectorMerge) or rule.elect or rule.removes:
        return None
    for vector in rule.vectors:
        found[vector.model] += rule.scale * vector.weight * vector.rescale / rule.divisor
    return found


def is_same(one: SourceRef, other: SourceRef) -> bool:
    """Return whether two references lead to the same stored tensor."""
    a, b = (ref.source.plain if isinstance(ref, RenamedRef) else ref.plain for ref in (one, other))
    if a is None or b is None:
        return one is other
    return (a.path, a.offset, a.dtype, a.shape) == (b.path, b.offset, b.dtype, b.shape) and a.dtype in FLOATS
