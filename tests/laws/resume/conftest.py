"""The merges that the tests of this folder interrupt."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.laws.resume.fault_scenes import tmpfs
from tests.laws.resume.scene import CASES, Scene, make_scene
from tests.laws.resume.slow_merge import Slow

__all__ = ["scene", "slow", "tmpfs"]


@pytest.fixture(params=list(CASES))
def scene(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Scene:
    return make_scene(request.param, tmp_path, monkeypatch)


@pytest.fixture
def slow(make_models: Callable[..., list[Path]], tmp_path: Path) -> Iterator[Slow]:
    shapes = {f"layers.{i}.weight": (512, 256) for i in range(20)} | {"norm": (256,)}
    slow = Slow(make_models(n_models=2, shapes=shapes), tmp_path)
    yield slow
    for process in slow.running:
        if process.poll() is None:
            process.kill()
        process.communicate()
