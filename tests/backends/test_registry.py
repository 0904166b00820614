"""A backend is one value: registered, it serves every merge on its device, and nothing else is edited."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from streammerge.algebra.block import Block, BlockMath
from streammerge.algebra.extent import Extent
from streammerge.api import choose_device, merge, plan
from streammerge.backends.base import Backend, BufferHooks
from streammerge.backends.cpu.backend import CPU
from streammerge.backends.registry import BACKENDS, register_backend
from streammerge.backends.torch.backend import CUDA, TORCH
from streammerge.errors import InputError
from streammerge.io.buffer_pool import Bytes
from tests.conftest import config_for, output_bytes

calls: Counter[str] = Counter()


def counted_math(block: Block, device: str, extent: Extent) -> BlockMath:
    calls["math"] += 1
    return TORCH.math(block, "cpu", extent)


@contextmanager
def counted_turn(device: str) -> Iterator[None]:
    assert device == "counter:1"
    calls["turn"] += 1
    yield


def prepare(buffer: Bytes) -> None:
    calls["prepared"] += 1


def release(buffer: Bytes) -> None:
    calls["released"] += 1


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> Backend:
    """Register torch on the CPU once more, as a device that counts what it is asked for and has two numbers."""
    for name in [name for name in BACKENDS if name == "counter"]:
        monkeypatch.delitem(BACKENDS, name)
    backend = replace(
        TORCH,
        name="counter",
        device="counter",
        find=lambda number: f"counter:{number}" if number < 2 else None,
        math=counted_math,
        turn=counted_turn,
        buffers=BufferHooks(prepare, release),
    )
    monkeypatch.setitem(BACKENDS, "counter", backend)
    calls.clear()
    return backend


def test_a_registered_backend_merges_by_itself(
    counter: Backend, make_models: Callable[..., list[Path]], tmp_path: Path
) -> None:
    config = config_for("ties", make_models(), parameters={"density": 0.4})
    assert plan(config, device="counter:1").backend is counter
    merge(config, tmp_path / "counted", device="counter:1", progress=False)
    merge(config, tmp_path / "cpu", device="cpu", progress=False)
    assert output_bytes(tmp_path / "counted") == output_bytes(tmp_path / "cpu")
    assert calls["math"] > 0
    assert calls["turn"] > 0
    assert calls["prepared"] == calls["released"] > 0


def test_the_reserve_of_a_backend_is_that_of_the_plan(
    counter: Backend, make_models: Callable[..., list[Path]]
) -> None:
    config = config_for("linear", make_models())
    reserves = {
        device: plan(config, device=device, kernels=True).budget.reserve for device in ("cpu", "counter")
    }
    assert reserves["counter"] - reserves["cpu"] == counter.reserve - CPU.reserve


@pytest.mark.parametrize("device", ["count", "cpu:1", "torch", "counter:x"])
def test_a_device_that_nobody_registered_is_refused(counter: Backend, device: str) -> None:
    with pytest.raises(InputError, match=r"is not one of auto, cpu, cuda, counter, cuda:N$"):
        choose_device(device)


def test_a_number_that_the_backend_does_not_find_is_refused(counter: Backend) -> None:
    assert choose_device("counter") == "counter:0"
    with pytest.raises(InputError, match="no such device"):
        choose_device("counter:2")


def test_names_are_unique() -> None:
    for backend in (CPU, TORCH, CUDA):
        with pytest.raises(ValueError, match="already exists"):
            register_backend(backend)
