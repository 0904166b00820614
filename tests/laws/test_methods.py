"""Laws that every registered method obeys, stated once."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from streammerge.api import merge
from streammerge.methods.catalog import load_builtin
from streammerge.methods.registry import all_methods, get_method
from streammerge.testing import laws
from streammerge.testing.models import write_models
from streammerge.testing.trial import Trial
from tests.conftest import config_for, read_tensors

load_builtin()
BUILTIN = [name for name, method in all_methods().items() if method.origin == "built in"]

# Parameter choices that reach every kind of statistic: none, tensor scope, model scope, several rounds.
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("linear", {}),
    ("linear", {"weight": 0.3, "normalize": False}),
    ("passthrough", {}),
    ("passthrough", {"scale": 0.5}),
    ("task_arithmetic", {"lambda": 0.7}),
    ("ties", {"density": 0.2}),
    ("ties", {"density": 0.3, "ties": "index", "zero_sign": "positive", "rescale": "l1"}),
    ("ties", {"density": 0.2, "trim_scope": "model"}),
    ("ties", {"density": 0.2, "trim_scope": "model", "ties": "index"}),
    ("ties", {"preset": "paper"}),
    ("ties", {"density": 0.4, "zero_sign": "majority", "ties": "drop", "weight": 0.3}),
    ("dare_linear", {"density": 0.1}),
    ("dare_linear", {"density": 0.5, "rescale": "l1", "normalize": True}),
    ("dare_ties", {"density": 0.3}),
    ("dare_ties", {"preset": "paper", "density": 0.5}),
    ("dare_ties", {"density": 0.5, "rescale": "l1"}),
    ("dare_linear", {"density": 0.3, "mask": "exact", "rescale": "l1"}),
    ("dare_ties", {"density": 0.3, "mask": "magnitude", "shared_mask": True}),
    ("fisher", {}),
    ("fisher", {"normalize": False, "floor": 0.0, "fallback": "average"}),
    ("fisher", {"preset": "mergelm", "floor": 1e-9}),
    ("fisher", {"drop_rate": 0.4, "drop_rescale": "l1"}),
    ("dare_fisher", {"density": 0.5}),
    ("regmean", {"alpha": 0.9}),
    ("dare_fisher", {"density": 0.5, "mask": "magnitude", "rescale": "none", "floor_on": "all"}),
    ("linear", {"drop_rate": 0.5, "shared_mask": True}),
    ("breadcrumbs", {"density": 0.5, "gamma": 0.1}),
    ("breadcrumbs", {"density": 0.5, "gamma": 0.1, "ties": "index", "rescale": "l1"}),
    ("breadcrumbs", {"density": 0.3, "gamma": 0.2, "ties": "all", "drop_rate": 0.2}),
    ("breadcrumbs_ties", {"density": 0.5, "gamma": 0.1, "ties": "drop", "zero_sign": "majority"}),
    ("della", {"density": 0.5}),
    ("della", {"density": 0.5, "epsilon": 0.3, "rescale": "l1", "zero_sign": "majority", "weight": 0.7}),
    ("della_linear", {"density": 0.3, "epsilon": 0.1, "lambda": 0.5}),
    ("della_linear", {"density": 0.3, "epsilon": 0.1, "rescale": "none", "normalize": True}),
    ("slerp", {"t": 0.4}),
    ("slerp", {"t": 0.4, "preset": "mergekit"}),
    ("nuslerp", {"weight": 0.5}),
    ("nuslerp", {"nuslerp_flatten": False}),
    ("nuslerp", {"nuslerp_flatten": False, "drop_rate": 0.3}),
    ("nuslerp", {"nuslerp_flatten": False, "nuslerp_row_wise": True}),
    ("nuslerp", {"nuslerp_flatten": False, "nuslerp_row_wise": True, "drop_rate": 0.3, "drop_rescale": "l1"}),
    ("multislerp", {}),
    ("multislerp", {"drop_rate": 0.5, "drop_rescale": "l1"}),
    ("karcher", {"max_iter": 5}),
    ("model_stock", {}),
    ("model_stock", {"filter_wise": True}),
    ("model_stock", {"filter_wise": True, "drop_rate": 0.3, "drop_mask": "exact"}),
    ("nearswap", {"t": 1e-4}),
    ("ram", {}),
    ("ramplus_tl", {"r": 0.5, "alpha": 1.0, "epsilon": 5e-4, "drop_rate": 0.5, "drop_rescale": "l1"}),
    ("consensus", {"k": 3, "drop_rate": 0.3}),
    ("emr", {}),
    ("pcb", {"ratio": 0.3}),
    ("iso_c", {}),
    ("iso_cts", {"drop_rate": 0.3}),
    ("tsv_m", {}),
    ("wudi", {"alpha": 0.9, "ridge": 0.1}),
    ("knots", {"density": 0.6}),
    ("svc", {}),
    ("subspace_boosting", {}),
    ("sce", {}),
    ("sce", {"select_topk": 0.3}),
    ("sce", {"select_topk": 0.5, "preset": "mergekit", "drop_rate": 0.3}),
    ("arcee_fusion", {}),
    ("arcee_fusion", {"drop_rate": 0.2, "drop_mask": "exact", "drop_rescale": "l1"}),
    ("passthrough", {"drop_rate": 0.9}),
    ("task_arithmetic", {"drop_rate": 0.5, "drop_mask": "exact", "lambda": 0.5}),
    ("ties", {"density": 0.3, "drop_rate": 0.5, "rescale": "l1", "zero_sign": "majority"}),
    ("ties", {"density": 0.3, "drop_rate": 0.2, "trim_scope": "model", "ties": "index"}),
]

SHAPES: dict[str, tuple[int, ...]] = {
    "model.embed_tokens.weight": (211, 64),
    "model.layers.0.self_attn.q_proj.weight": (41, 130),
    "model.layers.0.mlp.down_proj.weight": (37, 53),
    "model.layers.0.input_layernorm.weight": (64,),
    "conv.weight": (8, 3, 3, 3),
    "column": (67, 1),
    "scalar": (),
    "empty": (0, 5),
    "lm_head.weight": (150, 64),
}
"""Shapes that a model has, and odd ones; the largest are cut into tens of pieces, by rows into hundreds.

