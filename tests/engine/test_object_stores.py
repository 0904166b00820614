"""Merges from and to a real S3 server: the same bytes as from and to directories, whatever happens to the server."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from streammerge.api import merge
from streammerge.io import object_stores
from streammerge.io.object_file import ObjectFile
from tests.conftest import config_for, output_bytes, write_models
from tests.s3_server import Server, running

OF_MERGE = ("model.safetensors", "config.json")


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
def server(started: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name, value in started.environment().items():
        monkeypatch.setenv(name, value)
    object_stores.close_stores()
    yield started
    object_stores.close_stores()


@pytest.fixture(scope="module")
def models(started: Server, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("models")
    paths = write_models(root, 2)
    config_for("regmean", paths)  # writes Gram matrices beside them
    started.copy_in(root, "bench", "in")
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
    merge(in_store(config, models), tmp_path / "out", memory="1GiB")
    again.join()
    assert output_bytes(tmp_path / "out")[OF_MERGE[0]] == output_bytes(tmp_path / "local")[OF_MERGE[0]]
