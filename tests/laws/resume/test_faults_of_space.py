"""Maps that shrink, and disks without room."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from streammerge.errors import WorldError
from streammerge.events import Event
from streammerge.io import allocate
from tests.laws.resume.fault_scenes import (
    one_scene,
)
from tests.laws.resume.scene import Scene
from tests.laws.resume.slow_merge import ROOT
from tests.laws.resume.traps import cannot_allocate

# --- maps


_SHRINKS = """
import os, sys
import numpy as np
from streammerge.io import local_file, reader
from streammerge.errors import WorldError
path, moment = sys.argv[1:]
def cut():
    os.truncate(path, 8192)
if moment == "before the map":
    real_map = local_file.mmap.mmap
    local_file.mmap.mmap = lambda *a, **k: (cut(), real_map(*a, **k))[1]
else:
    real_copy = local_file.copy_mapped
    local_file.copy_mapped = lambda *a: (cut(), real_copy(*a))[1]
target = np.zeros(1 << 20, np.uint8)
try:
    reader.Reader("mmap").read_into(path, 100, target)
except WorldError as error:
    print(error)
"""


@pytest.mark.parametrize("moment", ["before the map", "before the copy"])
def test_a_mapped_file_that_shrinks_under_the_copy_is_an_error_and_no_bus_error(
    moment: str, tmp_path: Path
) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(2 << 20))
    done = subprocess.run(
        [sys.executable, "-c", _SHRINKS, str(path), moment], capture_output=True, text=True, cwd=ROOT
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert f"{path}: the file became shorter while it was read" in done.stdout


# --- room


@one_scene
def test_where_no_room_can_be_reserved_nothing_is_written_to_reserve_it_and_a_warning_says_so(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """glibc would write a byte into every page of the file in place of what the file system does not know."""
    written: list[int] = []
    real = os.pwrite

    def pwrite(descriptor: int, data: Any, offset: int) -> int:
        written.append(len(data))
        return real(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    monkeypatch.setattr(allocate, "fallocate", cannot_allocate)
    events: list[Event] = []
    out = scene.directory / "out"
    scene.merge(out, on_event=events.append)
    assert any("cannot reserve space on this file system" in str(event.values) for event in events)
    assert 1 not in written


@one_scene
def test_an_output_that_the_disk_has_no_room_for_is_refused_with_both_numbers_before_anything_is_made(
    scene: Scene, tmpfs: Callable[[str], Path]
) -> None:
    out = tmpfs("size=64k") / "out"
    with pytest.raises(WorldError, match=r"needs [\d.]+ [KM]iB, [\d.]+ [KM]iB are free.*free some space"):
        scene.merge(out)
    assert not out.exists()
