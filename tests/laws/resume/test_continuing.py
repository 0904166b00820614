"""Finished work is kept, whatever the memory and threads of the next run."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from streammerge.api import merge
from streammerge.engine.streaming import Streamer
from streammerge.errors import InputError, Stopped, WorldError
from streammerge.output.journal import _load
from streammerge.output.place import JOURNAL as NAME
from streammerge.output.place import STATE
from streammerge.output.shards import ShardWriter
from streammerge.planning.job import Job
from tests.conftest import config_for, output_bytes, read_tensors, write_model
from tests.laws.resume.scene import SHAPES, Scene
from tests.laws.resume.traps import Trap, interrupt, set_trap


def test_finished_work_is_not_done_twice(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    out = scene.directory / "out"
    total = scene.merge(scene.directory / "whole").bytes_written
    interrupt(scene, out, monkeypatch, after=5)
    summary = scene.merge(out)
    assert summary.bytes_resumed > 0
    assert summary.bytes_written + summary.bytes_resumed == total
    scene.assert_finished(out)


@pytest.mark.parametrize(("capacity", "threads"), [(1 << 30, 1), (1 << 16, 3), (1 << 20, 2)])
def test_a_merge_is_resumed_with_other_memory_and_threads_to_the_same_bytes(
    capacity: int, threads: int, scene: Scene, small_capacity: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = scene.directory / "out"
    interrupt(scene, out, monkeypatch)
    small_capacity(capacity, threads)
    assert scene.merge(out, io="mmap").bytes_resumed > 0
    scene.assert_finished(out)


def test_a_value_that_is_not_finite_stops_a_resumed_merge_too(
    make_models: Callable[..., list[Path]], tmp_path: Path, small_capacity: Callable[[int, int], None]
) -> None:
    from safetensors.torch import load_file, save_file

    small_capacity(1 << 16, 1)
    paths = make_models(shapes=SHAPES)
    file = paths[2] / "model.safetensors"
    tensors = load_file(file)
    tensors["norm"][7] = torch.nan
    save_file(tensors, file, metadata={"format": "pt"})
    for _ in range(2):
        with pytest.raises(InputError, match=r"m2.*norm.*element 7"):
            merge(config_for("linear", paths), tmp_path / "out")
        assert not (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("method", "parameters", "again"),
    [
        ("sce", {"select_topk": 0.4}, False),
        ("ramplus_tl", {}, False),
        ("arcee_fusion", {}, False),
        # Dot products of every column are too many for the journal.
        ("nuslerp", {"nuslerp_flatten": False, "nuslerp_row_wise": True}, True),
    ],
)
def test_what_was_surveyed_is_not_surveyed_again_and_the_bytes_are_the_same(
    method: str,
    parameters: dict[str, Any],
    again: bool,
    make_models: Callable[..., list[Path]],
    tmp_path: Path,
    small_capacity: Callable[[int, int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    small_capacity(1 << 17, 1)
    config = config_for(method, make_models(shapes={"w": (700, 64)}), parameters=parameters)
    merge(config, tmp_path / "whole")
    stop = threading.Event()
    surveyed: list[int] = []
    survey = Streamer._add_loaded

    def counted(self: Streamer, job: Job, *rest: Any) -> None:
        surveyed.append(job.ordinal)
        survey(self, job, *rest)

    monkeypatch.setattr(Streamer, "_add_loaded", counted)
    write = ShardWriter.write

    def write_then_stop(self: ShardWriter, *arguments: Any) -> None:
        write(self, *arguments)
        if surveyed and arguments[2].size > 1024:  # not the small tensor beside it, whose turn may come first
            stop.set()

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "write", write_then_stop)
        with pytest.raises(Stopped):
            merge(config, tmp_path / "out", stop=stop, signal_received=lambda: 15)
    assert surveyed
    surveyed.clear()
    assert merge(config, tmp_path / "out").bytes_resumed > 0
    assert bool(surveyed) == again
    assert output_bytes(tmp_path / "out") == output_bytes(tmp_path / "whole")


def test_a_stop_during_streamed_statistics_ends_and_concludes_nothing(scene: Scene, tmp_path: Path) -> None:
    stop = threading.Event()
    stop.set()
    out = tmp_path / "stopped"
    with pytest.raises(Stopped):
        scene.merge(out, stop=stop, signal_received=lambda: 15)
    with pytest.raises(Stopped):
        scene.merge(out, stop=stop)  # without a signal too
    scene.merge(out)
    assert output_bytes(out) == scene.expected


def test_what_is_not_finite_in_a_copied_tensor_is_not_copied_twice(
    make_models: Callable[..., list[Path]],
    tmp_path: Path,
    small_capacity: Callable[[int, int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    small_capacity(1 << 16, 1)
    paths = make_models(shapes=SHAPES)
    tensors = read_tensors(paths[0])
    tensors["embed.weight"][0, 0] = torch.inf
    write_model(paths[0], tensors)
    config, out = config_for("ties", paths, exclude=["^embed"]), tmp_path / "out"
    with monkeypatch.context() as patch:
        set_trap(patch, "ShardWriter.write", Trap(WorldError("full"), 3, once=False))
        with pytest.raises(WorldError):
            merge(config, out)
    progress, _ = _load(out / STATE / NAME)
    assert progress is not None
    assert any(receipt.not_finite for receipt in progress.receipts)
    done = sum(receipt.stop - receipt.start for receipt in progress.receipts if receipt.job)
    assert merge(config, out).bytes_resumed == 2 * done + 8 * 16
