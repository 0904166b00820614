"""Adapters of experts that are stored in one tensor; test_peft.py holds them against PEFT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from streammerge.api import merge, verify
from streammerge.config.lora import extraction
from streammerge.errors import ModelError
from streammerge.testing.models import output_bytes, write_models
from tests.conftest import use_capacity

EXPERTS = "model.layers.0.mlp.experts"
SHAPES = {
    f"{EXPERTS}.gate_up_proj": (3, 16, 16),  # the shapes do not tell which axis is which
    f"{EXPERTS}.down_proj": (3, 31, 31),
    f"{EXPERTS}.gate_up_proj_bias": (3, 16),
    "model.layers.0.mlp.gate.weight": (3, 16),
}
RANK = 4


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    paths = write_models(tmp_path_factory.mktemp("models"), 1, shapes=SHAPES)
    base, tuned = (load_file(path / "model.safetensors") for path in paths)
    tuned[f"{EXPERTS}.gate_up_proj"][1] = base[f"{EXPERTS}.gate_up_proj"][1]  # an expert that did not change
    save_file(tuned, paths[1] / "model.safetensors", metadata={"format": "pt"})
    return paths


def extracted(paths: list[Path], **asked: Any) -> dict[str, Any]:
    return extraction(
        str(paths[1]),
        str(paths[0]),
        **{"rank": RANK, "energy": None, "dtype": None, "include": "experts", **asked},
    )


def change_of(adapter: dict[str, torch.Tensor], depth: int, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """Return what PEFT adds to a parameter, (experts, rows, columns)."""
    stem = f"base_model.model.{EXPERTS}{'.base_layer' * depth}"
    a, b = (adapter[f"{stem}.lora_{part}.weight"].double().numpy() for part in "AB")
    n = shape[0] if len(shape) == 3 else 1
    return np.einsum("ore,eri->eoi", b.reshape(len(b), -1, n), a.reshape(n, -1, a.shape[1]))


def test_no_factors_of_an_experts_rank_are_nearer_whatever_the_memory(
    models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streammerge.algebra.low_rank._BLOCK", 16 * 16)
    outs = []
    for capacity, threads in ((2 << 20, 1), (40 << 20, 3)):
        with monkeypatch.context() as patched:
            use_capacity(patched, capacity, threads)
            outs.append(tmp_path / f"out{threads}")
            merge(extracted(models), outs[-1], progress=False)
    assert output_bytes(outs[0]) == output_bytes(outs[1])
    base, tuned = (load_file(path / "model.safetensors") for path in models)
    found = load_file(outs[0] / "adapter_model.safetensors")
    config = json.loads((outs[0] / "adapter_config.json").read_text())
    assert sorted(config["target_parameters"]) == sorted(name for name in SHAPES if "experts" in name)
    assert config["r"] == RANK
    assert config["rank_pattern"] == {f"{EXPERTS}.gate_up_proj_bias": 3}
    recorded = json.loads((outs[0] / "streammerge.json").read_text())["adapter"]["modules"]
    for name, depth in (("gate_up_proj", 2), ("gate_up_proj_bias", 1), ("down_proj", 0)):
        delta = (tuned[f"{EXPERTS}.{name}"].double() - base[f"{EXPERTS}.{name}"].double()).numpy()
        missed = change_of(found, depth, delta.shape) - delta
        tail = np.linalg.svd(delta, compute_uv=False)[..., 3 if delta.ndim == 2 else RANK :]
        assert np.linalg.norm(missed) == pytest.approx(np.linalg.norm(tail), rel=1e-6, abs=1e-6)
        told = recorded[f"{EXPERTS}.{name}"]["residual"]
        assert told == pytest.approx(np.linalg.norm(missed) / np.linalg.norm(delta), rel=1e-9)
    unchanged = found[f"base_model.model.{EXPERTS}.base_layer.base_layer.lora_A.weight"][RANK : 2 * RANK]
    assert not unchanged.any()


def test_at_full_rank_the_adapter_gives_the_model_back_and_is_verified(
    models: list[Path], tmp_path: Path
) -> None:
    config = extracted(models, rank=31)
    merge(config, tmp_path / "adapter", progress=False)
    checked = verify(tmp_path / "adapter", against=config, sample=None, progress=False)
    assert checked.problems == ()
    merge(
        {"merge_method": "passthrough", "models": [{"model": f"{models[0]}+{tmp_path / 'adapter'}"}]},
        tmp_path / "out",
        progress=False,
    )
    tuned, back = (load_file(path / "model.safetensors") for path in (models[1], tmp_path / "out"))
    for name in SHAPES:
        if "experts" in name:
            scale = torch.finfo(tuned[name].dtype).eps * tuned[name].abs().max()
            assert (back[name].double() - tuned[name].double()).abs().max() <= 2 * scale, name


def test_parameters_that_peft_does_not_know_are_refused(tmp_path: Path) -> None:
    paths = write_models(
        tmp_path, 1, shapes={f"{EXPERTS}.weights": (3, 8, 8), "model.layers.0.up.weight": (8, 8)}
    )
    with pytest.raises(ModelError, match="in a way that PEFT does not know"):
        merge(extracted(paths), tmp_path / "out", progress=False)
    merge(extracted(paths, include=None, exclude="experts"), tmp_path / "out", progress=False)
