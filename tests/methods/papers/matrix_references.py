"""Plain float64 references of the methods of whole matrices, by LAPACK's singular value decomposition."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

Array = np.ndarray


def svd(matrix: Array) -> tuple[Array, Array, Array]:
    """Return U, S and V' on the numerical rank."""
    u, s, vh = np.linalg.svd(matrix, full_matrices=False)
    kept = s > max(matrix.shape) * 2.0**-52 * s[0]
    return u[:, kept], s[kept], vh[kept]


def procrustes(sides: Sequence[Array]) -> Array:
    u, _, vh = svd(np.concatenate(sides, axis=1))
    return u @ vh


def iso_c(deltas: Sequence[Array]) -> Array:
    u, s, vh = svd(np.sum(deltas, axis=0))
    return s.sum() / min(deltas[0].shape) * u @ vh


def iso_cts(deltas: Sequence[Array], fraction: float = 0.8) -> Array:
    r = min(deltas[0].shape)
    t = round((r - fraction * r) / len(deltas))
    k = r - t * len(deltas)
    u, s, vh = (one[..., :k] if i < 2 else one[:k] for i, one in enumerate(svd(np.sum(deltas, axis=0))))
    left, right, values = [u], [vh.T], [s]
    for delta in deltas:
        own_u, own_s, own_vh = svd(delta - u @ u.T @ delta)
        left, right, values = [*left, own_u[:, :t]], [*right, own_vh[:t].T], [*values, own_s[:t]]
    return np.concatenate(values).sum() / r * procrustes(left) @ procrustes(right).T


def tsv_m(deltas: Sequence[Array]) -> Array:
    k = max(1, min(deltas[0].shape) // len(deltas))
    found = [svd(delta) for delta in deltas]
    values = np.concatenate([s[:k] for _, s, _ in found])
    return (
        procrustes([u[:, :k] for u, _, _ in found]) * values @ procrustes([vh[:k].T for _, _, vh in found]).T
    )


def wudi(deltas: Sequence[Array], alpha: float = 1.0, ridge: float = 0.0) -> Array:
    grams = []
    for delta in deltas:
        gram = delta.T @ delta / np.sum(delta**2)
        grams.append(alpha * gram + (1 - alpha) * np.diag(np.diag(gram)))
    total = np.sum(grams, axis=0)
    total += ridge * np.trace(total) / len(total) * np.eye(len(total))
    return np.sum([d @ g for d, g in zip(deltas, grams, strict=True)], axis=0) @ np.linalg.pinv(total, 1e-13)


def knots(deltas: Sequence[Array], density: float = 1.0) -> Array:
    u, s, vh = svd(np.concatenate(deltas, axis=1))
    kept = s > 1e-5 * s[0]
    aligned = np.split((s[:, None] * vh)[kept], len(deltas), axis=1)
    for part in aligned:
        part[np.abs(part) < np.sort(np.abs(part), axis=None)[-max(1, int(density * part.size))]] = 0
    sign = np.sign(np.sum(aligned, axis=0))
    agree = [np.where(np.sign(part) == sign, part, 0) for part in aligned]
    count = np.sum([part != 0 for part in agree], axis=0)
    return u[:, kept] @ (np.sum(agree, axis=0) / np.maximum(count, 1))


def svc(deltas: Sequence[Array], alpha: float = 0.1) -> Array:
    merged, *others = deltas
    u, s, vh = svd(merged)
    gammas = []
    for r in range(len(s)):
        rows = [u[:, r] @ delta for delta in others]
        shares = [max(alpha, u[:, r] @ merged @ row / (row @ row)) for row in rows]
        gammas.append(len(others) / sum(shares))
    return u * (np.array(gammas) * s) @ vh


def subspace_boosting(deltas: Sequence[Array], beta: float = 0.01) -> Array:
    u, s, vh = svd(deltas[0])
    place = np.flatnonzero(np.cumsum(s) / s.sum() >= beta)[0]
    return u * np.maximum(s, s[place]) @ vh


REFERENCES: Mapping[str, Callable[..., Array]] = {
    "iso_c": iso_c,
    "iso_cts": iso_cts,
    "tsv_m": tsv_m,
    "wudi": wudi,
    "knots": knots,
    "svc": svc,
    "subspace_boosting": subspace_boosting,
}
