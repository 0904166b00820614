"""A plain float64 reference of the methods, written from METHODS sections 2 and 3, not from the product.

Whole tensors, whole models, sorting in place of radix selection. Only two conventions are the
product's on purpose: delta = fl32(theta - theta_0), and sums over models in configured order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

Array = np.ndarray
Tensors = Mapping[str, Array]


# --- random words (section 3)


def key_of(seed: int, purpose: str, model: str, tensor: str) -> list[int]:
    def text(part: str) -> bytes:
        return len(part.encode()).to_bytes(4, "little") + part.encode()

    message = b"streammerge-rng-1" + text(purpose) + seed.to_bytes(8, "little") + text(model) + text(tensor)
    digest = hashlib.blake2b(message, digest_size=16).digest()
    return [int.from_bytes(digest[i : i + 4], "little") for i in range(0, 16, 4)]


def philox(counter: Sequence[int], key: Sequence[int]) -> list[int]:
    """Philox4x32-10 in Python integers, as the paper states it."""
    c, k = list(counter), list(key)
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * c[0], 2**32)
        high1, low1 = divmod(0xCD9E8D57 * c[2], 2**32)
        c = [high1 ^ c[1] ^ k[0], low1, high0 ^ c[3] ^ k[1], low0]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c


def word(element: int, key: Sequence[int]) -> int:
    group = element >> 2
    return philox([group % 2**32, group >> 32, key[2], key[3]], key[:2])[element & 3]


def all_words(n: int, key: Sequence[int]) -> Array:
    """The words of elements 0 to n, n < 2**34, by numpy."""
    low = np.uint64(0xFFFFFFFF)
    c0 = np.arange((n + 3) // 4, dtype=np.uint64)
    c1, c2, c3 = np.zeros_like(c0), np.full_like(c0, key[2]), np.full_like(c0, key[3])
    k0, k1 = key[0], key[1]
    for _ in range(10):
        a, b = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1 = (b >> np.uint64(32)) ^ c1 ^ np.uint64(k0), b & low
        c2, c3 = (a >> np.uint64(32)) ^ c3 ^ np.uint64(k1), a & low
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return np.stack([c0, c1, c2, c3], axis=1).reshape(-1)[:n]


# --- merging


@dataclass
class Merged:
    """The result of a reference merge."""

    theta: dict[str, Array]
    size: dict[str, Array]
    """Magnitude of the terms that were added; cancellation is measured against it."""
    masks: list[dict[str, Array]] = field(default_factory=list)
    """Survivors of each model's task vector."""
    thresholds: list[tuple[float, int, int]] = field(default_factory=list)
    """(threshold, ties, ties needed) of each trim, in order of (tensor, model)."""

    @property
    def kept(self) -> list[int]:
        return [sum(int(mask.sum()) for mask in masks.values()) for masks in self.masks]


def task_vectors(base: Tensors, models: Sequence[Tensors], double: bool) -> list[dict[str, Array]]:
    kind = np.float64 if double else np.float32
    return [{n: (m[n].astype(kind) - base[n].astype(kind)).astype(np.float64) for n in base} for m in models]


def linear(models: Sequence[Tensors], weights: Sequence[float], normalize: bool = True) -> Merged:
    divisor = sum(weights) if normalize else 1.0
    terms = {n: [w * m[n] for w, m in zip(weights, models, strict=True)] for n in models[0]}
    return Merged(
        {n: sum(parts) / divisor for n, parts in terms.items()},
        {n: np.max([np.abs(p / divisor) for p in parts], axis=0) for n, parts in terms.items()},
    )


def task_arithmetic(
    base: Tensors,
    models: Sequence[Tensors],
    weights: Sequence[float],
    *,
    lam: float = 1.0,
    normalize: bool = False,
    double: bool = False,
) -> Merged:
    return _plain_sum(base, task_vectors(base, models, double), weights, weights, lam, normalize)


