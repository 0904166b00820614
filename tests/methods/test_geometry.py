"""The geometric methods against float64 references that compute with the vectors themselves, not in Gram space."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from streammerge.api import merge
from streammerge.errors import ConfigError
from streammerge.methods.gram_space import arc, cosines
from streammerge.methods.papers.karcher import sphere_mean
from streammerge.methods.papers.model_stock import towards_mean
from streammerge.methods.papers.multislerp import mean_direction
from tests.conftest import as_float64, config_for
from tests.methods import reference

Array = np.ndarray
SHAPES = {"a.weight": (90, 130), "b.weight": (3, 37, 11), "c.norm": (4097,), "d.scalar": ()}


def slerp(a: Array, b: Array, t: float) -> Array:
    """Shoemake's formula on flat vectors."""
    cosine = a @ b / (math.sqrt(a @ a) * math.sqrt(b @ b))
    angle = math.acos(max(-1.0, min(1.0, cosine)))
    if math.sin(angle) < 1e-8:
        return (1 - t) * a + t * b
    return (math.sin((1 - t) * angle) * a + math.sin(t * angle) * b) / math.sin(angle)


def multislerp(vectors: Sequence[Array], weights: Sequence[float]) -> Array:
    """mergekit's algorithm step by step, the tangent step included."""
    w = np.array(weights) / sum(weights)
    units = [v / np.linalg.norm(v) for v in vectors]
    mean = sum(wi * u for wi, u in zip(w, units, strict=True))
    m = mean / np.linalg.norm(mean)
    tangent = sum(wi * (u - (u @ m) * m) for wi, u in zip(w, units, strict=True))
    step = np.linalg.norm(tangent) + 1e-30
    point = m * math.cos(step) + tangent * math.sin(step) / step
    return point * sum(wi * np.linalg.norm(v) for wi, v in zip(w, vectors, strict=True))


def karcher(vectors: Sequence[Array], max_iter: int = 10, tol: float = 1e-5) -> Array:
    """Riemannian gradient steps on the sphere, with the vectors themselves."""
    units = [v / np.linalg.norm(v) for v in vectors]
    a = 1 / len(units)
    u = sum(units) / np.linalg.norm(sum(units))
    for _ in range(max_iter):
        step = np.zeros_like(u)
        for unit in units:
            cosine = min(1.0, max(-1.0, float(u @ unit)))
            angle = math.acos(cosine)
            if angle >= tol:
                step += a * angle / math.sin(angle) * (unit - cosine * u)
        length = float(np.linalg.norm(step))
        if length < tol:
            break
        u = math.cos(length) * u + math.sin(length) * step / length
        u = u / np.linalg.norm(u)
    return u * sum(a * np.linalg.norm(v) for v in vectors)


def model_stock(base: Array, thetas: Sequence[Array]) -> Array:
    deltas = [delta(theta, base) for theta in thetas]
    n, norms = len(deltas), [np.linalg.norm(d) for d in deltas]
    pairs = [
        deltas[i] @ deltas[j] / (norms[i] * norms[j]) if norms[i] * norms[j] else 0.0
        for i in range(n)
        for j in range(i)
    ]
    c = sum(pairs) / len(pairs)
    pole = 1 + (n - 1) * c
    t = n * c / pole if abs(pole) > 1e-12 else 0.0  # rows of one element with deltas of both signs
    return base + t * sum(deltas) / n


def nearswap(base: Array, theta: Array, t: float) -> Array:
    weight = np.clip(t / np.maximum(np.abs(base - theta), 1e-6), 0, 1)
    return weight * theta + (1 - weight) * base


def ram(base: Array, thetas: Sequence[Array], epsilon: float) -> Array:
    out = base.copy()
    for e in range(base.size):
        deltas = [float(delta(theta[e], base[e])) for theta in thetas]
        touching = [d for d in deltas if abs(d) > epsilon]
        if touching:
            out[e] += sum(touching) / len(touching)
    return out


