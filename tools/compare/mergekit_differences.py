"""Cases, and where mergekit computes something else on purpose or by accident, with its formula."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

Array = np.ndarray


Theirs = Callable[..., Array]
"""The formula ascribed to mergekit, of the base (if the config has one) and the models of one tensor."""


@dataclass(frozen=True, eq=False)
class Difference:
    """Something the programs do differently on purpose, and the proof that nothing else differs."""

    why: str
    where: str
    """Where it is explained: a section of docs/use/methods.md."""
    cure: Mapping[str, Any] = field(default_factory=dict)
    """Parameters with which this program does as mergekit does; the results must then be equal but for rounding."""
    theirs: Theirs | None = None
    """Without a cure: a formula that mergekit's result must be equal to, but for rounding."""
    exact_in_float64: bool = False
    """Without either: rounding of float32, magnified by what it decides; in float64 the results must be equal."""


@dataclass(frozen=True)
class Case:
    """One config, and what to expect."""

    name: str
    config: Mapping[str, Any]
    differs: Difference | None = None
    bound: float = 16.0
    """Most ulp, of float32 or float64, that rounding may make, at the size of the largest operand of an element."""
    moved: bool = False
    """Elements come from other places of the models: rounding is measured at the root mean square of the tensor."""


@dataclass(frozen=True)
class RandomCase:
    """A config of one model with random drops: compared by what is left, not bit by bit."""

    name: str
    config: Mapping[str, Any]
    density: float
    cure: Mapping[str, Any]
    """Parameters that restore the L1 norm, as mergekit's defaults do."""
    spread: float = 0.0
    """How much likelier the larger half of the magnitudes is to be kept than the smaller."""


# --- differences that are meant

SCE_FLOOR = Difference(
    "mean squares that sum to less than 1e-6 make equal weights in mergekit, so most tensors of fine-tunes are not "
    "weighted at all; and no sum of weights counts as less than 1e-6",
    "sce",
    cure={"preset": "mergekit"},
)


SLERP_LINE = Difference(
    "mergekit takes the straight line where the cosine exceeds 0.9995", "slerp", cure={"preset": "mergekit"}
)


FUSION = Difference(
    "mergekit sums divergences of some 1e-6 in float32 from terms of 1e-2: importances near the threshold fall on "
    "either side",
    "arcee_fusion",
    exact_in_float64=True,
)


def model_stock_clamped(base: Array, *thetas: Array) -> Array:
    """Return model_stock with mergekit's clamp of the norms' product."""
    deltas = [theta.ravel() - base.ravel() for theta in thetas]
    n, cosines = len(deltas), []
    for i in range(n):
        for j in range(i + 1, n):
            product = max(float(np.linalg.norm(deltas[i]) * np.linalg.norm(deltas[j])), 1e-6)
            cosines.append(min(1.0, max(-1.0, float(deltas[i] @ deltas[j]) / product)))
    c = float(np.mean(cosines))
    t = n * c / (1 + (n - 1) * c)
    return t * np.mean(thetas, axis=0) + (1 - t) * base


def multislerp_with_eps(*thetas: Array, weights: Sequence[float], base: Array | None = None) -> Array:
    """Return multislerp with 1e-8 added to every norm, and the tangent step that this makes differ from 0."""
    origin = 0.0 if base is None else base
    vectors = [(theta - origin).ravel() for theta in thetas]
    norms = [float(np.linalg.norm(vector)) for vector in vectors]
    units = [vector / (norm + 1e-8) for vector, norm in zip(vectors, norms, strict=True)]
    mean = sum(w * u for w, u in zip(weights, units, strict=True))
    mean = mean / np.linalg.norm(mean)
    tangent = sum(w * (u - float(u @ mean) * mean) for w, u in zip(weights, units, strict=True))
    length = float(np.linalg.norm(tangent)) + 1e-8
    point = mean * np.cos(length) + tangent * (np.sin(length) / length)
    return (point * sum(w * n for w, n in zip(weights, norms, strict=True))).reshape(thetas[0].shape) + origin


def ramplus_in_float32(base: Array, *thetas: Array, r: float, alpha: float, epsilon: float) -> Array:
    """Return RAM+ with factors in float32, whatever the dtype of the merge."""
    deltas = np.stack([theta - base for theta in thetas])
    touched = np.abs(deltas) > epsilon
    count = touched.sum(axis=0)
    merged = np.zeros_like(base)
    for delta, mask in zip(deltas, touched, strict=True):
        shared, unique = int((mask & (count > 1)).sum()), int((mask & (count == 1)).sum())
        rho = np.float32(shared) / np.float32(max(unique, epsilon))
        factor = np.float32(1) + np.float32(r) * np.clip(rho, np.float32(0), np.float32(alpha))
        merged += np.where(
            mask & (count == 1), float(factor) * delta, np.where(mask, delta / np.maximum(count, 1), 0.0)
        )
    return base + merged


CLAMPED = Difference(
    "mergekit holds the product of two norms above 1e-6, which pulls small tensors back to the base",
    "model_stock",
    theirs=model_stock_clamped,
)


EPS_WHY = (
    "mergekit adds 1e-8 to every norm, and 1e-8 to the length of a tangent step that is 0 without that: some 1e-9 of the "
    "result, to be seen in float64"
)


FACTORS_WHY = "mergekit computes the factors of lone entries in float32 whatever the dtype of the merge, to be seen in float64"


def _with_eps(weights: Sequence[float], base: bool) -> Difference:
    """Return multislerp's difference for some weights, already normalized where mergekit does that."""

    def theirs(*tensors: Array) -> Array:
        origin, rest = (tensors[0], tensors[1:]) if base else (None, tensors)
        return multislerp_with_eps(*rest, weights=weights, base=origin)

    return Difference(EPS_WHY, "multislerp", theirs=theirs)


def _in_float32(r: float = 0.1, alpha: float = 0.2, epsilon: float = 1e-5) -> Difference:
    return Difference(
        FACTORS_WHY, "ramplus_tl", theirs=partial(ramplus_in_float32, r=r, alpha=alpha, epsilon=epsilon)
    )