def ties(
    base: Tensors,
    models: Sequence[Tensors],
    weights: Sequence[float],
    densities: Sequence[float],
    *,
    lam: float = 1.0,
    normalize: bool = True,
    scope: str = "tensor",
    plus_one: bool = False,
    policy: str = "thin",
    zero_sign: str = "zero",
    l1: bool = False,
    seed: int = 0,
    aliases: Sequence[str] = (),
    double: bool = False,
) -> Merged:
    deltas = task_vectors(base, models, double)
    masks, thresholds = [], []
    for i, (delta, density) in enumerate(zip(deltas, densities, strict=True)):
        words = {n: all_words(d.size, key_of(seed, "ties", aliases[i], n)) for n, d in delta.items()}
        groups = [sorted(delta)] if scope == "model" else [[n] for n in sorted(delta)]
        mask: dict[str, Array] = {}
        for names in groups:
            flat = np.concatenate([np.abs(delta[n].astype(np.float32)).ravel() for n in names])
            keep, around = _trim(flat, density, plus_one, policy, np.concatenate([words[n] for n in names]))
            thresholds += around
            start = 0
            for n in names:
                mask[n] = keep[start : start + delta[n].size].reshape(delta[n].shape)
                start += delta[n].size
        masks.append(mask)
    trimmed = [{n: np.where(m[n], d[n], 0.0) for n in d} for d, m in zip(deltas, masks, strict=True)]
    factors = _l1_factors(deltas, trimmed) if l1 else [dict.fromkeys(base, 1.0) for _ in models]
    merged = disjoint_merge(base, trimmed, weights, factors, zero_sign, normalize, lam)
    merged.masks, merged.thresholds = masks, thresholds
    return merged


def _trim(
    magnitude: Array, density: float, plus_one: bool, policy: str, words: Array
) -> tuple[Array, list[tuple[float, int, int]]]:
    n = magnitude.size
    if density >= 1:
        return np.ones(n, bool), []
    if density <= 0:
        return np.zeros(n, bool), []
    k = min(n, int(density * n) + 1 if plus_one else max(1, int(density * n)))
    t = np.sort(magnitude)[n - k]
    above, tied = magnitude > t, magnitude == t
    need, ties_found = k - int(above.sum()), int(tied.sum())
    around = [(float(t), ties_found, need)]
    if policy == "all":
        return above | tied, around
    if policy == "drop":
        return above, around
    if policy == "index":
        return above | (tied & (np.cumsum(tied) <= need)), around
    limit = int(np.floor(need / ties_found * 2**32 + 0.5))
    return above | (tied & (words < limit)), around


def dare(
    base: Tensors,
    models: Sequence[Tensors],
    weights: Sequence[float],
    densities: Sequence[float],
    *,
    lam: float = 1.0,
    normalize: bool = False,
    rescale: str = "paper",
    elect: bool = False,
    zero_sign: str = "zero",
    seed: int = 0,
    aliases: Sequence[str] = (),
    double: bool = False,
) -> Merged:
    deltas = task_vectors(base, models, double)
    masks = []
    for alias, delta, density in zip(aliases, deltas, densities, strict=True):
        limit = int(np.floor((1.0 - density) * 2**32 + 0.5))
        words = {n: all_words(d.size, key_of(seed, "dare", alias, n)) for n, d in delta.items()}
        masks.append({n: (words[n] >= limit).reshape(delta[n].shape) for n in delta})
    survivors = [{n: np.where(m[n], d[n], 0.0) for n in d} for d, m in zip(deltas, masks, strict=True)]
    if rescale == "l1":
        factors = _l1_factors(deltas, survivors)
    else:
        inverse = [1.0 / d if rescale == "paper" and 0 < d < 1 else 1.0 for d in densities]
        factors = [dict.fromkeys(base, f) for f in inverse]
    if elect:
        merged = disjoint_merge(base, survivors, weights, factors, zero_sign, normalize, lam)
    else:
        coefficients = [{n: w * f[n] for n in f} for w, f in zip(weights, factors, strict=True)]
        merged = _plain_sum(base, survivors, coefficients, weights, lam, normalize)
    merged.masks = masks
    return merged


