"""Consensus task arithmetic, EMR and LiNeS against plain float64 references, and by hand."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from streammerge.api import merge, plan
from streammerge.errors import ConfigError
from tests.conftest import as_float64, config_for, read_tensors, write_model
from tests.methods.by_hand import BASE, DELTAS, call, follow

Array = np.ndarray
WEIGHTS = (1.0, -0.5, 0.75)


def consensus(deltas: Sequence[Array], k: int = 2, lambda_mask: float = 0.4) -> Array:
    total = np.sum(deltas, axis=0)
    masks = [np.abs(delta) > lambda_mask * np.abs(total - delta) for delta in deltas]
    return np.where(np.sum(masks, axis=0) >= k, total, 0.0)


def emr(deltas: Sequence[Array]) -> Array:
    sign = np.sign(np.sum(deltas, axis=0))
    return sign * np.max([np.where(np.sign(delta) == sign, np.abs(delta), 0.0) for delta in deltas], axis=0)


def pcb(deltas: Sequence[Mapping[str, Array]], ratio: float = 0.1) -> dict[str, Array]:
    """The published code on whole flat vectors, with the clamped entries in the product too."""
    flat = np.stack([np.concatenate([part.ravel() for part in one.values()]) for one in deltas])
    n, d = flat.shape
    ordered = np.sort(np.abs(flat).astype(np.float32), axis=1).astype(float)
    low, high = ordered[:, int(d * 1e-4), None], ordered[:, int(d * (1 - 1e-4)) - 1, None]
    sizes = np.clip(np.abs(flat), low, high)
    held = np.sign(flat) * sizes
    scores = np.exp(n * (((sizes - low) / (high - low)) ** 2 - 1)) * np.tanh(held * held.sum(axis=0))
    scores = scores.astype(np.float32).astype(float)
    ranked = np.sort(scores, axis=1)
    threshold, top = ranked[:, int(d * (1 - ratio)), None], ranked[:, -1:]
    weights = (np.maximum(scores, threshold) - threshold) / (top - threshold)
    merged = (held * weights).sum(axis=0) / np.maximum(weights.sum(axis=0), 1e-12)
    ends = np.cumsum([part.size for part in deltas[0].values()])[:-1]
    parts = zip(deltas[0].items(), np.split(merged, ends), strict=True)
    return {name: part.reshape(like.shape) for (name, like), part in parts}


REFERENCES: Mapping[str, Callable[..., Array]] = {"consensus": consensus, "emr": emr}


@pytest.mark.parametrize(
    ("method", "parameters"), [("consensus", {}), ("consensus", {"k": 1, "lambda_mask": 0.9}), ("emr", {})]
)
def test_votes_equal_the_reference(
    method: str, parameters: dict[str, Any], make_models: Callable[..., list[Path]], tmp_path: Path
) -> None:
    paths = make_models(dtype=torch.float32)
    models = [
        {"model": str(path), "parameters": {"weight": weight}}
        for path, weight in zip(paths[1:], WEIGHTS, strict=True)
    ]
    config = config_for(method, paths, models=models, parameters={**parameters, "lambda": 0.7})
    merge(config, tmp_path / "out", memory="1GiB")
    merged, base, *tuned = map(as_float64, (tmp_path / "out", *paths))
    for name, theta_0 in base.items():
        pairs = zip(WEIGHTS, tuned, strict=True)
        deltas = [
            w * (m[name].astype(np.float32) - theta_0.astype(np.float32)).astype(float) for w, m in pairs
        ]
        expected = theta_0 + 0.7 * REFERENCES[method](deltas, **parameters)
        np.testing.assert_allclose(merged[name], expected, rtol=2e-7, atol=0)


def test_pcb_equals_the_reference_over_the_whole_model(
    make_models: Callable[..., list[Path]], small_capacity: Callable[[int, int], None], tmp_path: Path
) -> None:
    paths = make_models(dtype=torch.float32, spread=0.1)
    models = [
        {"model": str(path), "parameters": {"weight": [{"filter": "embed", "value": 2 * w}, {"value": w}]}}
        for path, w in zip(paths[1:], WEIGHTS, strict=True)
    ]
    small_capacity(1 << 19, 3)
    merge(
        config_for("pcb", paths, models=models, parameters={"ratio": 0.3}), tmp_path / "out", progress=False
    )
    merged, base, *tuned = map(as_float64, (tmp_path / "out", *paths))
    deltas = [
        {
            name: w
            * (2 if "embed" in name else 1)
            * (m[name].astype(np.float32) - base[name].astype(np.float32))
            for name in base
        }
        for w, m in zip(WEIGHTS, tuned, strict=True)
    ]
    expected = pcb([{name: part.astype(float) for name, part in one.items()} for one in deltas], 0.3)
    won = 0
    for name, tau in expected.items():
        np.testing.assert_allclose(merged[name], base[name] + tau, rtol=2e-7, atol=1e-5 * np.abs(tau).max())
        won += np.count_nonzero(tau)
    assert 0.3 < won / sum(tau.size for tau in expected.values()) < 0.9


def test_pcb_of_models_that_did_not_change_is_the_base(
    make_models: Callable[..., list[Path]], tmp_path: Path
) -> None:
    base, tuned = make_models(n_models=1)
    same = write_model(tmp_path / "same", read_tensors(base))
    for name, models in (("none", [same, same]), ("one", [same, tuned])):
        listed = [{"model": str(path), "alias": str(i)} for i, path in enumerate(models)]
        merge(config_for("pcb", [base], models=listed), tmp_path / name, memory="1GiB", progress=False)
    unchanged, merged = read_tensors(tmp_path / "none"), read_tensors(tmp_path / "one")
    expected, changed = read_tensors(base), read_tensors(tuned)
    assert all(torch.equal(unchanged[name], tensor) for name, tensor in expected.items())
    assert any(not torch.equal(merged[name], tensor) for name, tensor in expected.items())
    for name, tensor in expected.items():
        assert (merged[name] - tensor).abs().max() <= (changed[name] - tensor).abs().max()


def test_votes_by_hand_and_non_finite_values_show() -> None:
    # Sums -0.25, 0.375, 0.25, -0.1875; the elements are needed by 3, 2 (0.25 is not above 0.4 * 0.625), 2 and 2 models.
    assert call(follow("consensus", 3), DELTAS) == [0.75, 2.375, 3.25, 3.8125]
    assert call(follow("consensus", 3, k=3), DELTAS) == [0.75, 2.0, 3.0, 4.0]
    assert call(follow("emr", 3), DELTAS) == [0.0, 2.5, 3.25, 3.0]
    for value in (math.inf, math.nan):
        broken = [[value, *DELTAS[0][1:]], *DELTAS[1:]]
        for method in REFERENCES:
            assert not math.isfinite(call(follow(method, 3), broken, BASE)[0])


def test_lines_scales_the_task_vectors_of_each_layer_and_takes_alpha_outside(
    make_models: Callable[..., list[Path]], tmp_path: Path
) -> None:
    paths = make_models(dtype=torch.float32)
    config = config_for("task_arithmetic", paths, parameters={"lambda": 0.5})
    merge({**config, "lines": {"alpha": 0.25, "beta": 0.5}}, tmp_path / "out", memory="1GiB")
    merged, base, *tuned = map(as_float64, (tmp_path / "out", *paths))
    for name, theta_0 in base.items():
        scale = 0.5 * (0.75 if "layers.1." in name else 0.25)
        total = sum((m[name].astype(np.float32) - theta_0.astype(np.float32)).astype(float) for m in tuned)
        np.testing.assert_allclose(merged[name], theta_0 + scale * total, rtol=2e-7, atol=0)


@pytest.mark.parametrize(
    ("method", "n_models", "parameters"),
    [
        ("sce", 3, {"select_topk": 0.3}),
        ("ram", 3, {}),
        ("ramplus_tl", 2, {"drop_rate": 0.5}),
        ("model_stock", 2, {}),
        ("nearswap", 1, {"t": 1e-3}),  # a plain formula
        ("slerp", 1, {"t": 0.3}),
        ("nuslerp", 2, {"weight": 0.5, "nuslerp_flatten": False}),
        ("nuslerp", 2, {"weight": 0.5, "nuslerp_flatten": False, "nuslerp_row_wise": True}),
    ],
)
def test_lines_scales_the_result_of_a_method_without_a_factor_of_its_own(
    method: str,
    n_models: int,
    parameters: dict[str, Any],
    make_models: Callable[..., list[Path]],
    tmp_path: Path,
) -> None:
    paths = make_models(n_models=n_models, dtype=torch.float32)
    config = config_for(method, paths, parameters=parameters)
    for out, lines in (("plain", (1.0, 0.0)), ("lines", (0.25, 0.5)), ("nothing", (0.0, 0.0))):
        given = {"lines": dict(zip(("alpha", "beta"), lines, strict=True))}
        merge({**config, **given}, tmp_path / out, memory="1GiB")
    merge(config, tmp_path / "without", memory="1GiB")
    outs = [tmp_path / name for name in ("plain", "without", "lines", "nothing")]
    plain, without, merged, nothing, base = map(as_float64, (*outs, paths[0]))
    assert any((plain[name] != base[name]).any() for name in base)
    for name, theta_0 in base.items():
        scale = 0.75 if "layers.1." in name else 0.25
        wanted = theta_0 + scale * (plain[name] - theta_0)
        np.testing.assert_allclose(merged[name], wanted, rtol=2e-7, atol=1e-9)
        np.testing.assert_array_equal(plain[name], without[name])
        np.testing.assert_array_equal(nothing[name], theta_0)


@pytest.mark.parametrize(
    ("method", "lines", "message"),
    [
        ("linear", {"alpha": 1, "beta": 0}, "'linear' merges models, not task vectors"),
        ("ties", 0.5, "must be a map of two numbers"),
        ("ties", {"alpha": 1}, "'beta' is missing"),
        ("ties", {"alpha": 1, "beta": float("nan")}, "not a finite number"),
        ("ties", {"alpha": 1, "beta": 1, "gamma": 1}, "unknown"),
    ],
)
def test_lines_that_mean_nothing_are_refused(
    method: str, lines: object, message: str, make_models: Callable[..., list[Path]]
) -> None:
    with pytest.raises(ConfigError, match=message):
        plan({**config_for(method, make_models(n_models=1)), "lines": lines})
