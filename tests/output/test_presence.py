"""Two hosts whose locks mean nothing to each other: signs of life, and files of their own."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from streammerge.api import merge
from streammerge.engine import session as engine
from streammerge.errors import OutputError, WorldError
from streammerge.io.private import finished_name, is_private, own_token, private
from streammerge.output.directory import sweep
from streammerge.output.heartbeat import domain_of
from streammerge.output.place import STATE, WORKERS, place_of
from streammerge.output.shards import ShardWriter
from streammerge.planning.layout import Layout, Shard, Slot
from tests.conftest import config_for, write_model

HEADER = b"\x02\0\0\0\0\0\0\0{}"
LAYOUT = Layout((Shard("model.safetensors", HEADER, 18, ((0, 0),)),), ((Slot(0, 10, 8),),))


@pytest.fixture
def config(tmp_path: Path) -> dict[str, Any]:
    tensors = {"weight": torch.ones(8)}
    return config_for("linear", [write_model(tmp_path / name, tensors) for name in ("base", "a", "b")])


def interrupted(config: dict[str, Any], out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave an unfinished merge."""

    def fail(*_: object) -> None:
        raise WorldError("stopped here")

    with monkeypatch.context() as patch:
        patch.setattr(engine, "commit", fail)
        with pytest.raises(WorldError, match="stopped here"):
            merge(config, out, progress=False)


def leave_sign(out: Path, domain: str, seconds: float) -> Path:
    """Leave the sign of life that a process elsewhere gave some seconds ago."""
    (out / STATE / WORKERS).mkdir(exist_ok=True)
    path = out / STATE / WORKERS / "0123456789ab.json"
    path.write_text(json.dumps({"host": "n08", "pid": 7, "domain": domain, "run": "", "progress": {}}))
    then = path.stat().st_mtime - seconds
    os.utime(path, (then, then))
    return path


@pytest.mark.parametrize(
    ("elsewhere", "seconds", "refused"), [(True, 3, True), (True, 99, False), (False, 3, False)]
)
def test_a_merge_that_works_on_another_host_is_refused_and_a_dead_one_is_not(
    elsewhere: bool,
    seconds: float,
    refused: bool,
    config: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On one host the lock has decided: whoever gets it may go on at once after a kill."""
    out = tmp_path / "out"
    interrupted(config, out, monkeypatch)
    leave_sign(out, "n08:1" if elsewhere else domain_of(out), seconds)
    before = sorted(path.name for path in out.rglob("*"))
    if refused:
        with pytest.raises(
            OutputError, match=r"process 7 on n08, heard of .* ago: wait .* again in 1 min 00 s"
        ):
            merge(config, out, progress=False, overwrite=True)
        assert sorted(path.name for path in out.rglob("*")) == before
    else:
        merge(config, out, progress=False)
        assert not (out / STATE).exists()


def test_signs_of_life_that_cannot_be_read_count_as_none(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    interrupted(config, out, monkeypatch)
    for place, text in enumerate(["", "[]", '{"host": 1}', "[" * 9000]):
        (out / STATE / WORKERS).mkdir(exist_ok=True)
        (out / STATE / WORKERS / f"{place}.json").write_text(text)
    merge(config, out, progress=False)
    assert not (out / STATE).exists()


def test_hosts_that_begin_at_the_same_moment_write_into_files_of_their_own(tmp_path: Path) -> None:
    place = place_of(tmp_path)
    first, second = (ShardWriter(place, LAYOUT, direct=False) for _ in range(2))
    try:
        first.open(anew=True)
        second.open(anew=True)
        for writer, byte in ((second, b"2"), (first, b"1")):
            writer.write(0, 10, np.frombuffer(byte * 8, np.uint8))
        with pytest.raises(OutputError, match="a different merge has put its own file there"):
            first.publish(0)
        second.publish(0)
        assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
        assert (tmp_path / "model.safetensors").read_bytes() == HEADER + b"2" * 8
    finally:
        first.close()
        second.close()


def test_what_a_dead_process_had_not_finished_is_removed_and_shards_are_not(tmp_path: Path) -> None:
    place = place_of(tmp_path)
    ours = ["README.md", "1_Pooling/config.json", "model.safetensors"]
    names = [*ours, "mine.txt"]
    (tmp_path / "1_Pooling").mkdir()
    for name in names:
        place.private(name).write_bytes(b"half")
        place.partial(name).write_bytes(b"kept")
    sweep(place, ours)
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert left == sorted([f"mine.txt.{own_token()}.partial", *(f"{name}.partial" for name in names)])


def test_a_fork_has_a_name_of_its_own() -> None:
    read, write = os.pipe()
    if not (child := os.fork()):
        os.write(write, own_token().encode())
        os._exit(0)
    os.waitpid(child, 0)
    theirs = os.read(read, 100).decode()
    assert theirs != own_token()
    name = f"a.{'0' * 16}.{theirs}.partial"
    assert is_private(name)
    assert finished_name(name) == "a"
    assert private(Path("x/a")).name == f"a.{own_token()}.partial"
