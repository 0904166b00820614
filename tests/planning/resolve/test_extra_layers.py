"""Layers behind the last, for multi-token prediction: no layers to slices and gradients, and kept all the same."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from streammerge.api import merge, plan
from streammerge.errors import ConfigError, ModelError
from tests.conftest import read_tensors, write_model
from tests.planning.resolve.test_slices import LAYER, llama, source

EXTRA = {
    **LAYER,
    "eh_proj.weight": (8, 16),
    "enorm.weight": (8,),
    "hnorm.weight": (8,),
    "shared_head.norm.weight": (8,),
}


def with_extra(
    path: Path,
    seed: int,
    n_layers: int = 4,
    stem: str | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Path:
    """Write a llama with one layer more: behind its last, or under the name `stem`."""
    generator = torch.Generator().manual_seed(seed + 100)
    tensors = llama(seed, n_layers)
    for rest, shape in EXTRA.items():
        tensors[f"{stem or f'model.layers.{n_layers}'}.{rest}"] = torch.randn(
            shape, generator=generator
        ).bfloat16()
    write_model(path, tensors)
    found = {"model_type": "glm4_moe", "num_hidden_layers": n_layers, "num_nextn_predict_layers": 1}
    (path / "config.json").write_text(json.dumps({**found, **(settings or {})}))
    return path


def settings_of(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "config.json").read_text())
    return found


def stack(*parts: dict[str, Any], method: str = "passthrough", **top: Any) -> dict[str, Any]:
    return {"merge_method": method, "slices": [{"sources": [part]} for part in parts], **top}


@pytest.mark.parametrize("declared", [True, False])
def test_slices_keep_them_behind_the_last_layer_renumbered(declared: bool, tmp_path: Path) -> None:
    a = with_extra(tmp_path / "a", 1, settings={"layer_types": ["f", "s", "f", "s", "mtp"]})
    if not declared:
        (a / "config.json").write_text(json.dumps({"num_hidden_layers": 4}))
    merge(stack(source(a, 0, 3), source(a, 1, 4)), tmp_path / "out")
    before, after = read_tensors(a), read_tensors(tmp_path / "out")
    for rest in EXTRA:
        assert torch.equal(after[f"model.layers.6.{rest}"], before[f"model.layers.4.{rest}"])
    assert torch.equal(
        after["model.layers.5.mlp.up_proj.weight"], before["model.layers.3.mlp.up_proj.weight"]
    )
    assert len(after) == 3 + 6 * len(LAYER) + len(EXTRA)
    found = settings_of(tmp_path / "out")
    assert found["num_hidden_layers"] == 6
    if declared:
        assert found["num_nextn_predict_layers"] == 1
        assert found["layer_types"] == ["f", "s", "f", "s", "f", "s", "mtp"]


def test_a_config_that_counts_fewer_layers_than_are_stored_tells_them_where_names_do_not(
    tmp_path: Path,
) -> None:
    a = write_model(tmp_path / "a", llama(1, 5))
    (a / "config.json").write_text(json.dumps({"num_hidden_layers": 4, "num_nextn_predict_layers": 1}))
    with pytest.raises(
        ConfigError, match=r"ends beyond the 4 layers of .*the 1 after them, for multi-token prediction"
    ):
        plan(stack(source(a, 0, 5)))
    assert "model.layers.2.input_layernorm.weight" in {job.name for job in plan(stack(source(a, 0, 2))).jobs}
    (a / "config.json").write_text(json.dumps({"num_hidden_layers": 5, "num_nextn_predict_layers": 1}))
    assert len(plan(stack(source(a, 0, 5))).jobs) == 3 + 5 * len(LAYER)


@pytest.mark.parametrize("stem", ["mtp.layers.0", "model.mtp_layers.0", "mtp.pre_fc_norm_embedding"])
def test_layers_that_lie_apart_are_kept_by_their_names_as_the_last_slice_says(
    stem: str, tmp_path: Path
) -> None:
    a, b = (with_extra(tmp_path / name, seed, stem=stem) for seed, name in enumerate("ab"))
    merge(stack(source(a, 0, 3), source(b, 1, 4)), tmp_path / "out")
    before, after = read_tensors(b), read_tensors(tmp_path / "out")
    for rest in EXTRA:
        assert torch.equal(after[f"{stem}.{rest}"], before[f"{stem}.{rest}"])
    assert settings_of(tmp_path / "out")["num_hidden_layers"] == 6


def test_each_source_gives_its_own_even_from_another_depth(tmp_path: Path) -> None:
    a, b = with_extra(tmp_path / "a", 1, 4), with_extra(tmp_path / "b", 2, 6)
    part = {"sources": [source(a, 0, 4), source(b, 2, 6)]}
    merge({"merge_method": "linear", "slices": [part], "dtype": "float32"}, tmp_path / "out")
    one, two, after = read_tensors(a), read_tensors(b), read_tensors(tmp_path / "out")
    for rest in EXTRA:
        wanted = (one[f"model.layers.4.{rest}"].float() + two[f"model.layers.6.{rest}"].float()) / 2
        torch.testing.assert_close(after[f"model.layers.4.{rest}"], wanted)


def test_a_last_slice_of_a_model_without_them_leaves_them_out_and_says_so(tmp_path: Path) -> None:
    a, b = with_extra(tmp_path / "a", 1), write_model(tmp_path / "b", llama(2, 4))
    summary = merge(stack(source(a, 0, 4), source(b, 2, 4)), tmp_path / "out")
    assert any("layers for multi-token prediction are left out" in warning for warning in summary.warnings)
    found = settings_of(tmp_path / "out")
    assert (found["num_hidden_layers"], found["num_nextn_predict_layers"]) == (6, 0)


@pytest.mark.parametrize("stem", [None, "mtp.layers.0"])
def test_whole_models_merge_them_and_gradients_run_over_the_real_layers(
    stem: str | None, tmp_path: Path
) -> None:
    a, b = (with_extra(tmp_path / name, seed, stem=stem) for seed, name in enumerate("ab"))
    config = {
        "merge_method": "linear",
        "parameters": {"normalize": False, "weight": [0, 3]},
        "dtype": "float32",
        "models": [{"model": str(a)}, {"model": str(b)}],
    }
    weights = {job.name: job.parameters["weight"][0] for job in plan(config).jobs}
    for number in range(4):
        assert weights[f"model.layers.{number}.input_layernorm.weight"] == number
    assert weights[f"{stem or 'model.layers.4'}.eh_proj.weight"] == 3


def test_what_config_json_says_of_layers_by_number_follows_the_slices_or_is_named(tmp_path: Path) -> None:
    by_number = {
        "first_k_dense_replace": 1,
        "mlp_only_layers": [0, 3],
        "max_window_layers": 9,
        "decoder_sparse_step": 2,
    }
    a = with_extra(tmp_path / "a", 1, settings=by_number)
    summary = merge(stack(source(a, 0, 2), source(a, 1, 4)), tmp_path / "out")
    found = settings_of(tmp_path / "out")
    assert (found["first_k_dense_replace"], found["mlp_only_layers"], found["max_window_layers"]) == (
        1,
        [0, 4],
        9,
    )
    told = "\n".join(summary.warnings)
    assert "decoder_sparse_step: 2 determines the kind of a layer by its number" in told
    assert "first_k_dense_replace" not in told
    summary = merge(stack(source(a, 1, 4), source(a, 0, 2)), tmp_path / "turned")
    assert settings_of(tmp_path / "turned")["first_k_dense_replace"] == 0
    assert any(
        "first_k_dense_replace is 0, but some layers of that kind come later" in w for w in summary.warnings
    )


def test_models_are_as_deep_as_their_real_layers(tmp_path: Path) -> None:
    a, b = with_extra(tmp_path / "a", 1, 4), write_model(tmp_path / "b", llama(2, 5))
    (b / "config.json").write_text(json.dumps({"num_hidden_layers": 5, "num_nextn_predict_layers": 1}))
    for models in ([a, b], [b, a]):
        with pytest.raises(ModelError, match=r"has 4 layers, .* 5|has 5 layers, .* 4"):
            plan({"merge_method": "linear", "models": [str(path) for path in models]})
    c = write_model(tmp_path / "c", llama(3, 4))
    decided = plan({"merge_method": "linear", "models": [str(c), str(a)]})
    assert any("7 tensors" in warning and "left out" in warning for warning in decided.warnings)
    with pytest.raises(ModelError, match=r"eh_proj\.weight and 6 more are missing"):
        plan({"merge_method": "linear", "models": [str(a), str(c)]})
