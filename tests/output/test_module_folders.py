"""Folders of modules (sentence-transformers): merged where all models have them alike, else copied with a note."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import streammerge.output.shards as shards
from streammerge import merge, plan, verify
from streammerge.errors import ModelError, WorldError

MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    {"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"},
]

MADE = {"README.md", "streammerge.json", "streammerge_config.yml"}


def write(directory: Path, seed: int, dense: Mapping[str, tuple[int, ...]] | None = None) -> Path:
    """Write an embedding model: a transformer, pooling, and a dense layer of the given shapes."""
    generator = torch.Generator().manual_seed(seed)
    own = {"embeddings.weight": (40, 8), "encoder.layer.0.weight": (8, 8)}
    shapes = {"linear.weight": (4, 8), "linear.bias": (4,)} if dense is None else dense
    for folder, tensors in (("", own), ("2_Dense", shapes)):
        place = directory / folder
        place.mkdir(parents=True, exist_ok=True)
        if tensors:
            made = {name: torch.randn(shape, generator=generator) for name, shape in tensors.items()}
            save_file(made, place / "model.safetensors", metadata={"format": "pt"})
        (place / "config.json").write_text(json.dumps({"in_features": 8, "model_type": "bert"}))
    (directory / "1_Pooling").mkdir()
    (directory / "1_Pooling" / "config.json").write_text("{}")
    (directory / "modules.json").write_text(json.dumps(MODULES))
    return directory


def mean(*models: Path) -> dict[str, object]:
    """Return the config of an average without a base."""
    listed = [{"model": str(model), "parameters": {"weight": 1.0}} for model in models]
    return {"merge_method": "linear", "models": listed}


def dense(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "2_Dense" / "model.safetensors")


def everything(out: Path) -> dict[str, bytes]:
    return {str(p.relative_to(out)): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("shard_size", ["5GB", "600B"], ids=["one shard", "several shards"])
def test_a_module_that_all_models_have_is_merged_in_its_folder(tmp_path: Path, shard_size: str) -> None:
    a, b, out = write(tmp_path / "a", 1), write(tmp_path / "b", 2), tmp_path / "out"
    merge(mean(a, b), out, shard_size=shard_size, progress=False)
    for name, tensor in dense(out).items():
        assert torch.equal(tensor, ((dense(a)[name].double() + dense(b)[name].double()) / 2).float())
    assert set(dense(out)) == {"linear.weight", "linear.bias"}
    if shard_size != "5GB":
        index = json.loads((out / "model.safetensors.index.json").read_text())
        assert not [name for name in index["weight_map"] if "/" in name]
    assert (out / "2_Dense" / "config.json").is_file()
    assert not verify(out).problems
    assert not verify(out, against=mean(a, b), sample=None).problems


@pytest.mark.parametrize(
    "other", [{"linear.weight": (5, 8), "linear.bias": (5,)}, {"linear.weight": (4, 8)}, {}], ids=str
)
def test_a_module_that_differs_is_copied_and_named(tmp_path: Path, other: dict[str, tuple[int, ...]]) -> None:
    a, b, out = write(tmp_path / "a", 1), write(tmp_path / "b", 2, other), tmp_path / "out"
    assert [line for line in plan(mean(a, b)).warnings if "2_Dense" in line and "copied, not merged" in line]
    with pytest.warns(UserWarning, match="2_Dense"):
        merge(mean(a, b), out, progress=False)
    assert (out / "2_Dense" / "model.safetensors").read_bytes() == (
        a / "2_Dense" / "model.safetensors"
    ).read_bytes()
    assert not verify(out).problems


def test_a_damaged_module_is_found(tmp_path: Path) -> None:
    a, b, out = write(tmp_path / "a", 1), write(tmp_path / "b", 2), tmp_path / "out"
    merge(mean(a, b), out, progress=False)
    path = out / "2_Dense" / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    (problem,) = verify(out).problems
    assert "2_Dense/model.safetensors: tensor 2_Dense/linear." in problem


def test_a_stopped_merge_continues_and_one_begun_anew_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = write(tmp_path / "a", 1), write(tmp_path / "b", 2)
    whole, out = tmp_path / "whole", tmp_path / "out"
    merge(mean(a, b), whole, progress=False)

    def fail(self: shards.ShardWriter, shard: int) -> None:
        raise WorldError("the machine fails")

    with monkeypatch.context() as broken:
        broken.setattr(shards.ShardWriter, "publish", fail)
        with pytest.raises(WorldError):
            merge(mean(a, b), out, progress=False)
    assert (out / "2_Dense" / "model.safetensors.partial").is_file()
    assert not list(out.rglob("*.safetensors"))
    merge(mean(a, b), out, progress=False)
    assert everything(out) == everything(whole)

    with monkeypatch.context() as broken:
        broken.setattr(shards.ShardWriter, "publish", fail)
        with pytest.raises(WorldError):
            merge(mean(a, b), out, overwrite=True, progress=False)
    c, d = write(tmp_path / "c", 3, {}), write(tmp_path / "d", 4, {})
    merge(mean(c, d), out, overwrite=True, progress=False)
    assert not list((out / "2_Dense").glob("*.safetensors*"))
    assert (out / "model.safetensors").is_file()


def test_a_link_out_of_the_folder_is_not_followed(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a", 1), write(tmp_path / "b", 2)
    path = b / "2_Dense" / "model.safetensors"
    path.rename(tmp_path / "elsewhere.safetensors")
    path.symlink_to(tmp_path / "elsewhere.safetensors")
    assert plan(mean(a, b)).template.folders == ()


ROUTED = {
    "types": {
        "query_0_StaticEmbedding": "x.StaticEmbedding",
        "document_0_Dense": "x.Dense",
        "../out": "x.Dense",
    }
}
LAYOUTS = {
    "a transformer in a folder": (
        {"0_Transformer": "Transformer", "1_Pooling": "Pooling", "2_Dense": "Dense"},
        {},
    ),
    "a static embedding": ({"0_StaticEmbedding": "StaticEmbedding", "1_Normalize": "Normalize"}, {}),
    "a router": ({"": "Router", "1_Normalize": "Normalize"}, {"router_config.json": ROUTED}),
    "a router in a folder": (
        {"0_Transformer": "Transformer", "1_Asym": "Asym"},
        {"1_Asym/config.json": ROUTED},
    ),
}


def write_folders(directory: Path, seed: int, layout: str) -> Path:
    """Write an embedding model whose weights are in its modules' folders alone."""
    modules, settings = LAYOUTS[layout]
    for name, content in settings.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(json.dumps(content))
    branches = {
        f"{Path(name).parent}/{branch}" for name in settings for branch in ROUTED["types"] if branch[0] != "."
    }
    generator = torch.Generator().manual_seed(seed)
    for folder in (*filter(None, modules), *(branch.removeprefix("./") for branch in branches)):
        (directory / folder).mkdir(parents=True, exist_ok=True)
        if not folder.endswith(("Pooling", "Normalize", "Asym")):
            made = {"linear.weight": torch.randn(4, 8, generator=generator)}
            save_file(made, directory / folder / "model.safetensors", metadata={"format": "pt"})
            (directory / folder / "tokenizer.json").write_text("{}")
    listed = [
        {"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in modules.items()
    ]
    (directory / "modules.json").write_text(json.dumps(listed))
    return directory


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_model_whose_weights_are_in_its_modules_folders_alone_is_merged_folder_by_folder(
    tmp_path: Path, layout: str
) -> None:
    a, b, out = (tmp_path / name for name in ("a", "b", "out"))
    write_folders(a, 1, layout)
    write_folders(b, 2, layout)
    merge(mean(a, b), out, progress=False)
    assert set(everything(a)) == set(everything(out)) - MADE
    weights = [name for name in everything(a) if name.endswith(".safetensors")]
    assert len(weights) == {"a static embedding": 1, "a router in a folder": 3}.get(layout, 2)
    for name in weights:
        (x,), (y,), (found,) = (load_file(folder / name).values() for folder in (a, b, out))
        assert torch.equal(found, ((x.double() + y.double()) / 2).float())
    assert not verify(out, against=mean(a, b), sample=None).problems


def test_a_module_without_its_weights_is_refused(tmp_path: Path) -> None:
    a, b = write_folders(tmp_path / "a", 1, "a router"), write_folders(tmp_path / "b", 2, "a router")
    (b / "document_0_Dense/model.safetensors").unlink()
    with pytest.raises(
        ModelError, match=r"b/document_0_Dense: no weights of the component 'Dense' here: download"
    ):
        plan(mean(a, b))
