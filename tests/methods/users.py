"""Methods of users, and models to try them on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from streammerge.methods import catalog, registry
from tests.conftest import config_for

METHODS = """
import torch
import streammerge
from streammerge import PerModel

@streammerge.method("my_midpoint", base="required")
def my_midpoint(models, base, *, t: float = 0.5, weight: PerModel[float] = 1.0):
    '''Step from the base towards the weighted mean.'''
    mean = sum(w * m for w, m in zip(weight, models)) / sum(weight)
    return base + t * (mean - base)

@streammerge.method("my_rows", access="row", base="none")
def my_rows(models, base, *, eps: float = 1e-6):
    '''The mean, each row scaled to the mean norm of the inputs' rows.'''
    mean = sum(models) / len(models)
    norm = sum(m.norm(dim=-1, keepdim=True) for m in models) / len(models)
    return mean / (mean.norm(dim=-1, keepdim=True) + eps) * norm

@streammerge.method("my_tensor", access="tensor", base="none")
def my_tensor(models, base, *, scale: float = 1.0):
    '''The mean, scaled to the largest magnitude of the first model.'''
    mean = sum(models) / len(models)
    return scale * mean * (models[0].abs().amax() / mean.abs().amax().clamp_min(1e-12))

@streammerge.method("my_wrong_shape", base="none")
def my_wrong_shape(models, base):
    '''Too few elements.'''
    return models[0].reshape(-1)[:1]

@streammerge.method("my_nothing", base="none")
def my_nothing(models, base):
    '''No tensor at all.'''
    return None
"""


SHAPES: dict[str, tuple[int, ...]] = {"embed": (600, 64), "a.weight": (96, 130), "norm": (64,), "scalar": ()}


@pytest.fixture
def methods(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    catalog.load_builtin()
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    path = tmp_path / "my_methods.py"
    path.write_text(METHODS)
    return path


@pytest.fixture
def paths(make_models: Callable[..., list[Path]]) -> list[Path]:
    return make_models(shapes=SHAPES, dtype=torch.float32)


def config_of(method: str, paths: list[Path], **parameters: Any) -> dict[str, Any]:
    config = config_for(method, paths, parameters=parameters)
    if method != "my_midpoint":
        config.pop("base_model", None)
    return config
