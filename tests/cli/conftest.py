"""Small models and a config to merge them by; the command line in this process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.running import FEW, write_config
from tests.cli.running import cli as cli
from tests.conftest import config_for


@pytest.fixture
def paths(make_models: Callable[..., list[Path]]) -> list[Path]:
    return make_models(shapes=FEW)


@pytest.fixture
def config(paths: list[Path], tmp_path: Path) -> Path:
    return write_config(
        tmp_path / "config.yml", config_for("task_arithmetic", paths, parameters={"lambda": 0.5})
    )