With the least memory a method of rows makes a piece of each row, so the number of rows is what these laws cost.
"""

BY_ELEMENTS = [one for one in VARIANTS if not get_method(one[0]).matrices or one[0] == "iso_c"]
"""All but methods of whole matrices: torch decomposes these in every case, and ties mean nothing to them."""


def test_every_builtin_method_has_a_variant() -> None:
    assert {name for name, _ in VARIANTS} == set(BUILTIN)


@pytest.fixture(scope="module")
def shared_models(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[Path]]:
    """Return what writes models once for each choice of dtype and spread, with the stores that methods add to them."""
    written: dict[str, list[Path]] = {}

    def get(**models: Any) -> list[Path]:
        key = repr(sorted(models.items()))
        if key not in written:
            written[key] = write_models(tmp_path_factory.mktemp("shared"), shapes=SHAPES, **models)
        return written[key]

    return get


@pytest.fixture
def make_trial(
    tmp_path: Path, shared_models: Callable[..., list[Path]], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Trial]:
    """Return what makes a trial of a method over shared models."""
    for name in ("fsync", "fdatasync"):
        monkeypatch.setattr(os, name, lambda descriptor: None)
    (tmp_path / "out").mkdir()

    def make(method: str, parameters: dict[str, Any], **models: Any) -> Trial:
        config = config_for(method, shared_models(**models), parameters=parameters, seed=7)
        return Trial(get_method(method), config, tmp_path / "out")

    return make


@pytest.mark.parametrize(
    ("method", "parameters", "spread"),
    [(*one, 1e-3) for one in VARIANTS] + [(*one, 1e-4) for one in BY_ELEMENTS],
)
def test_bytes_do_not_depend_on_memory_threads_or_shards_of_work(
    method: str, parameters: dict[str, Any], spread: float, make_trial: Callable[..., Trial]
) -> None:
    laws.same_bytes_at_any_memory(make_trial(method, parameters, spread=spread))


@pytest.mark.parametrize(("method", "parameters"), BY_ELEMENTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_kernels_and_torch_formulas_agree_bit_for_bit(
    method: str, parameters: dict[str, Any], dtype: torch.dtype, make_trial: Callable[..., Trial]
) -> None:
    laws.same_bytes_in_torch(make_trial(method, parameters, dtype=dtype, spread=2e-4))


@pytest.mark.parametrize(("method", "parameters"), VARIANTS)
def test_merges_that_are_interrupted_and_plans_that_travel_give_the_same_and_shapes_are_kept(
    method: str, parameters: dict[str, Any], make_trial: Callable[..., Trial]
) -> None:
    trial = make_trial(method, parameters)
    laws.plans_travel(trial)
    laws.shapes_and_dtypes_are_kept(trial)
    laws.same_bytes_when_interrupted(trial)


# One model beside the base, a threshold below which a delta is none, or a base that is averaged in.
NO_MEAN = ("passthrough", "slerp", "nearswap", "ram", "ramplus_tl", "karcher", "arcee_fusion")
# Only winners change; singular values that are cut, equal or raised; a first model that is the merge of the others.
NO_MEAN += ("pcb", "iso_c", "iso_cts", "tsv_m", "svc", "subspace_boosting")


@pytest.mark.parametrize("method", [m for m in BUILTIN if m not in NO_MEAN])
def test_identical_models_merge_to_that_model(
    method: str, make_models: Callable[..., list[Path]], tmp_path: Path
) -> None:
    base, tuned = make_models(n_models=1)
    parameters: dict[str, Any] = {}
    if "normalize" in get_method(method).parameters:
        parameters["normalize"] = True
    if method == "consensus":  # a sum
        parameters["lambda"] = 0.5
    config = config_for(method, [base, tuned], parameters=parameters)
    config["models"] = [config["models"][0] | {"alias": name} for name in ("one", "two")]
    merge(config, tmp_path / "out", memory="1GiB")
    merged, expected = read_tensors(tmp_path / "out"), read_tensors(tuned)
    assert all(torch.equal(merged[name], expected[name]) for name in expected)


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "dare_linear", "dare_ties"])
def test_lambda_zero_gives_the_base(
    method: str, make_models: Callable[..., list[Path]], tmp_path: Path
) -> None:
    paths = make_models()
    merge(
        config_for(method, paths, parameters={"lambda": 0.0, "density": 0.5}), tmp_path / "out", memory="1GiB"
    )
    merged, base = read_tensors(tmp_path / "out"), read_tensors(paths[0])
    assert all(torch.equal(merged[name], base[name]) for name in base)


@pytest.mark.parametrize(
    "method",
    [m for m in BUILTIN if get_method(m).n_models[1] != 1 and m not in ("svc", "subspace_boosting")],
)
def test_the_order_of_the_models_matters_only_to_summation(
    method: str, make_models: Callable[..., list[Path]], tmp_path: Path
) -> None:
    base, *models = make_models(dtype=torch.float32)
    # With a floor on the target alone the first model is special: here every model has one.
    parameters: dict[str, Any] = {"floor_on": "all"} if "fisher" in method else {}
    if "lambda" in get_method(method).parameters:
        parameters["lambda"] = 0.5
    if "ties" in method or "dare" in method:
        parameters["density"] = 0.3
    models = models[: get_method(method).n_models[1]]
    merge(config_for(method, [base, *models], parameters=parameters), tmp_path / "a", memory="1GiB")
    merge(config_for(method, [base, *models[::-1]], parameters=parameters), tmp_path / "b", memory="1GiB")
    first, second = read_tensors(tmp_path / "a"), read_tensors(tmp_path / "b")
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=2e-7, atol=1e-12)
