"""An adapter in an object store has the bytes that it has on a disk, and nothing of it is written to a disk."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from streammerge.api import extract_lora, merge, verify
from streammerge.engine.object_session import check_streamable
from streammerge.engine.session import Options
from streammerge.errors import InputError, ModelError, WorldError
from streammerge.io import object_stores
from streammerge.output import object_adapter
from streammerge.output.object_shards import ObjectShards
from tests.conftest import output_bytes, use_capacity, write_models
from tests.s3_server import Server

SHAPES: dict[str, tuple[int, ...]] = {
    "model.layers.0.mlp.up_proj.weight": (60, 40),
    "model.layers.0.mlp.down_proj.weight": (40, 60),
    "model.layers.0.self_attn.q_proj.weight": (40, 40),
    "model.layers.0.input_layernorm.weight": (40,),
    "model.norm.weight": (40,),
}


@pytest.fixture
def server(s3_server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name, value in s3_server.environment().items():
        monkeypatch.setenv(name, value)
    object_stores.close_stores()
    yield s3_server
    object_stores.close_stores()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_models(tmp_path_factory.mktemp("models"), 2, shapes=SHAPES)


@pytest.fixture(scope="module")
def local(models: list[Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("adapters") / "adapter"
    extract_lora(models[1], out, base=models[0], rank=5, progress=False)
    return output_bytes(out)


def extract(models: list[Path], name: str, **more: Any) -> Any:
    return extract_lora(models[1], f"s3://bench/{name}", base=models[0], rank=5, progress=False, **more)


@pytest.mark.parametrize("capacity", [None, 3 << 20], ids=["at once", "little memory"])
def test_it_has_the_bytes_that_it_has_on_a_disk(
    capacity: int | None,
    models: list[Path],
    local: dict[str, bytes],
    server: Server,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if capacity is not None:
        use_capacity(monkeypatch, capacity, 3)
    name = f"adapter-{capacity}"
    summary = extract(models, name)
    assert len(summary.residuals) == 3
    assert server.keys("bench", name) == local
    assert server.parts("bench", name) == []
    if capacity is None:
        assert extract(models, name).already_complete
        assert verify(f"s3://bench/{name}").problems == ()


def test_the_result_of_a_merge_from_a_store_is_an_adapter_in_a_store(
    models: list[Path], server: Server, tmp_path: Path
) -> None:
    urls = [server.copy_in(path, "bench", f"of-adapters/{path.name}") for path in models]
    made = []
    for places, out in ((models, tmp_path / "out"), (urls, "s3://bench/of-adapters/out")):
        config = {
            "merge_method": "task_arithmetic",
            "base_model": str(places[0]),
            "models": [{"model": str(one), "parameters": {"weight": 0.5}} for one in places[1:]],
            "output": "lora",
            "energy": 0.8,
        }
        made.append(merge(config, out, progress=False, write_model_card=False))
    found, expected = server.keys("bench", "of-adapters/out"), output_bytes(tmp_path / "out")
    assert found["adapter_model.safetensors"] == expected["adapter_model.safetensors"]
    assert made[0].residuals == made[1].residuals


@pytest.mark.parametrize("moment", ["factors", "end"])
def test_an_interrupted_one_goes_on(
    moment: str,
    models: list[Path],
    local: dict[str, bytes],
    server: Server,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The factors are a working file until the end; nothing that loads is there before."""
    name = f"interrupted-{moment}"

    def fail(*arguments: Any) -> Any:
        raise WorldError("the power fails")

    with monkeypatch.context() as patched:
        if moment == "factors":
            patched.setattr(ObjectShards, "end", fail)
        else:
            patched.setattr(object_adapter, "seal", fail)
        with pytest.raises(WorldError, match="the power fails"):
            extract(models, name)
    left = server.keys("bench", name)
    assert not left.keys() & {"adapter_config.json", "adapter_model.safetensors", "model.safetensors"}
    assert any(key.startswith(".streammerge/") for key in left)
    assert server.parts("bench", name) == []
    again = extract(models, name)
    assert server.keys("bench", name) == local
    assert (again.bytes_resumed > 0) == (moment == "end")


def test_one_without_factors_leaves_nothing_behind(
    models: list[Path], server: Server, tmp_path: Path
) -> None:
    same = shutil.copytree(models[0], tmp_path / "same")
    with pytest.raises(ModelError, match="no matrix differs"):
        extract([models[0], same], "none")
    assert server.keys("bench", "none") == {}
    assert server.parts("bench", "none") == []


def test_it_is_not_shared_by_processes(models: list[Path], server: Server) -> None:
    config = {"merge_method": "passthrough", "models": [str(models[1])]}
    config |= {"output": {"kind": "lora", "base": str(models[0])}, "rank": 5}
    with pytest.raises(
        InputError, match=r"--join and --on share out shards, and an adapter is one file: leave"
    ):
        merge(config, "s3://bench/joined", join=True, progress=False)
    assert server.keys("bench", "joined") == {}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            Options(executor="processes"),
            "executor 'processes' does not write to an object store: give a directory as OUT, and copy it to the store "
            "afterwards",
        ),
        (
            Options(join=True, overwrite=True),
            "--join with --overwrite: each process would discard what the others have done: discard it once, by `merge "
            "--overwrite` without --join, then join",
        ),
    ],
)
def test_what_no_store_takes_is_refused_with_its_cure(options: Options, said: str) -> None:
    with pytest.raises(InputError) as caught:
        check_streamable(cast(Any, SimpleNamespace(adapter=None)), options)
    assert str(caught.value) == said
