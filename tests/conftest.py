"""Small models on disk, and budgets small enough that small tensors are streamed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

from streammerge.planning.memory import budget as budgets
from streammerge.testing import models
from streammerge.testing.models import (
    config_for,
    output_bytes,
    read_tensors,
    write_fisher,
    write_grams,
    write_model,
)
from tests.fixed_budget import Fixed
from tests.s3_server import Server, running

__all__ = ["config_for", "output_bytes", "read_tensors", "write_fisher", "write_grams", "write_model"]

SHAPES: dict[str, tuple[int, ...]] = {
    "model.embed_tokens.weight": (700, 64),
    "model.layers.0.mlp.down_proj.weight": (96, 130),
    "model.layers.0.input_layernorm.weight": (64,),
    "model.layers.1.mlp.down_proj.weight": (96, 130),
    "model.layers.1.input_layernorm.weight": (64,),
    "scalar": (),
}

write_models = partial(models.write_models, shapes=SHAPES)
"""Write [base, model 1, model 2, ...] of these shapes; see `streammerge.testing.models`."""


WITHOUT_MERGES = {"test_layers.py", "test_errors.py", "test_messages_page.py", "test_mutate_protections.py"}
"""Files whose tests merge nothing, so that these alone need no kernels."""


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Return a real S3 server."""
    with running(tmp_path_factory.mktemp("s3")) as server:
        yield server


settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")

LONG = (
    "launch/test_ray.py",
    "laws/joined/test_joined_stores.py",
    "laws/joined/test_joined.py",
    "engine/test_object_stores.py",
    "laws/test_methods.py",
    "laws/memory/test_peak.py",
    "laws/resume/test_power_loss.py",
    "laws/resume/test_failures.py",
    "laws/hostile/test_hostile.py",
    "backends/fused/test_bits.py",
    "laws/resume/test_forks.py",
    "laws/resume/test_signals.py",
    "estimate/fisher/test_compute.py",
    "laws/resume/test_faults.py",
    "laws/resume/test_damage.py",
    "engine/test_nonfinite.py",
    "methods/test_reference_drop.py",
    "engine/test_executors.py",
    "laws/hostile/test_streams.py",
    "backends/fused/test_code.py",
)
"""Files that take more than ten seconds, those that mostly wait first: begun last, one would keep a single CPU busy at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take long; xdist hands out files in this order (`--no-loadscope-reorder`)."""
    places = {Path(__file__).parent / name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path, len(LONG)))


@pytest.fixture(autouse=True, scope="session")
def kernels(request: pytest.FixtureRequest) -> None:
    """Compile all kernels once on a machine: merges as small as these would go through torch until then.

    Each process of pytest-xdist begins with a part of its own.
    """
    if {item.path.name for item in request.session.items} <= WITHOUT_MERGES:
        return
    from streammerge.backends.cpu.compile import GROUPS, ensure_compiled

    part, parts = (
        os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:],
        os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"),
    )
    assert ensure_compiled(GROUPS[int(part) :: int(parts)]) is None
    assert ensure_compiled() is None


@pytest.fixture(autouse=True)
def auto_means_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a merge use a GPU only where a test asks for it, on any machine."""
    monkeypatch.setattr("streammerge.planning.backend.gpus", list)


@pytest.fixture
def make_models(tmp_path: Path) -> Callable[..., list[Path]]:
    """Return `write_models` for the test's directory."""
    return partial(write_models, tmp_path)


def use_capacity(monkeypatch: pytest.MonkeyPatch, capacity: int, threads: int) -> None:
    """Give later merges a capacity in bytes and a number of threads."""

    def make_budget(memory: int | None, n: int | None, reserve: int) -> budgets.Budget:
        return Fixed(reserve + capacity, reserve, threads)

    monkeypatch.setattr(budgets, "make_budget", make_budget)


@pytest.fixture
def small_capacity(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """Return `use_capacity` for the length of the test."""
    return partial(use_capacity, monkeypatch)


def as_float64(path: Path) -> dict[str, np.ndarray]:
    """Return a model's float tensors as float64."""
    return {k: t.double().numpy() for k, t in read_tensors(path).items() if t.is_floating_point()}
