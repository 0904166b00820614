"""What a shared merge relies on: the store's clock, signs of life that stand for work, and records after their data."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from streammerge.api import merge
from streammerge.output import heartbeat
from streammerge.output.heartbeat import Heard, Heartbeat
from streammerge.output.shared_ledger import SharedLedger
from streammerge.output.volume import Folder
from tests.conftest import config_for, output_bytes, write_model

RUN = "0123456789abcdef"


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    folder = Folder(tmp_path / "state")
    folder.prepare(RUN)
    return folder


@pytest.mark.parametrize("hours", [-5, 5])
def test_the_clock_of_a_host_does_not_count(
    hours: int, folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Heartbeat(folder, "elsewhere", RUN, dict)
    other.worker = "00000002"
    other._tell()
    monkeypatch.setattr(time, "time", lambda real=time.time: real() + 3600 * hours)
    assert Heard(folder).of("00000002")
    os.utime(folder.root / other.name, (time.time() - 3600 * hours - 100,) * 2)  # by the store's clock
    assert not Heard(folder).of("00000002")


@pytest.mark.parametrize(
    ("moved", "cpu", "idle", "signs"),
    [(0, 0.0, False, 1), (1, 0.0, False, 4), (0, 9.0, False, 4), (0, 0.0, True, 4)],
    ids=["hangs", "moves bytes", "computes", "waits for others"],
)
def test_a_process_that_hangs_gives_no_sign_of_life(
    moved: int, cpu: float, idle: bool, signs: int, folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    put: list[str] = []
    monkeypatch.setattr(folder, "put", lambda name, data, durable: put.append(name))
    beats = iter(range(100))
    monkeypatch.setattr(heartbeat.time, "process_time", lambda: cpu * next(beats))
    one = Heartbeat(folder, "here", RUN, lambda: {"moved": moved * next(beats), "idle": idle})
    waits = iter([False, False, False, True])
    monkeypatch.setattr(one._stop, "wait", lambda seconds: next(waits))
    one._tell()
    one._beat()
    assert len(put) == signs


@pytest.fixture
def config(tmp_path: Path) -> dict[str, Any]:
    tensors = {f"layers.{i}.w": torch.arange(8.0) + i for i in range(3)}
    paths = [write_model(tmp_path / name, tensors) for name in ("base", "a")]
    return config_for("task_arithmetic", paths)


def test_a_record_comes_after_the_sync_of_its_data(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []

    def noting(real: Any) -> Any:
        def sync(descriptor: int) -> None:
            done.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
            real(descriptor)

        return sync

    for name in ("fsync", "fdatasync"):
        monkeypatch.setattr(os, name, noting(getattr(os, name)))
    record = SharedLedger.record

    def noted(own: SharedLedger, unit: str, value: Any) -> None:
        done.append(unit)
        record(own, unit, value)
        done.append(f"end of {unit}")

    monkeypatch.setattr(SharedLedger, "record", noted)
    merge(config, tmp_path / "out", join=True, shard_size=32, progress=False)
    for number in range(3):
        begins, ends = done.index(f"merge-{number:05d}"), done.index(f"end of merge-{number:05d}")
        assert any(name.startswith(f"model-{number + 1:05d}") for name in done[:begins]), done
        assert any(f"merge-{number:05d}.done" in name for name in done[begins + 1 : ends]), done


def test_records_that_are_seen_late_cost_time_only(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a file system's clients cache what a directory holds."""
    merge(config, tmp_path / "alone", shard_size=32, progress=False)
    monkeypatch.setenv(heartbeat.STALE_SECONDS, "0.4")
    real, seen = Folder.names, dict[str, Iterator[list[str]]]()

    def late(own: Folder, folder: str = "") -> list[str]:
        found = real(own, folder)
        if folder not in seen:
            seen[folder] = iter([found] * 4)  # the next four looks show what there was
        return next(seen[folder], found)

    monkeypatch.setattr(Folder, "names", late)
    merge(config, tmp_path / "out", join=True, shard_size=32, progress=False)
    assert output_bytes(tmp_path / "out") == output_bytes(tmp_path / "alone")
