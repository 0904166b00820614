"""DARE's drop and rescale, put before any method.  https://arxiv.org/abs/2311.03099 (section 3.2)

A drop turns each model into theta_0 + rescale * mask * delta; the method after it sees only that.
The mask drops each entry with the same probability (`bernoulli`, the paper), exactly the right number at
random (`exact`), or the smallest magnitudes (`magnitude`, the paper's ablation).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from streammerge.algebra.task_vectors import Cut, TaskVector
from streammerge.numerics import philox as rng
from streammerge.records import dataclass
from streammerge.statistics.asking import Steps, ask_all
from streammerge.statistics.kinds import AbsSum, LowWords, TopK

Vectors = Steps[list[TaskVector]]
Rescale = Literal["paper", "l1", "none"]
Mask = Literal["bernoulli", "exact", "magnitude"]


@dataclass(frozen=True)
class DropNames:
    """The names that a method gives to the parameters of the drop before it."""

    fraction: str
    """Name of the fraction per model: the fraction dropped, or the fraction kept if `keeps`."""
    rescale: str
    mask: str
    shared: str = "shared_mask"
    keeps: bool = False

    def take(self, parameters: dict[str, Any]) -> Drop | None:
        """Remove the drop's parameters from a method's and return the drop, or None if there is none."""
        fractions = parameters.pop(self.fraction)
        rescale, mask, shared = (parameters.pop(name) for name in (self.rescale, self.mask, self.shared))
        rates = tuple(1.0 - f for f in fractions) if self.keeps else fractions
        densities = fractions if self.keeps else tuple(1.0 - f for f in fractions)
        return Drop(rates, densities, rescale, mask, shared) if any(rates) else None

    def wanted_by(self, parameters: Mapping[str, Any]) -> bool:
        """Return whether parameters with these values drop anything."""
        return self.take(dict(parameters)) is not None


GENERAL = DropNames("drop_rate", "drop_rescale", "drop_mask")
"""The names under which every method takes a drop."""
DARE = DropNames("density", "rescale", "mask", keeps=True)
"""The names under which the ``dare_`` methods take their drop: mergekit's, where mergekit has one."""
DARE_TEXT = """
    Each entry of each task vector survives with probability `density` (= 1 - p), independently. Survivors are
    rescaled by 1/density (`rescale: paper`, unbiased), by the factor that restores the tensor's L1 norm (`l1`,
    mergekit's), or not at all (`none`). `mask: bernoulli` draws each entry; `exact` keeps exactly the right number
    per tensor, at random; `magnitude` drops the smallest. `shared_mask` uses one random mask for all models.
    """
"""The paragraph on the drop in the text of every ``dare_`` method."""


@dataclass(frozen=True)
class Drop:
    """A drop: the fraction of each model's task vector that is dropped, the mask and the rescaling."""

    rates: tuple[float, ...]
    """The paper's p (the fraction dropped), per model."""
    densities: tuple[float, ...]
    """1 - p per model; exactly the configured number if the config gives a density."""
    rescale: Rescale
    mask: Mask
    shared: bool
    """Whether all models share one random mask."""

    def steps(self) -> Vectors:
        """Ask for the statistics that the drop needs and return the models' task vectors, dropped and rescaled."""
        vectors = [TaskVector(i, shared=self.shared) for i in range(len(self.rates))]
        if self.mask == "magnitude":
            vectors = yield from _drop_smallest(vectors, self.densities)
        elif self.mask == "exact":
            vectors = yield from _drop_exactly(vectors, self.rates)
        else:
            vectors = [
                replace(v, drop=rng.threshold(min(1.0, max(0.0, rate))))
                for v, rate in zip(vectors, self.rates, strict=True)
            ]
        if self.rescale == "paper":
            return _rescale_by_probability(vectors, self.densities)
        if self.rescale == "l1":
            return (yield from rescale_by_norm([TaskVector(v.model) for v in vectors], vectors))
        return vectors


def _drop_exactly(vectors: Sequence[TaskVector], rates: Sequence[float]) -> Vectors:
    """Drop round(n p) entries of each tensor: those of the smallest random words, ties by index."""
    partial = [i for i, rate in enumerate(rates) if 0 < rate < 1]
    dropped = [replace(v, drop=2**32) if rate >= 1 else v for v, rate in zip(vectors, rates, strict=True)]
    if not partial:
        return dropped
    ends = yield from ask_all([LowWords(vectors[i], rates[i]) for i in partial])
    for i, (word, element) in zip(partial, ends, strict=True):
        dropped[i] = replace(dropped[i], drop=word, drop_end=element)
    return dropped


def _drop_smallest(vectors: Sequence[TaskVector], densities: Sequence[float]) -> Vectors:
    """Keep the top `density` of magnitudes per tensor; a random draw thins the entries at the threshold."""
    dropped = [replace(v, drop=2**32) if d <= 0 else v for v, d in zip(vectors, densities, strict=True)]
    partial = [i for i, density in enumerate(densities) if 0 < density < 1]
    if not partial:
        return dropped
    thresholds = yield from ask_all([TopK(vectors[i], densities[i]) for i in partial])
    for i, threshold in zip(partial, thresholds, strict=True):
        limit = rng.threshold(threshold.needed / threshold.ties)
        dropped[i] = replace(dropped[i], cut=Cut(threshold.key, "thin", limit))
    return dropped


def _rescale_by_probability(vectors: Sequence[TaskVector], densities: Sequence[float]) -> list[TaskVector]:
    """Divide the survivors by the surviving fraction: unbiased for a random mask."""
    return [
        replace(vector, rescale=1.0 / density if 0 < density < 1 else 1.0)
        for vector, density in zip(vectors, densities, strict=True)
    ]


def rescale_by_norm(before: Sequence[TaskVector], after: Sequence[TaskVector]) -> Vectors:
    """Give each vector back the L1 norm it had before, per tensor, as mergekit's ``rescale: true`` does."""
    rescaled = list(after)
    touched = [i for i, pair in enumerate(zip(before, after, strict=True)) if _differ(*pair)]
    if not touched:
        return rescaled
    sums = yield from ask_all([AbsSum(vectors[i]) for vectors in (before, after) for i in touched])
    for place, i in enumerate(touched):
        whole, left = sums[place], sums[len(touched) + place]
        rescaled[i] = replace(after[i], rescale=after[i].rescale * (whole / left if left > 0 else 1.0))
    return rescaled


def _differ(before: TaskVector, after: TaskVector) -> bool:
    return any(
        getattr(before, field) != getattr(after, field) for field in ("drop", "drop_end", "cut", "rank_drop")
    )
