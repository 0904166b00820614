"""Stores of Fisher diagonals for tests, of small chunks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from streammerge.estimate.fisher.importing import import_diagonal
from streammerge.formats import zarr_writer as store
from streammerge.formats.zarr_store import ATTRIBUTE
from tests.conftest import write_fisher

SHAPES: dict[str, tuple[int, ...]] = {
    "embed": (700, 64),
    "layers.0.w": (96, 130),
    "layers.1.w": (6, 5, 7, 3),
    "norm": (4099,),
    "scalar": (),
    "one": (1, 9),
}


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "CHUNK_ELEMENTS", 5000)


@pytest.fixture
def paths(make_models: Callable[..., list[Path]]) -> list[Path]:
    return make_models(shapes=SHAPES)


def make_store(model: Path, **options: Any) -> Path:
    """Import the diagonal of a model, as the tests make it, into a store beside it."""
    out = model.with_name(f"{model.name}.zarr")
    import_diagonal(model, write_fisher(model), out, **options)
    return out


def tree(directory: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()
    }


def entry(group: dict[str, Any]) -> dict[str, Any]:
    return group["attributes"][ATTRIBUTE]["tensors"]["embed"]
