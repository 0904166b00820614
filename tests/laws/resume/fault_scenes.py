"""Scenes in which faults are made, and what they must end in."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

one_scene = pytest.mark.parametrize("scene", ["dare"], indirect=True)


def mount(place: Path, options: str) -> None:
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("this process may not mount a file system")


@pytest.fixture
def tmpfs(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Return a function that mounts a file system in memory, or mounts it again with other options."""
    place = tmp_path / "mounted"
    place.mkdir()

    def use(options: str) -> Path:
        mount(place, f"remount,{options}" if os.path.ismount(place) else options)
        return place

    yield use
    if os.path.ismount(place):
        subprocess.run(["umount", "-l", str(place)], check=True)