def ramplus(base: Array, thetas: Sequence[Array], r: float, alpha: float, epsilon: float) -> Array:
    deltas = np.stack([delta(theta, base) for theta in thetas])
    touched = np.abs(deltas) > epsilon
    count = touched.sum(axis=0)
    shared, unique = ((touched & which).sum(axis=1) for which in (count > 1, count == 1))
    factor = [1 + r * min(s / u, alpha) if u else 1.0 for s, u in zip(shared, unique, strict=True)]
    return base + sum(
        np.where(t & (count == 1), f * d, np.where(t, d / np.maximum(count, 1), 0.0))
        for f, d, t in zip(factor, deltas, touched, strict=True)
    )


def by_columns(function: Callable[..., Array], *tensors: Array) -> Array:
    """Apply a function of flat vectors along the first axis, at every place of the others by itself."""
    length = tensors[0].shape[0] if tensors[0].ndim else 1
    columns = [tensor.reshape(length, -1) for tensor in tensors]
    merged = [function(*(column[:, j] for column in columns)) for j in range(columns[0].shape[1])]
    return np.stack(merged, axis=1).reshape(tensors[0].shape)


def by_rows(function: Callable[..., Array], *tensors: Array) -> Array:
    """Apply a function of flat vectors to each row by itself."""
    length = tensors[0].shape[-1] if tensors[0].ndim else 1
    rows = [tensor.reshape(-1, length) for tensor in tensors]
    return np.stack([function(*(row[i] for row in rows)) for i in range(len(rows[0]))]).reshape(
        tensors[0].shape
    )


def flat(function: Callable[..., Array], *tensors: Array) -> Array:
    return function(*(tensor.ravel() for tensor in tensors)).reshape(tensors[0].shape)


