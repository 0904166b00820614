"""Inputs that change while they are merged."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from streammerge.engine.session import Event
from streammerge.errors import StreammergeError
from tests.resume.scene import Scene, flip_middle_of_a_tensor


def shorten(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def touch(path: Path) -> None:
    os.utime(path, ns=(1, 1))


@pytest.mark.parametrize("change", [flip_middle_of_a_tensor, shorten, Path.unlink, touch])
@pytest.mark.parametrize("moment", ["start", "progress"])
@pytest.mark.parametrize("io", ["read", "mmap"])
def test_an_input_that_changes_during_the_merge_is_never_a_success(
    io: str, moment: str, change: Callable[[Path], None], scene: Scene
) -> None:
    out = scene.directory / "out"
    changed = []

    def on_event(event: Event) -> None:
        if event.kind == moment and not changed:
            changed.append(moment)
            change(scene.paths[2] / "model.safetensors")

    with pytest.raises(StreammergeError, match="m2") as caught:
        scene.merge(out, on_event=on_event, io=io)
    assert caught.value.exit_code in (1, 2)
    assert "\n" not in str(caught.value)
    scene.assert_nothing_torn(out)
    assert not (out / "model.safetensors").exists()
    assert not (out / "model.safetensors.index.json").exists()
