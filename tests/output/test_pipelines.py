"""Pipelines of diffusers as outputs: what diffusers loads, the same bits after a stop, and every byte checked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import streammerge.output.shards as shards
from streammerge import merge, plan, verify
from streammerge.errors import WorldError
from streammerge.output import commit
from tests.checkpoint.pipelines import SHAPES, stem_of, tensors_of, write_pipeline


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    return [write_pipeline(tmp_path / name, seed) for seed, name in enumerate("ab")]


def weighted(*models: Path, **more: Any) -> dict[str, Any]:
    listed = [
        {"model": str(model), "parameters": {"weight": w}}
        for model, w in zip(models, (0.25, 0.75), strict=True)
    ]
    return {"merge_method": "linear", "models": listed, **more}


def everything(out: Path) -> dict[str, bytes]:
    return {str(p.relative_to(out)): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("shard_size", ["5GB", "1KB"])
def test_every_tensor_is_the_sum_in_float64_and_lies_where_its_library_looks(
    models: list[Path], tmp_path: Path, shard_size: str
) -> None:
    out = tmp_path / "out"
    merge(weighted(*models), out, shard_size=shard_size, progress=False)
    a, b = (tensors_of(model) for model in models)
    merged = tensors_of(out)
    assert merged.keys() == a.keys()
    for name, tensor in merged.items():
        assert torch.equal(tensor, (0.25 * a[name].double() + 0.75 * b[name].double()).float()), name
    for folder in SHAPES:
        stem = stem_of(folder)
        names = {path.name for path in (out / folder).glob("*.safetensors")}
        index = out / folder / f"{stem}.safetensors.index.json"
        assert index.is_file() == (shard_size == "1KB" and len(names) > 1)
        if index.is_file():
            weight_map = json.loads(index.read_text())["weight_map"]
            assert set(weight_map) == set(SHAPES[folder])
            assert set(weight_map.values()) == names
        else:
            assert names == {f"{stem}.safetensors"}
    assert (out / "unet" / "diffusion_pytorch_model.safetensors.index.json").is_file() == (
        shard_size == "1KB"
    )
    for name in (
        "model_index.json",
        "tokenizer/vocab.json",
        "scheduler/scheduler_config.json",
        "unet/config.json",
    ):
        assert (out / name).read_bytes() == (models[0] / name).read_bytes()
    assert not list(out.glob("*.safetensors"))
    assert not verify(out).problems
    assert not verify(out, against=weighted(*models), sample=None).problems
    assert merge(weighted(*models), out, shard_size=shard_size, progress=False).already_complete


def test_settings_of_text_encoders_follow_the_dtype_and_those_of_diffusers_have_none(
    models: list[Path], tmp_path: Path
) -> None:
    (models[0] / "config.json").write_text('{"downloads": 1}')  # a file for the hub's counters; it is copied
    merge(weighted(*models, dtype="bfloat16"), tmp_path / "out", progress=False)
    text = json.loads((tmp_path / "out" / "text_encoder" / "config.json").read_text())
    assert text["dtype"] == "bfloat16"
    assert "dtype" not in json.loads((tmp_path / "out" / "unet" / "config.json").read_text())
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"downloads": 1}
    assert {tensor.dtype for tensor in tensors_of(tmp_path / "out").values()} == {torch.bfloat16}


def test_other_sets_of_weights_stay_behind(models: list[Path], tmp_path: Path) -> None:
    for name in (
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "vae/diffusion_pytorch_model.bin",
        "sdxl.safetensors",
    ):
        (models[0] / name).write_bytes(
            (models[0] / "vae" / "diffusion_pytorch_model.safetensors").read_bytes()
        )
    (models[0] / "vae_1_0").mkdir()
    (models[0] / "vae_1_0" / "diffusion_pytorch_model.safetensors").write_bytes(b"x")
    out = tmp_path / "out"
    told = "\n".join(plan(weighted(*models)).warnings)
    merge(weighted(*models), out, progress=False)
    assert sorted(path.name for path in (out / "unet").iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]
    assert not (out / "vae_1_0").exists()
    for name in ("fp16.safetensors", "model.bin", "sdxl.safetensors", "vae_1_0/ (weights)"):
        assert name in told


def parameters_of(config: dict[str, Any]) -> dict[str, tuple[float, ...]]:
    return {job.name: job.parameters["weight"] for job in plan(config).jobs if job.kind == "merge"}


def test_filters_gradients_and_exclude_see_components(models: list[Path]) -> None:
    weight = [
        {"filter": "vae/", "value": 0.0},
        {"filter": "unet/mid_block.", "value": 0.9},
        {"filter": "unet/down_blocks", "value": [0.0, 0.5, 1.0]},
        {"filter": "text_encoder/", "value": 0.3},
        {"value": 0.7},
    ]
    own = [
        {"model": str(models[0]), "parameters": {"weight": 1.0}},
        {"model": str(models[1]), "parameters": {"weight": weight}},
    ]
    config = {"merge_method": "linear", "models": own, "exclude": [r"^text_encoder_2/text_model\.final"]}
    found = {name: second for name, (_, second) in parameters_of(config).items()}
    assert "text_encoder_2/text_model.final_layer_norm.weight" not in found
    assert found["vae/decoder.conv_out.bias"] == 0.0
    assert found["unet/mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"] == 0.9
    assert [found[name] for name in sorted(found) if name.startswith("unet/down_blocks")] == [
        0.0,
        0.0,
        0.5,
        0.5,
        0.5,
        1.0,
    ]
    assert found["text_encoder/text_model.final_layer_norm.weight"] == 0.3
    assert found["text_encoder_2/text_model.encoder.layers.0.self_attn.q_proj.weight"] == 0.7


FAILURES = [
    (shards.ShardWriter, "publish", 0),
    (shards.ShardWriter, "publish", 3),
    (commit, "write_file", 2),
    (commit, "seal", 0),
]


@pytest.mark.parametrize(("owner", "name", "after"), FAILURES, ids=[f"{row[1]} {row[2]}" for row in FAILURES])
def test_a_stopped_merge_is_no_pipeline_and_continues_to_the_same_files(
    owner: object, name: str, after: int, models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    merge(weighted(*models), whole, shard_size="1KB", progress=False)
    real, calls = getattr(owner, name), list[int]()

    def fail(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) > after:
            raise WorldError("the machine fails")
        return real(*arguments)

    with monkeypatch.context() as broken:
        broken.setattr(owner, name, fail)
        with pytest.raises(WorldError):
            merge(weighted(*models), out, shard_size="1KB", progress=False)
    assert not (out / "model_index.json").exists()
    merge(weighted(*models), out, shard_size="1KB", progress=False)
    assert everything(out) == everything(whole)


def test_the_list_of_components_is_the_last_file_and_goes_first(
    models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, real = tmp_path / "out", commit.write_file

    def fail(path: Path, *content: Any) -> None:
        if path.name == "model_index.json":
            assert not list(out.rglob("*.safetensors.partial"))
            assert (out / "streammerge.json").is_file()
            raise WorldError("the machine fails")
        real(path, *content)

    with monkeypatch.context() as broken:
        broken.setattr(commit, "write_file", fail)
        with pytest.raises(WorldError):
            merge(weighted(*models), out, shard_size="1KB", progress=False)
    assert list(out.rglob("*.index.json"))
    other = weighted(*models, dtype="bfloat16")
    merge(other, out, overwrite=True, progress=False)
    assert not list(out.rglob("*.index.json"))
    assert not verify(out).problems


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("model_index.json", "model_index.json: missing"),
        ("unet/diffusion_pytorch_model.safetensors.index.json", "index.json: missing"),
        ("text_encoder/config.json", "text_encoder/config.json: missing"),
    ],
)
def test_what_is_lost_is_found(name: str, words: str, models: list[Path], tmp_path: Path) -> None:
    merge(weighted(*models), tmp_path / "out", shard_size="1KB", progress=False)
    (tmp_path / "out" / name).unlink()
    assert [line for line in verify(tmp_path / "out").problems if words in line]


def test_what_was_added_to_a_component_is_found(models: list[Path], tmp_path: Path) -> None:
    merge(weighted(*models), tmp_path / "out", progress=False)
    (tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text("{}")
    (problem,) = verify(tmp_path / "out").problems
    assert "no merge wrote it here" in problem
