"""Float64 references of a drop before a method and of Fisher merging, from METHODS 2.3 and 2.6."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tests.methods.reference import Array, Merged, Tensors, _trim, all_words, key_of, task_vectors


@dataclass(frozen=True)
class DropSpec:
    """The drop applied to every model."""

    rate: float
    mask: str = "bernoulli"
    rescale: str = "paper"
    shared: bool = False


def drop_masks(
    deltas: Sequence[Tensors], spec: DropSpec, seed: int, aliases: Sequence[str]
) -> list[dict[str, Array]]:
    """Return the entries of each model's task vector that survive."""
    masks = []
    for alias, delta in zip(aliases, deltas, strict=True):
        name = "" if spec.shared else alias
        masks.append({n: _survivors(d, spec, seed, name, n) for n, d in delta.items()})
    return masks


def _survivors(delta: Array, spec: DropSpec, seed: int, alias: str, tensor: str) -> Array:
    n = delta.size
    if spec.rate <= 0 or spec.rate >= 1:
        return np.full(delta.shape, spec.rate <= 0)
    if spec.mask == "magnitude":
        words = all_words(n, key_of(seed, "ties", alias, tensor))
        keep, _ = _trim(np.abs(delta.astype(np.float32)).ravel(), 1.0 - spec.rate, False, "thin", words)
        return keep.reshape(delta.shape)
    words = all_words(n, key_of(seed, "dare", alias, tensor))
    if spec.mask == "exact":
        keep = np.ones(n, bool)
        keep[np.lexsort((np.arange(n), words))[: round(spec.rate * n)]] = False
        return keep.reshape(delta.shape)
    return (words >= int(np.floor(spec.rate * 2**32 + 0.5))).reshape(delta.shape)


@dataclass
class Dropped:
    """The task vectors of the models after a drop: model i is theta_0 + factors[i] * left[i]."""

    spec: DropSpec
    masks: list[dict[str, Array]]
    left: list[dict[str, Array]]
    factors: list[dict[str, float]]

    def models(self, base: Tensors) -> list[dict[str, Array]]:
        pairs = zip(self.left, self.factors, strict=True)
        return [{n: base[n] + factors[n] * d for n, d in left.items()} for left, factors in pairs]

    def kept(self) -> list[int]:
        """Surviving entries of each model, over the tensors from which the drop could take any."""
        spec = self.spec
        touched = [n for n, m in self.masks[0].items() if spec.mask != "exact" or round(spec.rate * m.size)]
        return [sum(int(mask[n].sum()) for n in touched) for mask in self.masks]


def dropped(
    base: Tensors, models: Sequence[Tensors], spec: DropSpec, seed: int, aliases: Sequence[str]
) -> Dropped:
    """Drop and rescale each model's task vector, per tensor."""
    deltas = task_vectors(base, models, double=False)
    result = Dropped(spec, drop_masks(deltas, spec, seed, aliases), [], [])
    for delta, mask in zip(deltas, result.masks, strict=True):
        left = {n: np.where(mask[n], d, 0.0) for n, d in delta.items()}
        result.left.append(left)
        result.factors.append({n: _factor(spec, d, left[n]) for n, d in delta.items()})
    return result


def _factor(spec: DropSpec, delta: Array, left: Array) -> float:
    if spec.rescale == "paper" and 0 < spec.rate < 1:
        return 1.0 / (1.0 - spec.rate)
    if spec.rescale == "l1" and np.abs(left).sum() > 0:
        return float(np.abs(delta).sum() / np.abs(left).sum())
    return 1.0


def fisher(
    models: Sequence[Tensors],
    fishers: Sequence[Tensors],
    weights: Sequence[float],
    *,
    normalize: bool = True,
    floor: float = 1e-6,
    floor_units: str = "rms",
    floor_on: str = "target",
    floor_how: str = "max",
    fallback: str = "target",
) -> Merged:
    """Evaluated safely, as METHODS 2.3 says: scaled by the largest certainty, around the target."""
    merged = Merged({}, {})
    n = sum(f.size for f in fishers[0].values())
    squares = [sum(float((f * f).sum()) for f in diagonal.values()) for diagonal in fishers]
    coefficients = [w / s**0.5 if normalize else w for w, s in zip(weights, squares, strict=True)]
    floors = [floor * ((s / n) ** 0.5 if floor_units == "rms" else 1.0) for s in squares]
    if floor_on == "target":
        floors = [floors[0], *(0.0 for _ in floors[1:])]
    for name in models[0]:
        a = []
        for c, diagonal, least in zip(coefficients, fishers, floors, strict=True):
            f = diagonal[name]
            a.append(c * (f + least if floor_how == "add" else np.maximum(f, least)))
        top = np.max(a, axis=0)
        scaled = [x / np.where(top == 0, 1.0, top) for x in a]
        target = models[0][name]
        pull = sum(x * (m[name] - target) for x, m in zip(scaled, models, strict=True))
        theta = target + pull / np.where(top == 0, 1.0, sum(scaled))
        average = sum(w * m[name] for w, m in zip(weights, models, strict=True)) / sum(weights)
        undecided = average if fallback == "average" else target
        merged.theta[name] = np.where(top == 0, undecided, theta)
        merged.size[name] = np.max([np.abs(m[name]) for m in models], axis=0)
    return merged
