"""Small models on disk, and budgets small enough that small tensors are streamed."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import streammerge.methods.catalog  # noqa: F401  (registers them)
from streammerge.methods.registry import all_methods
from streammerge.planning.memory import budget as budgets
from streammerge.testing.models import read_tensors, write_fisher, write_grams
from tests.fixed_budget import Fixed

SHAPES: dict[str, tuple[int, ...]] = {
    "model.embed_tokens.weight": (700, 64),
    "model.layers.0.mlp.down_proj.weight": (96, 130),
    "model.layers.0.input_layernorm.weight": (64,),
    "model.layers.1.mlp.down_proj.weight": (96, 130),
    "model.layers.1.input_layernorm.weight": (64,),
    "scalar": (),
}


def write_model(directory: Path, tensors: Mapping[str, torch.Tensor]) -> Path:
    """Write one model directory."""
    directory.mkdir(parents=True, exist_ok=True)
    save_file(dict(tensors), directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", "torch_dtype": "bfloat16"}))
    return directory


@pytest.fixture(autouse=True, scope="session")
def kernels() -> None:
    """Compile all kernels once on a machine: merges as small as these would go through torch until then."""
    from streammerge.backends.cpu.compile import ensure_compiled

    assert ensure_compiled() is None


@pytest.fixture(autouse=True)
def auto_means_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a merge use a GPU only where a test asks for it, on any machine."""
    monkeypatch.setattr("streammerge.planning.backend.GPU_DRIVER", "/nonexistent")


def write_models(
    directory: Path,
    n_models: int = 3,
    dtype: torch.dtype = torch.bfloat16,
    spread: float = 1e-3,
    shapes: Mapping[str, tuple[int, ...]] = SHAPES,
    seed: int = 0,
) -> list[Path]:
    """Write a base and fine-tunes of it: [base, model 1, model 2, ...]."""
    generator = torch.Generator().manual_seed(seed)
    base = {name: torch.randn(shape, generator=generator) * 0.02 for name, shape in shapes.items()}
    paths = []
    for i in range(n_models + 1):
        tensors = {
            name: (t + (torch.randn(t.shape, generator=generator) * spread if i else 0)).to(dtype)
            for name, t in base.items()
        }
        tensors["position_ids"] = torch.arange(16)
        paths.append(write_model(directory / ("base" if i == 0 else f"m{i}"), tensors))
    return paths


@pytest.fixture
def make_models(tmp_path: Path) -> Callable[..., list[Path]]:
    """Return `write_models` for the test's directory."""
    return partial(write_models, tmp_path)


def use_capacity(monkeypatch: pytest.MonkeyPatch, capacity: int, threads: int) -> None:
    """Give later merges a capacity in bytes and a number of threads."""

    def make_budget(memory: int | None, n: int | None, reserve: int) -> budgets.Budget:
        return Fixed(reserve + capacity, reserve, threads)

    monkeypatch.setattr(budgets, "make_budget", make_budget)


@pytest.fixture
def small_capacity(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """Return `use_capacity` for the length of the test."""
    return partial(use_capacity, monkeypatch)


def config_for(method: str, paths: Sequence[Path], **top: Any) -> dict[str, Any]:
    """Return a config mapping for a method over [base, models...], by what the method declares; `top` overrides keys."""
    models: list[dict[str, Any]] = [{"model": str(path)} for path in paths[1:]]
    config: dict[str, Any] = {"merge_method": method, "models": models, "base_model": str(paths[0])}
    registered = all_methods().get(method)
    if registered is not None:
        config["models"] = models = models[: registered.n_models[1]]
        drops = registered.drop.fraction in top.get("parameters", {})
        if registered.base in ("member", "none") and not drops:
            del config["base_model"]
        stores = {"fisher": (registered.fisher, write_fisher), "gram": (registered.gram, write_grams)}
        for key, (needed, write) in stores.items():
            for model in models if needed else ():
                model[key] = str(write(Path(model["model"])))
    return {**config, **top}


def output_bytes(out: Path) -> dict[str, bytes]:
    """Return the bytes of every file of an output."""
    return {p.name: p.read_bytes() for p in sorted(out.iterdir())}


def as_float64(path: Path) -> dict[str, np.ndarray]:
    """Return a model's float tensors as float64."""
    return {k: t.double().numpy() for k, t in read_tensors(path).items() if t.is_floating_point()}
