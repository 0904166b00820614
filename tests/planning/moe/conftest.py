"""The dense models that the mixtures of these tests are made of."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from tests.planning.moe.dense import write_dense

Dense = Callable[[str, int], Path]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Dense:
    """Return a function that gives the directory of a model of a family; each is written once."""
    folder = tmp_path_factory.mktemp("dense")

    @cache
    def get(family: str, number: int) -> Path:
        return write_dense(folder / f"{family}-{number}", family, number)

    return get
