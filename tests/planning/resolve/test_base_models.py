"""The role of `base_model` in each method, listed among the models or not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from streammerge.api import merge, plan
from tests.conftest import output_bytes, read_tensors

Make = Callable[..., list[Path]]


@pytest.fixture
def paths(make_models: Make) -> list[Path]:
    return make_models(shapes={"layers.0.w": (12, 8), "layers.1.w": (12, 8), "norm": (8,)})[:3]


def weighted(paths: list[Path], *weights: float) -> list[dict[str, Any]]:
    return [{"model": str(path), "parameters": {"weight": w}} for path, w in zip(paths, weights, strict=True)]


@pytest.mark.parametrize("normalize", [True, False])
def test_a_base_that_linear_does_not_list_is_one_more_model_with_the_weight_of_the_top(
    normalize: bool, paths: list[Path], tmp_path: Path
) -> None:
    base, a, b = paths
    config = {
        "merge_method": "linear",
        "base_model": str(base),
        "models": weighted([a, b], 0.6, 0.4),
        "dtype": "float32",
        "parameters": {"weight": 0.25, "normalize": normalize},
    }
    summary = merge(config, tmp_path / "out")
    assert any("takes part as one more" in warning for warning in summary.warnings)
    inputs = [read_tensors(path) for path in (a, b, base)]
    for name, found in read_tensors(tmp_path / "out").items():
        if not found.is_floating_point():
            continue
        total = sum(w * t[name].double() for w, t in zip((0.6, 0.4, 0.25), inputs, strict=True))
        wanted = (total / 1.25 if normalize else total).float()
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-7)


def test_a_base_that_linear_lists_has_its_own_weight_and_counts_once(
    paths: list[Path], tmp_path: Path
) -> None:
    listed = {"merge_method": "linear", "models": weighted(paths, 0.2, 0.5, 0.3), "dtype": "float32"}
    merge(listed, tmp_path / "plain")
    merge({**listed, "base_model": str(paths[0])}, tmp_path / "with")
    plain, found = (read_tensors(tmp_path / name) for name in ("plain", "with"))
    assert all(torch.equal(plain[name], found[name]) for name in plain)


def test_a_drop_before_linear_takes_the_base_for_differences_not_as_a_model(paths: list[Path]) -> None:
    config = {
        "merge_method": "linear",
        "base_model": str(paths[0]),
        "models": [{"model": str(p)} for p in paths[1:]],
        "parameters": {"drop_rate": 0.5},
    }
    jobs = [job for job in plan(config).jobs if job.kind == "merge"]
    assert {(job.n_models, job.base is not None) for job in jobs} == {(2, True)}


def test_a_base_that_slices_do_not_list_lends_its_config_alone(paths: list[Path], tmp_path: Path) -> None:
    part = {"sources": [{"model": str(paths[1]), "layer_range": [0, 2]}]}
    for method in ("linear", "passthrough"):
        config: dict[str, Any] = {"merge_method": method, "slices": [part, part]}
        merge(config, tmp_path / method)
        merge({**config, "base_model": str(paths[0])}, tmp_path / f"{method} with a base")
        name = "model.safetensors"
        assert output_bytes(tmp_path / method)[name] == output_bytes(tmp_path / f"{method} with a base")[name]