Reference = Callable[..., Array]
CASES: dict[str, tuple[str, dict[str, Any], bool, int, Reference]] = {
    # method, parameters, whether there is a base, number of models, reference(base, *models)
    "slerp": ("slerp", {"t": 0.35}, True, 1, lambda b, x: flat(lambda b, x: slerp(b, x, 0.35), b, x)),
    "slerp beyond": ("slerp", {"t": 1.2}, True, 1, lambda b, x: flat(lambda b, x: slerp(b, x, 1.2), b, x)),
    "slerp, mergekit's line": (
        "slerp", {"t": 0.35, "preset": "mergekit"}, True, 1, lambda b, x: 0.65 * b + 0.35 * x,
    ),
    "nuslerp": (
        "nuslerp", {"weight": [0.6, 0.4]}, False, 2, lambda x, y: flat(lambda x, y: slerp(x, y, 0.4), x, y),
    ),
    "nuslerp, weights that cancel": (
        "nuslerp", {"weight": [-0.5, 0.5]}, False, 2, lambda x, y: flat(lambda x, y: slerp(x, y, 0.5), x, y),
    ),
    "nuslerp of task vectors": (
        "nuslerp", {"weight": [1.0, 3.0]}, True, 2,
        lambda b, x, y: b + flat(lambda x, y: slerp(x, y, 0.75), delta(x, b), delta(y, b)),
    ),
    "nuslerp by rows": (
        "nuslerp", {"weight": [0.5, 0.5], "nuslerp_flatten": False}, False, 2,
        lambda x, y: by_rows(lambda x, y: slerp(x, y, 0.5), x, y),
    ),
    "nuslerp of task vectors by rows": (
        "nuslerp", {"weight": [0.5, 0.25], "nuslerp_flatten": False}, True, 2,
        lambda b, x, y: b + by_rows(lambda x, y: slerp(x, y, 1 / 3), delta(x, b), delta(y, b)),
    ),
    "nuslerp by columns": (
        "nuslerp", {"weight": [0.5, 0.5], "nuslerp_flatten": False, "nuslerp_row_wise": True}, False, 2,
        lambda x, y: by_columns(lambda x, y: slerp(x, y, 0.5), x, y),
    ),
    "nuslerp of task vectors by columns": (
        "nuslerp", {"weight": [0.5, 0.25], "nuslerp_flatten": False, "nuslerp_row_wise": True}, True, 2,
        lambda b, x, y: b + by_columns(lambda x, y: slerp(x, y, 1 / 3), delta(x, b), delta(y, b)),
    ),
    "multislerp": (
        "multislerp", {"weight": [1.0, 0.5, 0.75]}, False, 3,
        lambda *x: flat(lambda *x: multislerp(x, (1.0, 0.5, 0.75)), *x),
    ),
    "multislerp of task vectors": (
        "multislerp", {"weight": [1.0, 0.5, 0.75]}, True, 3,
        lambda b, *x: b + flat(lambda *x: multislerp(x, (1.0, 0.5, 0.75)), *(delta(y, b) for y in x)),
    ),
    "multislerp of one": ("multislerp", {}, False, 1, lambda x: x),
    "karcher": ("karcher", {}, False, 3, lambda *x: flat(lambda *x: karcher(x), *x)),
    "karcher with a base": ("karcher", {}, True, 2, lambda b, x, y: flat(lambda *x: karcher(x), x, y, b)),
    "model_stock": ("model_stock", {}, True, 3, lambda b, *x: flat(lambda b, *x: model_stock(b, x), b, *x)),
    "model_stock by rows": (
        "model_stock", {"filter_wise": True}, True, 2,
        lambda b, *x: by_rows(lambda b, *x: model_stock(b, x), b, *x),
    ),
    "nearswap": ("nearswap", {"t": 1e-4}, True, 1, lambda b, x: nearswap(b, x, 1e-4)),
    "ram": ("ram", {"epsilon": 1e-3}, True, 3, lambda b, *x: flat(lambda b, *x: ram(b, x, 1e-3), b, *x)),
    "ramplus_tl": (
        "ramplus_tl", {"r": 0.5, "alpha": 0.9, "epsilon": 1e-3}, True, 3,
        lambda b, *x: flat(lambda b, *x: ramplus(b, x, 0.5, 0.9, 1e-3), b, *x),
    ),
    "ramplus_tl, what it shares far more than what it has alone": (
        "ramplus_tl", {"epsilon": 1e-5}, True, 3,
        lambda b, *x: flat(lambda b, *x: ramplus(b, x, 0.1, 0.2, 1e-5), b, *x),
    ),
}  # fmt: skip


def delta(theta: Array, base: Array) -> Array:
    """The task vector as the product takes it: one fp32 subtraction."""
    return (theta.astype(np.float32) - base.astype(np.float32)).astype(np.float64)


def run(
    case: str, paths: Sequence[Path], out: Path, **more: Any
) -> tuple[dict[str, Array], dict[str, Array]]:
    method, parameters, based, n, expected = CASES[case]
    parameters = dict(parameters)
    weights = parameters.pop("weight", [None] * n)
    models = [
        {"model": str(path), **({} if weight is None else {"parameters": {"weight": weight}})}
        for path, weight in zip(paths[1 : n + 1], weights, strict=True)
    ]
    config = {"merge_method": method, "models": models, "parameters": parameters}
    if based:
        config["base_model"] = str(paths[0])
    merge(config, out, memory="1GiB", **more)
    inputs = [as_float64(path) for path in (paths[: n + 1] if based else paths[1 : n + 1])]
    return as_float64(out), {name: expected(*(tensors[name] for tensors in inputs)) for name in inputs[0]}


