"""Merges from and to a real S3 server: the same bytes as from and to directories, whatever happens to the server."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from streammerge.api import merge, verify
from streammerge.engine import to_store
from streammerge.errors import InputError, OutputError, WorldError
from streammerge.io import object_stores, object_upload, object_waiting
from streammerge.io.object_file import ObjectFile
from streammerge.io.object_stores import library
from streammerge.io.object_upload import Upload
from tests.conftest import config_for, output_bytes, use_capacity, write_models
from tests.patience import PATIENCE
from tests.s3_server import Server, Throttle

OF_MERGE = ("model.safetensors", "config.json")


@pytest.fixture
def server(s3_server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name, value in s3_server.environment().items():
        monkeypatch.setenv(name, value)
    object_stores.close_stores()
    yield s3_server
    object_stores.close_stores()


@pytest.fixture(scope="module")
def models(s3_server: Server, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("models")
    paths = write_models(root, 2)
    config_for("regmean", paths)  # writes Gram matrices beside them
    s3_server.copy_in(root, "bench", "in")
    return paths


def in_store(value: Any, models: list[Path]) -> Any:
    """Return a config whose models, and the stores beside them, are the copies in the bucket."""
    if isinstance(value, dict):
        return {key: in_store(item, models) for key, item in value.items()}
    if isinstance(value, list):
        return [in_store(item, models) for item in value]
    return value.replace(str(models[0].parent), "s3://bench/in") if isinstance(value, str) else value


@pytest.mark.parametrize("method", ["ties", "regmean"])
def test_models_and_stores_are_read_from_a_store(
    method: str, server: Server, models: list[Path], tmp_path: Path
) -> None:
    """Gram matrices of `regmean` are a zarr store."""
    config = config_for(method, models)
    merge(config, tmp_path / "local", memory="1GiB")
    merge(in_store(config, models), tmp_path / "out", memory="1GiB")
    local, out = output_bytes(tmp_path / "local"), output_bytes(tmp_path / "out")
    assert {name: out[name] for name in OF_MERGE} == {name: local[name] for name in OF_MERGE}


def test_a_server_that_is_killed_and_comes_back_costs_only_time(
    server: Server, models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_for("linear", models)
    merge(config, tmp_path / "local", memory="1GiB")
    again = threading.Thread(target=server.start)
    real = ObjectFile.read

    def read(self: ObjectFile, offset: int, target: Any) -> None:
        monkeypatch.setattr(ObjectFile, "read", real)
        server.kill()
        again.start()
        real(self, offset, target)

    monkeypatch.setattr(ObjectFile, "read", read)
    monkeypatch.setattr(object_waiting, "_LONGEST_PAUSE", 0.3)
    merge(in_store(config, models), tmp_path / "out", memory="1GiB")
    again.join()
    assert output_bytes(tmp_path / "out")[OF_MERGE[0]] == output_bytes(tmp_path / "local")[OF_MERGE[0]]


def test_a_store_that_asks_for_fewer_requests_is_asked_again(
    server: Server, models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = in_store(config_for("linear", models), models)
    merge(config, tmp_path / "local", memory="1GiB")
    with Throttle(server, lambda number: number % 3 == 1) as throttle:
        monkeypatch.setenv("AWS_ENDPOINT_URL", throttle.endpoint)
        object_stores.close_stores()
        merge(config, "s3://bench/throttled", memory="1GiB")
        assert throttle.refusals > 5
    assert server.keys("bench", "throttled") == output_bytes(tmp_path / "local")


def test_a_store_that_never_gives_in_ends_the_merge(
    server: Server, models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = in_store(config_for("linear", models), models)
    monkeypatch.setattr(object_stores, "QUICK", {"max_retries": 1})
    monkeypatch.setattr(object_waiting, "PATIENCE", 0.1)
    with Throttle(server, lambda number: True) as throttle:
        monkeypatch.setenv("AWS_ENDPOINT_URL", throttle.endpoint)
        object_stores.close_stores()
        with pytest.raises(WorldError, match=r"asked for more than it gives \(503"):
            merge(config, tmp_path / "out", memory="1GiB")
    assert not (tmp_path / "out").exists()


def test_an_object_that_changes_in_the_middle_ends_the_merge(
    server: Server, models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = server.copy_in(models[1], "bench", "changing")
    config = {"merge_method": "linear", "models": [{"model": url}, {"model": str(models[2])}]}
    real = ObjectFile.read

    def read(self: ObjectFile, offset: int, target: Any) -> None:
        data = (models[2] / "model.safetensors").read_bytes()
        server.put("bench", "changing/model.safetensors", data)
        real(self, offset, target)

    monkeypatch.setattr(ObjectFile, "read", read)
    with pytest.raises(WorldError, match=r"changing/model\.safetensors: an input changed during the merge"):
        merge(config, "s3://bench/never", memory="1GiB")
    assert {key for key in server.keys("bench", "never") if not key.startswith(".streammerge")} == set()
    assert server.parts("bench", "never/") == []


def test_an_upload_that_is_given_up_leaves_no_parts(server: Server) -> None:
    upload = Upload("s3://bench/given-up/x", 40 << 20, threading.Event())
    for _ in range(3):
        upload.write(bytes(8 << 20))
    until = time.monotonic() + PATIENCE
    while not server.parts("bench", "given-up/") and time.monotonic() < until:
        time.sleep(0.05)
    assert server.parts("bench", "given-up/") != []
    upload.give_up()
    assert server.parts("bench", "given-up/") == []
    assert server.keys("bench", "given-up") == {}


SHARD = 40_000
"""Bytes; the models have several shards of it."""


def leftovers(server: Server, name: str) -> list[str]:
    """Return the records and the parts of unfinished uploads that an output has left."""
    records = [key for key in server.keys("bench", name) if key.startswith(".streammerge")]
    return records + server.parts("bench", f"{name}/")


@pytest.mark.parametrize(
    ("method", "top", "capacity"),
    [
        ("ties", {}, None),
        ("ties", {"parameters": {"density": 0.5, "trim_scope": "model"}}, 600_000),
        ("ties", {"parameters": {"density": 0.5}}, 600_000),
        ("linear", {}, 200_000),
    ],
    ids=["as it comes", "whole-model statistics", "streamed statistics", "many pieces"],
)
def test_an_output_in_a_store_is_the_one_in_a_directory(
    method: str,
    top: dict[str, Any],
    capacity: int | None,
    server: Server,
    models: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    """Every file of it, the manifest too; with few buffers, pieces wait for their turn and statistics are streamed."""
    if capacity is not None:
        use_capacity(monkeypatch, capacity, 4)
    name = f"out-{request.node.callspec.id.replace(' ', '-')}"
    config = config_for(method, models, **top)
    merge(config, tmp_path / "local", memory="1GiB", shard_size=SHARD, kernels=True)
    merge(config, f"s3://bench/{name}", memory="1GiB", shard_size=SHARD, kernels=True)
    assert server.keys("bench", name) == output_bytes(tmp_path / "local")
    assert len([key for key in server.keys("bench", name) if key.endswith(".safetensors")]) > 2
    assert leftovers(server, name) == []
    if capacity is None:
        assert verify(f"s3://bench/{name}", against=config).problems == ()
    assert merge(config, f"s3://bench/{name}", memory="1GiB", shard_size=SHARD, kernels=True).already_complete


def test_a_store_to_itself_in_one_shard(server: Server, models: list[Path], tmp_path: Path) -> None:
    """The only shard marks a finished model, and comes after the manifest."""
    config = in_store(config_for("linear", models), models)
    merge(config, tmp_path / "local", memory="1GiB")
    merge(config, "s3://bench/one", memory="1GiB")
    assert server.keys("bench", "one") == output_bytes(tmp_path / "local")
    assert leftovers(server, "one") == []


def test_a_merge_into_a_store_is_reported_on_a_page_on_the_disk(
    server: Server, models: list[Path], tmp_path: Path
) -> None:
    pytest.importorskip("vl_convert", reason="the extra `pages` is not installed")
    said, page = list[str](), tmp_path / "page.html"
    config = in_store(config_for("ties", models), models)
    merge(
        config,
        "s3://bench/told",
        memory="1GiB",
        report=page,
        on_event=lambda event: said.append(_told(event)),
    )
    assert "s3://bench/told" in page.read_text()
    assert not [line for line in said if "not written" in line]


def test_a_stopped_merge_goes_on_shard_by_shard(
    server: Server, models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_for("ties", models)
    merge(config, tmp_path / "local", memory="1GiB", shard_size=SHARD)
    use_capacity(monkeypatch, 200_000, 1)
    real, uploads = Upload.finish, []

    def finish(self: Upload) -> str:
        uploads.append(self)
        if len(uploads) == 3:
            raise WorldError("s3://bench/stopped: the store failed")
        return real(self)

    monkeypatch.setattr(Upload, "finish", finish)
    with pytest.raises(WorldError, match="the store failed"):
        merge(config, "s3://bench/stopped", memory="1GiB", shard_size=SHARD)
    monkeypatch.setattr(Upload, "finish", real)
    assert server.parts("bench", "stopped/") == []
    assert "streammerge.json" not in server.keys("bench", "stopped")
    with pytest.raises(OutputError, match="holds an unfinished merge with a different"):
        merge({**config, "seed": 7, "parameters": {"density": 0.3}}, "s3://bench/stopped", shard_size=SHARD)
    done = merge(config, "s3://bench/stopped", memory="1GiB", shard_size=SHARD)
    assert done.bytes_resumed > SHARD // 2
    assert server.keys("bench", "stopped") == output_bytes(tmp_path / "local")
    assert leftovers(server, "stopped") == []


class Breaking:
    """obstore, some of whose uploads break off as they end; `carried_out`: though the store has done what it was asked."""

    def __init__(self, numbers: set[int], *, carried_out: bool = False) -> None:
        self.uploads, self._numbers, self._carried_out = 0, numbers, carried_out

    def put(self, store: Any, key: str, parts: Iterator[bytes], **options: Any) -> Any:
        self.uploads += 1
        if self.uploads not in self._numbers:
            return library("s3").put(store, key, parts, **options)
        if self._carried_out:
            library("s3").put(store, key, parts, **options)
        for _ in parts:
            pass
        raise type("GenericError", (Exception,), {})("error sending request")

    def head(self, store: Any, key: str) -> Any:
        return library("s3").head(store, key)


@pytest.mark.parametrize(
    ("top", "shard_size", "numbers"),
    [
        ({"parameters": {"density": 0.5, "trim_scope": "model"}}, SHARD, {1, 2, 5}),
        ({"output": {"kind": "lora", "drop_rest": True}, "rank": 4}, None, {1, 2}),
        ({}, None, {1, 2}),
    ],
    ids=["shards", "adapter", "one shard"],
)
def test_a_shard_whose_upload_breaks_off_is_merged_again(
    top: dict[str, Any],
    shard_size: int | None,
    numbers: set[int],
    server: Server,
    models: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    """In the same process, which says so; statistics of the whole model are kept, and so is what was whole."""
    name, config = f"broken-{request.node.callspec.id[:3]}", config_for("ties", models, **top)
    how: dict[str, Any] = {"memory": "1GiB"} | ({"shard_size": shard_size} if shard_size else {})
    alone = merge(config, tmp_path / "local", **how)
    breaking, said = Breaking(numbers), list[str]()
    monkeypatch.setattr(object_upload, "library", lambda scheme: breaking)
    done = merge(config, f"s3://bench/{name}", **how, on_event=lambda event: said.append(_told(event)))
    assert server.keys("bench", name) == output_bytes(tmp_path / "local")
    assert leftovers(server, name) == []
    again = [line for line in said if line.endswith("its upload broke off, and it is merged again")]
    assert len(again) == len(numbers)
    assert done.bytes_resumed == 0
    assert breaking.uploads >= len(numbers) + alone.shards
    if shard_size:  # three of its shards were read again, and no pass over the whole model
        assert alone.bytes_read < done.bytes_read < 1.5 * alone.bytes_read


def _told(event: Any) -> str:
    return str(event.values.get("message", ""))


def test_a_shard_whose_upload_ended_unheard_is_not_merged_again(
    server: Server, models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_for("linear", models)
    shards = merge(config, tmp_path / "local", memory="1GiB", shard_size=SHARD).shards
    breaking = Breaking({1, 2}, carried_out=True)
    monkeypatch.setattr(object_upload, "library", lambda scheme: breaking)
    merge(config, "s3://bench/unheard", memory="1GiB", shard_size=SHARD)
    assert server.keys("bench", "unheard") == output_bytes(tmp_path / "local")
    assert breaking.uploads == shards


def test_uploads_that_break_off_for_ever_end_the_merge(
    server: Server, models: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    breaking = Breaking(set(range(1000)))
    monkeypatch.setattr(object_upload, "library", lambda scheme: breaking)
    monkeypatch.setattr(to_store, "_MOST_LOSSES", 2)
    with pytest.raises(WorldError, match="run the same command again"):
        merge(config_for("linear", models), "s3://bench/hopeless", memory="1GiB")
    assert breaking.uploads == 2


def test_a_shard_that_is_not_as_recorded_is_written_again(
    server: Server, models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_for("linear", models)
    merge(config, tmp_path / "local", memory="1GiB", shard_size=SHARD)
    with monkeypatch.context() as failing:
        failing.setattr("streammerge.output.object_commit.seal", cut)
        with pytest.raises(WorldError, match="as the network was cut"):
            merge(config, "s3://bench/replaced", memory="1GiB", shard_size=SHARD)
    shards = [key for key in server.keys("bench", "replaced") if key.endswith(".safetensors")]
    server.put("bench", f"replaced/{shards[0]}", b"something else")
    done = merge(config, "s3://bench/replaced", memory="1GiB", shard_size=SHARD)
    assert 0 < done.bytes_resumed < sum(map(len, output_bytes(tmp_path / "local").values()))
    assert server.keys("bench", "replaced") == output_bytes(tmp_path / "local")


def cut(manifest: Any) -> bytes:
    raise WorldError("as the network was cut")


def test_overwrite_removes_what_an_earlier_merge_left_and_nothing_else(
    server: Server, models: list[Path], tmp_path: Path
) -> None:
    merge(config_for("linear", models), "s3://bench/again", memory="1GiB", shard_size=SHARD)
    server.put("bench", "again/notes.txt", b"mine")
    config = config_for("ties", models)
    with pytest.raises(OutputError, match="holds a finished merge with a different"):
        merge(config, "s3://bench/again", memory="1GiB")
    merge(config, "s3://bench/again", memory="1GiB", overwrite=True)
    merge(config, tmp_path / "local", memory="1GiB")
    assert server.keys("bench", "again") == {**output_bytes(tmp_path / "local"), "notes.txt": b"mine"}
    server.put("bench", "foreign/notes.txt", b"mine")
    with pytest.raises(OutputError, match="did not write"):
        merge(config, "s3://bench/foreign", memory="1GiB", overwrite=True)


@pytest.mark.parametrize(
    ("out", "what"),
    [
        ("s3://bench/in/m1", "holds the input"),
        ("s3://bench/in", "holds the input"),
        ("s3://bench", "a whole bucket"),
        ("s3://nowhere/x", "there is no bucket"),
        ("s3://a:hunter2@bench/x", "not shown"),
        ("hf://org/x", "hf://"),
    ],
)
def test_an_output_that_cannot_be_is_refused(out: str, what: str, server: Server, models: list[Path]) -> None:
    with pytest.raises((InputError, OutputError), match=what) as caught:
        merge(in_store(config_for("linear", models), models), out, memory="1GiB")
    assert "hunter2" not in str(caught.value)
