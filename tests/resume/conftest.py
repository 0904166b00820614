"""The merges that the tests of this folder interrupt."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.resume.scene import CASES, SHAPES, Scene
from tests.resume.slow_merge import Slow


@pytest.fixture(params=list(CASES))
def scene(
    request: pytest.FixtureRequest,
    make_models: Callable[..., list[Path]],
    small_capacity: Callable[[int, int], None],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> Scene:
    small_capacity(1 << 17, 1)
    # Nothing here cuts the power, and waiting for the disk is most of the time of a small merge.
    for name in ("fsync", "fdatasync"):
        monkeypatch.setattr(os, name, lambda descriptor: None)
    return Scene(request.param, make_models(n_models=2, shapes=SHAPES), tmp_path)


@pytest.fixture
def slow(make_models: Callable[..., list[Path]], tmp_path: Path) -> Iterator[Slow]:
    shapes = {f"layers.{i}.weight": (512, 256) for i in range(20)} | {"norm": (256,)}
    slow = Slow(make_models(n_models=2, shapes=shapes), tmp_path)
    yield slow
    for process in slow.running:
        if process.poll() is None:
            process.kill()
        process.communicate()
