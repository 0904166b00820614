"""Every kind of output in a store has the bytes that it has on a disk, from models that are stored in every way."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from streammerge.api import merge, verify
from streammerge.errors import OutputError, WorldError
from streammerge.io import object_stores
from streammerge.output.object_shards import ObjectShards
from tests.checkpoint.pipelines import write_pipeline
from tests.checkpoint.quantized.formats import write as write_quantised
from tests.conftest import config_for, output_bytes, use_capacity, write_models
from tests.s3_server import Server

SHAPES: dict[str, tuple[int, ...]] = {
    "model.embed_tokens.weight": (256, 128),
    "model.layers.0.mlp.experts.down_proj": (2, 128, 128),
    "model.layers.0.mlp.up_proj.weight": (384, 128),
    "model.layers.0.input_layernorm.weight": (128,),
    "model.layers.1.mlp.up_proj.weight": (384, 128),
    "model.layers.1.self_attn.q_proj.weight": (128, 130),
}
SHARD = 90_000


@pytest.fixture
def server(s3_server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name, value in s3_server.environment().items():
        monkeypatch.setenv(name, value)
    object_stores.close_stores()
    yield s3_server
    object_stores.close_stores()


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_models(tmp_path_factory.mktemp("models"), 2, shapes=SHAPES)


def config(paths: list[Path], **more: Any) -> dict[str, Any]:
    models = [{"model": str(path), "parameters": {"weight": 0.5}} for path in paths]
    return {"merge_method": "linear", "models": models, "dtype": "bfloat16", **more}


@pytest.mark.parametrize("capacity", [None, 700_000], ids=["at once", "cut to pieces"])
def test_codes_and_scales_that_lie_apart_in_the_file(
    capacity: int | None, paths: list[Path], server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scales are in fp32, and come before all codes."""
    if capacity is not None:
        use_capacity(monkeypatch, capacity, 3)
    top = config_for("dare_ties", paths, dtype="float32", quantize="fp8")
    merge(top, tmp_path / "local", memory="1GiB", shard_size=SHARD, kernels=True)
    name = f"fp8-{capacity}"
    merge(top, f"s3://bench/{name}", memory="1GiB", shard_size=SHARD, kernels=True)
    assert server.keys("bench", name) == output_bytes(tmp_path / "local")
    assert len([key for key in server.keys("bench", name) if key.endswith(".safetensors")]) > 2
    if capacity is None:
        assert verify(f"s3://bench/{name}", against=top).problems == ()
        pytest.importorskip("vl_convert", reason="the extra `pages` is not installed")
        said, page = list[str](), tmp_path / "page.html"
        done = merge(
            top,
            f"s3://bench/{name}",
            memory="1GiB",
            shard_size=SHARD,
            report=page,
            on_event=lambda event: said.append(str(event.values.get("message"))),
        )
        assert done.already_complete
        assert "rounding" in page.read_text(), said


@pytest.mark.parametrize("name", ["mxfp4 U8", "nvfp4", "pack-quantized 4 bits", "float-quantized block"])
def test_a_quantised_model_from_a_store_to_a_store(name: str, server: Server, tmp_path: Path) -> None:
    paths = [tmp_path / "a", tmp_path / "b"]
    for seed, path in enumerate(paths):
        write_quantised(path, name, seed)
        server.copy_in(path, "bench", f"{name}/{path.name}")
    merge(config(paths, quantize="same"), tmp_path / "local", memory="1GiB")
    there = config([Path(f"s3:/bench/{name}/{path.name}") for path in paths], quantize="same")
    for model in there["models"]:
        model["model"] = model["model"].replace("s3:/", "s3://")
    merge(there, f"s3://bench/{name}/out", memory="1GiB")
    local, found = output_bytes(tmp_path / "local"), server.keys("bench", f"{name}/out")
    assert {key: found[key] for key in OF_MERGE} == {key: local[key] for key in OF_MERGE}


OF_MERGE = ("model.safetensors", "config.json")


