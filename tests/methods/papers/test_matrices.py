"""The methods of whole matrices against float64 references, and the properties that make them right."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file

from streammerge.api import merge, plan
from streammerge.errors import BudgetError, ConfigError
from streammerge.methods.papers.iso import isotropic, isotropic_by_task
from streammerge.methods.papers.knots import aligned_ties
from streammerge.methods.papers.subspace_boosting import boosted
from streammerge.methods.papers.svc import calibrated
from streammerge.methods.papers.tsv import task_singular_vectors
from streammerge.methods.papers.wudi import least_interference
from streammerge.methods.registry import get_method
from streammerge.testing import laws
from streammerge.testing.models import write_models
from streammerge.testing.trial import Trial
from tests.conftest import as_float64, config_for, read_tensors, write_model
from tests.methods.papers.matrix_references import REFERENCES

Array = np.ndarray
WEIGHTS = (1.0, 0.5, -0.75)
SHAPES = {
    "model.embed_tokens.weight": (80, 24),
    "model.layers.0.mlp.up_proj.weight": (61, 24),
    "model.layers.0.mlp.down_proj.weight": (24, 61),
    "model.layers.1.self_attn.q_proj.weight": (24, 24),
    "model.layers.1.mlp.experts.down_proj": (3, 10, 17),
    "model.layers.1.input_layernorm.weight": (24,),
    "lm_head.weight": (80, 24),
}
MATRICES = [name for name in SHAPES if "_proj" in name]
CASES: list[tuple[str, dict[str, Any]]] = [
    ("iso_c", {}),
    ("iso_cts", {"common_fraction": 0.5}),
    ("tsv_m", {}),
    ("wudi", {}),
    ("wudi", {"alpha": 0.9, "ridge": 0.01}),
    ("knots", {}),
    ("knots", {"density": 0.4}),
    ("svc", {}),
    ("subspace_boosting", {"beta": 0.5}),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_models(tmp_path_factory.mktemp("models"), dtype=torch.float32, shapes=SHAPES)


class Given(list[torch.Tensor]):
    """Matrices that a method of matrices is called on."""

    def __init__(self, matrices: Sequence[Array]) -> None:
        super().__init__(torch.from_numpy(np.array(one, dtype=np.float64)) for one in matrices)

    @property
    def shape(self) -> tuple[int, int]:
        return tuple(super().__getitem__(0).shape)  # type: ignore[return-value]

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def __getitem__(self, model: Any) -> Any:
        return super().__getitem__(model).clone()


@pytest.mark.parametrize(("method", "parameters"), CASES)
def test_matrices_equal_the_reference_and_the_rest_takes_the_mean(
    method: str, parameters: dict[str, Any], models: list[Path], tmp_path: Path
) -> None:
    listed = [
        {"model": str(path), "parameters": {"weight": weight}}
        for path, weight in zip(models[1:], WEIGHTS, strict=True)
    ]
    merge(
        config_for(method, models, models=listed, parameters={**parameters, "lambda": 0.5}, dtype="float64"),
        tmp_path / "out",
        memory="1GiB",
        progress=False,
    )
    merged, base, *tuned = map(as_float64, (tmp_path / "out", *models))
    given = {"fraction" if name == "common_fraction" else name: value for name, value in parameters.items()}
    for name, theta_0 in base.items():
        deltas = [w * (m[name] - theta_0) for w, m in zip(WEIGHTS, tuned, strict=True)]
        if name in MATRICES:
            slices = zip(*(np.reshape(d, (-1, *theta_0.shape[-2:])) for d in deltas), strict=True)
            expected = np.reshape([REFERENCES[method](one, **given) for one in slices], theta_0.shape)
        else:
            expected = deltas[0] if method in ("svc", "subspace_boosting") else np.mean(deltas, axis=0)
        error = np.linalg.norm(merged[name] - theta_0 - 0.5 * expected)
        assert error <= (1e-10 if name in MATRICES else 1e-5) * np.linalg.norm(expected), name


def test_iso_has_equal_singular_values_and_tsv_those_of_all_models() -> None:
    draw = np.random.default_rng(0)
    deltas = [draw.standard_normal((40, 30)) for _ in range(3)]
    for merged in (isotropic(Given(deltas)), isotropic_by_task(Given(deltas), fraction=0.8)):
        values = np.linalg.svd(merged.numpy(), compute_uv=False)
        np.testing.assert_allclose(values, values[0], rtol=1e-10)
    kept = np.concatenate([np.linalg.svd(delta, compute_uv=False)[:10] for delta in deltas])
    values = np.linalg.svd(task_singular_vectors(Given(deltas)).numpy(), compute_uv=False)
    np.testing.assert_allclose(values, -np.sort(-kept), rtol=1e-10)


def test_rank_deficient_sums_stay_within_their_rank_and_nothing_changes_nothing() -> None:
    draw = np.random.default_rng(1)
    left, right = draw.standard_normal((40, 4)), draw.standard_normal((4, 30))
    low, nothing = left @ right, np.zeros((40, 30))
    values = np.linalg.svd(isotropic(Given([low, nothing])).numpy(), compute_uv=False)
    mean = np.linalg.svd(low, compute_uv=False).sum() / 30
    np.testing.assert_allclose(values, [mean] * 4 + [0.0] * 26, rtol=1e-10, atol=1e-12)
    # An unchanged model leaves KnOTS and WUDI's other model as it is, and identical models give that model.
    for others in ([nothing], [low]):
        for merge_of in (
            lambda some: aligned_ties(some, densities=(1.0, 1.0)),
            lambda some: least_interference(some, alpha=1.0, ridge=0.0),
        ):
            np.testing.assert_allclose(merge_of(Given([low, *others])).numpy(), low, rtol=0, atol=1e-11)
    # Identical models have the same vectors: half of the values each, along the same directions.
    twice = task_singular_vectors(Given([low, low])).numpy()
    np.testing.assert_allclose(twice, low, rtol=0, atol=1e-11)
    # A merge that is the sum of the models contains each once; what an unchanged model has is not counted.
    other = draw.standard_normal((40, 30))
    np.testing.assert_allclose(
        calibrated(Given([low, low, nothing]), alpha=0.1).numpy(), low, rtol=0, atol=1e-11
    )
    np.testing.assert_allclose(calibrated(Given([nothing, other]), alpha=0.1).numpy(), nothing)
    for merged in (
        isotropic(Given([nothing] * 2)),
        isotropic_by_task(Given([nothing] * 2), fraction=0.8),
        task_singular_vectors(Given([nothing] * 2)),
        least_interference(Given([nothing] * 2), alpha=1.0, ridge=0.1),
        aligned_ties(Given([nothing] * 2), densities=(1.0, 0.5)),
        boosted(Given([nothing]), beta=0.1),
    ):
        assert merged.tolist() == nothing.tolist()


def test_knots_gives_no_vote_to_rounding_errors() -> None:
    """Models in unrelated subspaces: in the directions of one, the other has nothing but rounding errors."""
    draw = np.random.default_rng(2)
    left, right = (np.linalg.qr(draw.standard_normal((n, 8)))[0] for n in (40, 30))
    deltas = [left[:, :4] * (5, 6, 7, 8) @ right[:, :4].T, left[:, 4:] * (1, 2, 3, 4) @ right[:, 4:].T]
    merged = aligned_ties(Given(deltas), densities=(1.0, 1.0)).numpy()
    np.testing.assert_allclose(merged, np.sum(deltas, axis=0), rtol=0, atol=1e-12)


def write_adapter(directory: Path, name: str, shape: tuple[int, int], rank: int, seed: int) -> Path:
    generator = torch.Generator().manual_seed(seed)
    directory.mkdir()
    prefix = f"base_model.model.{name.removesuffix('.weight')}"
    factors = {
        f"{prefix}.lora_A.weight": torch.randn(rank, shape[1], generator=generator) * 0.02,
        f"{prefix}.lora_B.weight": torch.randn(shape[0], rank, generator=generator) * 0.02,
    }
    save_file(factors, directory / "adapter_model.safetensors")
    module = name.removesuffix(".weight").rsplit(".", 1)[1]
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": [module]}
    (directory / "adapter_config.json").write_text(json.dumps(settings))
    return directory


def test_the_delta_of_an_adapter_is_its_product_so_that_its_rank_is_seen(
    models: list[Path], tmp_path: Path
) -> None:
    name, shape = "model.layers.0.mlp.up_proj.weight", (61, 24)
    products = []
    entries = []
    for seed in range(2):
        adapter = write_adapter(tmp_path / f"adapter{seed}", name, shape, 3, seed)
        a, b = (
            next(t.double().numpy() for key, t in _adapter(adapter).items() if side in key)
            for side in ("A", "B")
        )
        products.append(2.0 * b @ a)
        entries.append({"model": f"{models[0]}+{adapter}"})
    config = {"merge_method": "iso_c", "base_model": str(models[0]), "models": entries, "dtype": "float64"}
    merge(config, tmp_path / "out", memory="1GiB", progress=False)
    tau = as_float64(tmp_path / "out")[name] - as_float64(models[0])[name]
    expected = REFERENCES["iso_c"](products)
    assert np.linalg.norm(tau - expected) <= 1e-12 * np.linalg.norm(expected) + 1e-15
    assert np.linalg.matrix_rank(expected) == 6


def _adapter(path: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return {
        key.replace("lora_", ""): tensor
        for key, tensor in load_file(path / "adapter_model.safetensors").items()
    }


def test_matrices_and_rest_say_which_tensors_are_decomposed(models: list[Path], tmp_path: Path) -> None:
    config = config_for("iso_c", models, matrices="embed_tokens|q_proj", rest="base", dtype="float64")
    merge(config, tmp_path / "out", memory="1GiB", progress=False)
    merged, base = as_float64(tmp_path / "out"), as_float64(models[0])
    changed = [name for name in base if not np.array_equal(merged[name], base[name])]
    assert sorted(changed) == ["model.embed_tokens.weight", "model.layers.1.self_attn.q_proj.weight"]
    for key, value, method, message in (
        ("matrices", "nowhere", "iso_c", "occurs in the name of no tensor"),
        ("matrices", "(", "iso_c", "not a regular expression"),
        ("matrices", "proj", "ties", "treats all tensors alike"),
        ("rest", "mena", "iso_c", "did you mean 'mean'"),
    ):
        with pytest.raises(ConfigError, match=message):
            plan(config_for(method, models, **{key: value}))


def test_the_bits_do_not_depend_on_the_threads_of_torch(tmp_path: Path) -> None:
    shapes = {f"layers.{i}.weight": shape for i, shape in enumerate([(420, 300), (256, 256)])}
    paths = write_models(tmp_path / "models", shapes=shapes)
    for method in ("tsv_m", "wudi"):
        (tmp_path / method).mkdir()
        trial = Trial(get_method(method), config_for(method, paths), tmp_path / method)
        laws.same_bytes_with_any_threads_of_torch(trial)


def test_a_stage_can_be_corrected_as_if_it_had_been_written(models: list[Path], tmp_path: Path) -> None:
    listed = [str(path) for path in models[1:]]
    first = {"merge_method": "task_arithmetic", "base_model": str(models[0]), "models": listed}
    second = {"merge_method": "svc", "base_model": str(models[0]), "parameters": {"alpha": 0.2}}
    merge(first, tmp_path / "sum", memory="1GiB", progress=False)
    merge(
        {**second, "models": [str(tmp_path / "sum"), *listed]},
        tmp_path / "two",
        memory="1GiB",
        progress=False,
    )
    stages = [{"name": "sum", **first}, {**second, "models": ["sum", *listed]}]
    merge(yaml.safe_dump_all(stages), tmp_path / "one", memory="1GiB", progress=False)
    one, two = read_tensors(tmp_path / "one"), read_tensors(tmp_path / "two")
    assert all(torch.equal(one[name], tensor) for name, tensor in two.items())


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_non_finite_value_shows_at_its_element_alone(
    value: float, models: list[Path], tmp_path: Path
) -> None:
    name = "model.layers.1.self_attn.q_proj.weight"
    tensors = read_tensors(models[1])
    tensors[name][3, 5] = value
    broken = write_model(tmp_path / "broken", tensors)
    config = config_for("tsv_m", [models[0], broken, *models[2:]])
    merge(config, tmp_path / "out", memory="1GiB", progress=False, nonfinite="warn")
    bad = ~torch.isfinite(read_tensors(tmp_path / "out")[name])
    assert bad.nonzero().tolist() == [[3, 5]]


def test_a_matrix_that_does_not_fit_is_refused_with_both_numbers(
    tmp_path: Path, make_models: Callable[..., list[Path]]
) -> None:
    paths = make_models(n_models=1, shapes={"layers.0.weight": (1300, 1300), "layers.1.weight": (1300, 1300)})
    with pytest.raises(
        BudgetError, match=r"holds the whole tensor, [0-9.]+ MiB, in memory; --memory 480 MiB leaves 80"
    ):
        plan(config_for("iso_c", paths), memory="480MiB")
