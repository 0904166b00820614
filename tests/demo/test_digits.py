"""The shipped demo models are what the demo says they are."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from streammerge.demo import digits

Weights = dict[str, NDArray[np.float32]]


@pytest.fixture(scope="module")
def models() -> dict[str, Weights]:
    return {name: digits.load_model(digits.model_dir(name)) for name in digits.MODELS}


def average(weights: Weights) -> float:
    return float(np.mean([digits.accuracy(weights, task) for task in digits.TASKS]))


def combine(models: dict[str, Weights], scale: float) -> Weights:
    base = models["base"]
    return {k: base[k] + scale * sum(models[task][k] - base[k] for task in digits.TASKS) for k in base}


def test_shipped_files_stay_small() -> None:
    data = digits.model_dir("base").parent
    assert sum(path.stat().st_size for path in data.rglob("*") if path.is_file()) < 1_200_000


def test_all_models_have_the_same_tensors(models: dict[str, Weights]) -> None:
    shapes = [{name: tensor.shape for name, tensor in weights.items()} for weights in models.values()]
    assert all(shape == shapes[0] for shape in shapes)


@pytest.mark.parametrize("task", digits.TASKS)
def test_a_fine_tune_is_good_at_its_own_task_only(models: dict[str, Weights], task: str) -> None:
    own = digits.accuracy(models[task], task)
    assert own > 0.95
    assert own > digits.accuracy(models["base"], task) + 0.1
    assert all(digits.accuracy(models[task], other) < 0.65 for other in digits.TASKS if other != task)


@pytest.mark.parametrize("scale", [0.25, 0.4])  # The average of the models; task arithmetic.
def test_a_merge_beats_every_single_model(models: dict[str, Weights], scale: float) -> None:
    best = max(average(weights) for weights in models.values())
    assert average(combine(models, scale)) > best + 0.1


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_merged_models_of_other_types_and_several_files_load(
    tmp_path: Path, models: dict[str, Weights], dtype: type
) -> None:
    weights = {name: tensor.astype(dtype) for name, tensor in models["base"].items()}
    first, *rest = sorted(weights)
    save_file({first: weights[first]}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({name: weights[name] for name in rest}, tmp_path / "model-00002-of-00002.safetensors")
    loaded = digits.load_model(tmp_path)
    assert loaded.keys() == weights.keys()
    assert all(np.array_equal(loaded[name], weights[name].astype(np.float32)) for name in weights)


def test_bf16_is_the_upper_half_of_float32(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file as save_torch

    tensor = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).bfloat16()
    save_torch({"x": tensor}, tmp_path / "model.safetensors")
    assert np.array_equal(digits.load_model(tmp_path)["x"], tensor.float().numpy())


def test_the_reader_agrees_with_safetensors(models: dict[str, Weights]) -> None:
    expected = load_file(digits.model_dir("edges") / "model.safetensors")
    assert all(np.array_equal(models["edges"][name], expected[name]) for name in expected)


def test_wrong_names_are_named() -> None:
    with pytest.raises(ValueError, match="unknown model 'bass'; there are base, edges"):
        digits.model_dir("bass")
    with pytest.raises(ValueError, match="unknown task 'bass'; there are edges"):
        digits.view("bass", digits.test_images()[0])


def test_an_empty_directory_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no \.safetensors file"):
        digits.load_model(tmp_path)


def test_the_evaluation_needs_no_torch() -> None:
    code = "import sys, streammerge.demo.digits; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
