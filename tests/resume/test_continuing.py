"""Finished work is kept, whatever the memory and threads of the next run."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from streammerge.api import merge
from streammerge.errors import InputError, Stopped
from tests.conftest import config_for, output_bytes
from tests.resume.scene import SHAPES, Scene
from tests.resume.traps import interrupt


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