def _l1_factors(whole: Sequence[Tensors], left: Sequence[Tensors]) -> list[dict[str, float]]:
    factors = []
    for before, after in zip(whole, left, strict=True):
        sums = {n: (np.abs(before[n]).sum(), np.abs(after[n]).sum()) for n in before}
        factors.append({n: float(a / b) if b > 0 else 1.0 for n, (a, b) in sums.items()})
    return factors


def _plain_sum(
    base: Tensors,
    deltas: Sequence[Tensors],
    coefficients: Sequence[float | Mapping[str, float]],
    weights: Sequence[float],
    lam: float,
    normalize: bool,
) -> Merged:
    total = sum(weights)
    divisor = total if normalize and abs(total) >= 1e-8 else 1.0
    theta, size = {}, {}
    for n, b in base.items():
        parts = [
            (c[n] if isinstance(c, Mapping) else c) * d[n] for c, d in zip(coefficients, deltas, strict=True)
        ]
        theta[n] = b + lam * (sum(parts) / divisor)
        size[n] = np.max([np.abs(b), *(np.abs(lam * p / divisor) for p in parts)], axis=0)
    return Merged(theta, size)


def disjoint_merge(
    base: Tensors,
    deltas: Sequence[Tensors],
    weights: Sequence[float],
    factors: Sequence[Mapping[str, float]],
    zero_sign: str,
    normalize: bool,
    lam: float,
) -> Merged:
    taus = [{n: (w * f[n]) * d[n] for n in base} for w, f, d in zip(weights, factors, deltas, strict=True)]
    elected = {}
    for n in base:
        up = sum(np.where(tau[n] > 0, tau[n], 0.0) for tau in taus)
        down = sum(np.where(tau[n] < 0, -tau[n], 0.0) for tau in taus)
        elected[n] = np.sign(up - down)
    undecided = {"zero": 0.0, "positive": 1.0}.get(zero_sign, np.nan)
    if zero_sign == "majority":
        undecided = 1.0 if sum(gamma.sum() for gamma in elected.values()) > 0 else -1.0
    theta, size = {}, {}
    for n, b in base.items():
        gamma = np.where(elected[n] == 0, undecided, elected[n])
        agree = [(np.sign(tau[n]) == gamma) & (gamma != 0) for tau in taus]
        total = sum(np.where(a, tau[n], 0.0) for a, tau in zip(agree, taus, strict=True))
        weight = sum(np.where(a, w, 0.0) for a, w in zip(agree, weights, strict=True))
        divisor = np.where(weight == 0, 1.0, weight) if normalize else 1.0
        theta[n] = b + lam * (total / divisor)
        size[n] = np.max([np.abs(b), *(np.abs(lam * t[n] / divisor) for t in taus)], axis=0)
    return Merged(theta, size)


# --- comparing (section 7)

FORMATS = {"bfloat16": (8, -126), "float16": (11, -14), "float32": (24, -126), "float64": (53, -1022)}


def ulp(values: Array, name: str) -> Array:
    """Spacing of a format's numbers at `values`, at least its subnormal spacing."""
    precision, least = FORMATS[name]
    _, exponent = np.frexp(values)
    exponent = np.where(values == 0, least, np.maximum(exponent - 1, least))
    return np.ldexp(1.0, exponent - (precision - 1))


def ulp_error(out: Array, reference: Array, size: Array, name: str) -> Array:
    """Error in ulps; under cancellation, in units of what an fp64 sum of terms of `size` resolves."""
    return np.abs(out - reference) / np.maximum(ulp(reference, name), 2.0**-40 * size)
