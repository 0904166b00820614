"""Names and settings of an output are those that the library of its inputs looks for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from streammerge.api import merge, verify
from streammerge.checkpoint.index import open_model
from streammerge.output.directory import clear, withdraw
from streammerge.output.place import place_of

DIFFUSERS = {"_class_name": "FluxTransformer2DModel", "_diffusers_version": "0.35.0"}
TIMM = {"architecture": "vit_tiny", "num_features": 8}
CASES = {
    "diffusers": ("diffusion_pytorch_model", DIFFUSERS, "diffusion_pytorch_model"),
    "diffusers of another name": ("flux-dev", DIFFUSERS, "diffusion_pytorch_model"),
    "a variant of diffusers": ("diffusion_pytorch_model.fp16", DIFFUSERS, "diffusion_pytorch_model"),
    "open_clip": ("open_clip_model", {}, "open_clip_model"),
    "timm": ("model", TIMM, "model"),
    "transformers": ("model", {"model_type": "llama"}, "model"),
    "nothing known": ("weights", {}, "model"),
}


def write(directory: Path, seed: int, stem: str, config: dict[str, object]) -> Path:
    generator = torch.Generator().manual_seed(seed)
    directory.mkdir()
    tensors = {f"layers.{i}.weight": torch.randn(8, 8, generator=generator) for i in range(4)}
    save_file(tensors, directory / f"{stem}.safetensors")
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def configure(tmp_path: Path, stem: str, config: dict[str, object]) -> dict[str, object]:
    models = [{"model": str(write(tmp_path / name, i, stem, config))} for i, name in enumerate("ab")]
    return {"merge_method": "linear", "models": models, "dtype": "float32", "parameters": {"weight": 0.5}}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("shards", [1, 4])
def test_weights_have_the_names_that_the_library_of_the_inputs_looks_for(
    case: str, shards: int, tmp_path: Path
) -> None:
    stem, config, expected = CASES[case]
    out = tmp_path / "out"
    merge(configure(tmp_path, stem, config), out, shard_size=10**9 if shards == 1 else 256)
    names = [f"{expected}.safetensors"]
    if shards > 1:
        names = [f"{expected}-{i + 1:05d}-of-00004.safetensors" for i in range(4)]
        index = json.loads((out / f"{expected}.safetensors.index.json").read_text())
        assert sorted(set(index["weight_map"].values())) == names
    assert sorted(path.name for path in out.glob("*.safetensors")) == names
    assert verify(out).problems == ()
    assert len(open_model(out)) == 4
    both = [load_file(tmp_path / name / f"{stem}.safetensors")["layers.3.weight"] for name in "ab"]
    merged = load_file(out / names[-1])["layers.3.weight"]
    assert torch.equal(merged, (sum(t.double() for t in both) / 2).float())


@pytest.mark.parametrize("case", ["diffusers", "timm", "nothing known"])
def test_config_json_gets_no_dtype_that_nothing_reads(case: str, tmp_path: Path) -> None:
    stem, config, _ = CASES[case]
    merge(configure(tmp_path, stem, config), tmp_path / "out")
    assert (tmp_path / "out" / "config.json").read_bytes() == (tmp_path / "a" / "config.json").read_bytes()


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_config_json_keeps_the_name_of_the_dtype(key: str, tmp_path: Path) -> None:
    merge(configure(tmp_path, "model", {"model_type": "llama", key: "bfloat16"}), tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written == {"model_type": "llama", key: "float32"}


def test_a_missing_index_is_found_by_its_own_name(tmp_path: Path) -> None:
    out = tmp_path / "out"
    merge(configure(tmp_path, *CASES["diffusers"][:2]), out, shard_size=256)
    (out / "diffusion_pytorch_model.safetensors.index.json").unlink()
    assert verify(out).problems == ("diffusion_pytorch_model.safetensors.index.json: missing",)


def test_what_loads_is_taken_away_whatever_its_name(tmp_path: Path) -> None:
    out = tmp_path / "out"
    merge(configure(tmp_path, *CASES["diffusers"][:2]), out, shard_size=256)
    withdraw(place_of(out))
    assert not list(out.glob("*.index.json"))
    clear(place_of(out))
    assert not list(out.glob("*.safetensors"))
