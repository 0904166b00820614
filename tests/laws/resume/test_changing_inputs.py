"""Inputs that change while they are merged."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from streammerge.errors import OutputError, StreammergeError, WorldError
from streammerge.events import Event
from tests.laws.resume.scene import Scene, flip_middle_of_a_tensor
from tests.laws.resume.traps import interrupt


def shorten(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def touch(path: Path) -> None:
    os.utime(path, ns=(1, 1))


def replace_content(path: Path) -> None:
    path.write_bytes(b"x" * path.stat().st_size)


@pytest.mark.parametrize("change", [flip_middle_of_a_tensor, shorten, Path.unlink, touch])
@pytest.mark.parametrize("moment", ["start", "progress"])
@pytest.mark.parametrize("io", ["direct", "read", "mmap"])
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


@pytest.mark.parametrize("change", [shorten, Path.unlink, replace_content])
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
@pytest.mark.parametrize("moment", ["start", "progress", "commit"])
def test_a_file_beside_the_weights_that_changes_during_the_merge_is_never_a_success(
    moment: str, name: str, change: Callable[[Path], None], scene: Scene
) -> None:
    """They are read last of all."""
    out = scene.directory / "out"
    path = scene.paths[0] / name

    def on_event(event: Event) -> None:
        if event.kind == moment and path.exists() and path.read_bytes() == before:
            change(path)

    before = path.read_bytes()
    with pytest.raises(
        WorldError, match=rf"base/{name}: an input (is gone|changed during the merge).*--overwrite"
    ):
        scene.merge(out, on_event=on_event)
    scene.assert_nothing_torn(out)
    assert not (out / "model.safetensors").exists()
    assert not (out / "model.safetensors.index.json").exists()


@pytest.mark.parametrize("change", [Path.unlink, replace_content])
def test_a_file_beside_the_weights_that_changed_since_an_interruption_is_refused_by_name(
    change: Callable[[Path], None], scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = scene.directory / "out"
    interrupt(scene, out, monkeypatch)
    change(scene.paths[0] / "tokenizer.json")
    with pytest.raises(OutputError, match=r"version of the files beside .*base.*--overwrite"):
        scene.merge(out)


def test_a_file_beside_the_weights_that_came_since_an_interruption_is_refused_by_name(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = scene.directory / "out"
    interrupt(scene, out, monkeypatch)
    (scene.paths[0] / "vocab.txt").write_text("new")
    with pytest.raises(OutputError, match=r"version of the files beside .*base"):
        scene.merge(out)