def test_an_output_that_is_one_file(
    paths: list[Path], server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It appears after its manifest, and its working files lie beside it until then."""
    top, url = config(paths), "s3://bench/files/merged.safetensors"
    merge(top, tmp_path / "merged.safetensors", memory="1GiB")
    with monkeypatch.context() as failing:
        failing.setattr(ObjectShards, "publish", cut)
        with pytest.raises(WorldError, match="cut"):
            merge(top, url, memory="1GiB")
    found = server.keys("bench", "files")
    assert "merged.safetensors" not in found
    assert {key.split("/")[0] for key in found} == {
        "merged.safetensors.json",
        "merged.safetensors.streammerge",
    }
    merge(top, url, memory="1GiB")
    assert server.keys("bench", "files") == output_bytes(tmp_path)
    assert merge(top, url, memory="1GiB").already_complete
    assert verify(url).problems == ()
    with pytest.raises(OutputError, match="holds a finished merge with a different"):
        merge(config(paths[1:]), url, memory="1GiB")
    merge(config(paths[1:]), url, memory="1GiB", overwrite=True)
    server.put("bench", "files/foreign.safetensors", b"mine")
    with pytest.raises(OutputError, match="no merge wrote this file"):
        merge(top, "s3://bench/files/foreign.safetensors", memory="1GiB")


def cut(*arguments: object) -> None:
    raise WorldError("cut")


def test_a_pipeline_from_a_store_to_a_store(server: Server, tmp_path: Path) -> None:
    """Its components lie in folders; the list of them comes last."""
    paths = [write_pipeline(tmp_path / name, seed) for seed, name in enumerate("ab")]
    merge(config(paths), tmp_path / "local", memory="1GiB", shard_size=1000)
    there = config([])
    there["models"] = [
        {"model": server.copy_in(path, "bench", f"pipelines/{path.name}"), "parameters": {"weight": 0.5}}
        for path in paths
    ]
    merge(there, "s3://bench/pipelines/out", memory="1GiB", shard_size=1000)
    local = {
        str(p.relative_to(tmp_path / "local")): p.read_bytes() for p in (tmp_path / "local").rglob("*.*")
    }
    found = server.keys("bench", "pipelines/out")
    assert found.keys() == local.keys()
    made = {"README.md", "streammerge.json", "streammerge_config.yml"}  # they name the models
    assert {name: found[name] for name in found.keys() - made} == {
        name: local[name] for name in local.keys() - made
    }


def test_models_of_every_container_are_read_from_a_store(
    paths: list[Path], server: Server, tmp_path: Path
) -> None:
    """A PyTorch file, a distributed checkpoint, and one safetensors file."""
    import torch.distributed.checkpoint as dcp

    merge(config(paths[1:]), tmp_path / "local", memory="1GiB")
    tensors = [load_file(path / "model.safetensors") for path in paths[1:]]
    torch.save(tensors[0], tmp_path / "one.pt")
    server.put("bench", "kinds/one.pt", (tmp_path / "one.pt").read_bytes())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one process
        dcp.save({"model": tensors[1]}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    server.copy_in(tmp_path / "dcp", "bench", "kinds/dcp")
    server.put("bench", "kinds/two.safetensors", (paths[2] / "model.safetensors").read_bytes())
    for second in (
        {"model": "s3://bench/kinds/dcp", "strip": "model."},
        {"model": "s3://bench/kinds/two.safetensors"},
    ):
        top = config([])
        top["models"] = [{"model": "s3://bench/kinds/one.pt"}, second]
        for model in top["models"]:
            model["parameters"] = {"weight": 0.5}
        out = tmp_path / f"from-{second['model'].rpartition('/')[2].partition('.')[0]}"
        merge(top, out, memory="1GiB")
        merged, expected = (
            load_file(next(iter(where.glob("*.safetensors")))) for where in (out, tmp_path / "local")
        )
        assert merged.keys() == expected.keys()
        assert all(torch.equal(merged[name], expected[name]) for name in expected)


def test_stages_that_are_kept_in_a_store(paths: list[Path], server: Server, tmp_path: Path) -> None:
    """Each has the bytes that it has on a disk, and the output is made of them; all is there the second time."""
    documents = [
        config(paths[:2], name="first"),
        config([], models=[{"model": "first"}, {"model": str(paths[2])}], parameters={"weight": 0.5}),
    ]
    text = "\n---\n".join(json.dumps(document) for document in documents)
    merge(text, tmp_path / "local", memory="1GiB", keep_stages=tmp_path / "kept")
    for again in (False, True):
        where = "s3://bench/stages/kept"
        done = merge(text, "s3://bench/stages/out", memory="1GiB", keep_stages=where)
        assert done.already_complete == again
    assert server.keys("bench", "stages/kept/first") == output_bytes(tmp_path / "kept" / "first")
    local, found = output_bytes(tmp_path / "local"), server.keys("bench", "stages/out")
    assert {key: found[key] for key in OF_MERGE} == {key: local[key] for key in OF_MERGE}