@pytest.mark.parametrize("case", list(CASES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("spread", [0.02, 1e-3], ids=["far apart", "close"])
def test_a_merge_is_the_reference_rounded_once(
    case: str, dtype: torch.dtype, spread: float, make_models: Callable[..., list[Path]], tmp_path: Path
) -> None:
    if "line" in case:
        spread = 2e-4  # a cosine of 0.9999
    paths = make_models(dtype=dtype, spread=spread, shapes=SHAPES)
    merged, expected = run(case, paths, tmp_path / "out")
    for name, values in expected.items():
        size = np.maximum(np.abs(values), np.abs(as_float64(paths[0])[name]))
        # Angles of nearly parallel vectors are known to some 1e-8 of themselves, and their effect to far less.
        bound = 0.51 if dtype is not torch.float32 else 0.75
        assert (
            reference.ulp_error(merged[name], values, size, str(dtype).removeprefix("torch.")).max() <= bound
        ), name


def test_slerp_ends_at_its_models(make_models: Callable[..., list[Path]], tmp_path: Path) -> None:
    base, model = make_models(n_models=1)
    for t, end in ((0.0, base), (1.0, model)):
        merge(config_for("slerp", [base, model], parameters={"t": t}), tmp_path / f"{t}")
        merged, expected = as_float64(tmp_path / f"{t}"), as_float64(end)
        assert all(np.array_equal(merged[name], expected[name]) for name in expected)


def test_vectors_of_length_zero_have_no_angle() -> None:
    gram = np.array([[[0.0, 0.0], [0.0, 4.0]]])
    assert cosines(gram)[0, 0, 1] == 0.0
    assert np.isfinite(arc(gram, t=0.5)).all()
    assert mean_direction(gram, weights=(0.5, 0.5), eps=1e-8)[0].tolist() == [0.0, 0.5]
    assert sphere_mean(gram, weights=(0.5, 0.5), max_iter=10, tol=1e-5)[0].tolist() == [0.0, 0.5]
    assert towards_mean(gram, clamp=False).tolist() == [[0.0, 0.0]]


def test_models_apart_by_half_a_circle_go_by_the_straight_line() -> None:
    gram = np.array([[[1.0, -1.0], [-1.0, 1.0]]])
    assert arc(gram, t=0.25)[0].tolist() == [0.75, 0.25]


def test_model_stock_stays_at_its_pole_and_can_be_held_to_the_models_side() -> None:
    """Three task vectors at 120 degrees: c = -1/2, where t has its pole; and c = -1/4, where t is negative."""
    pole = np.full((1, 3, 3), -0.5) + 1.5 * np.eye(3)
    assert towards_mean(pole, clamp=False).tolist() == [[0.0, 0.0, 0.0]]
    apart = np.full((1, 3, 3), -0.25) + 1.25 * np.eye(3)
    assert towards_mean(apart, clamp=False)[0, 0] == pytest.approx(-0.75 / 0.5 / 3)
    assert towards_mean(apart, clamp=True)[0, 0] == 0.0


def test_directions_that_cancel_give_the_weighted_sum() -> None:
    two = np.array([[[1.0, -1.0], [-1.0, 1.0]]])
    assert mean_direction(two, weights=(0.5, 0.5), eps=1e-8)[0].tolist() == [0.5, 0.5]
    three = np.full((1, 3, 3), -0.5) + 1.5 * np.eye(3)
    assert mean_direction(three, weights=(0.25, 0.25, 0.25), eps=1e-8)[0].tolist() == [0.25, 0.25, 0.25]


@pytest.mark.parametrize(
    ("method", "parameters", "words"),
    [
        ("slerp", {}, "'t' is missing"),
        ("nearswap", {}, "'t' is missing"),
        ("karcher", {"weight": -1.0}, "weights of 0 or more"),
        ("multislerp", {"weight": 0.0}, "the weights sum to 0"),
        ("ramplus_tl", {"alpha": -1.0}, r"is outside the range \[0, inf\]"),
    ],
)
def test_a_wrong_config_is_refused(
    method: str,
    parameters: dict[str, Any],
    words: str,
    make_models: Callable[..., list[Path]],
    tmp_path: Path,
) -> None:
    config = config_for(method, make_models(), parameters=parameters)
    with pytest.raises(ConfigError, match=words):
        merge(config, tmp_path / "out")
