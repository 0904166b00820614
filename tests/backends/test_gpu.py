"""The GPU path: where there is one, the same bytes as the CPU; anywhere, what happens when its memory runs out."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from streammerge.algebra.block import Operand
from streammerge.api import merge
from streammerge.backends.torch import math as torch_pieces
from streammerge.backends.torch.device_block import DeviceBlock
from streammerge.backends.torch.math import TorchMath
from streammerge.errors import WorldError
from streammerge.io.buffer_pool import Bytes, Pool
from streammerge.testing.models import write_models
from tests.conftest import config_for, output_bytes
from tests.laws.test_methods import VARIANTS

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[int]]:
    """Return a function that makes every block larger than so many elements run out of memory.

    It returns a list of the blocks that did.
    """

    def allow(elements: int) -> list[int]:
        failed: list[int] = []
        tensor = DeviceBlock.tensor

        def limited(self: DeviceBlock, operand: Operand, a: int, b: int) -> torch.Tensor:
            if b - a > elements:
                failed.append(b - a)
                raise torch.OutOfMemoryError
            return tensor(self, operand, a, b)

        monkeypatch.setattr(DeviceBlock, "tensor", limited)
        return failed

    return allow


@pytest.fixture(scope="module")
def even_models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Models of rows that divide 4096: a block of whole rows and whole sums of 4096 elements is no larger than that."""
    shapes = {"w": (48, 128), "v": (20, 256), "norm": (64,), "scalar": ()}
    return write_models(tmp_path_factory.mktemp("even"), shapes=shapes)


@pytest.mark.parametrize(("method", "parameters"), VARIANTS)
def test_blocks_shrink_until_they_fit_and_the_bytes_are_the_same(
    method: str,
    parameters: dict[str, Any],
    even_models: list[Path],
    tmp_path: Path,
    room: Callable[[int], list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if method == "regmean":
        pytest.skip("its matrix products are always of as many rows: smaller ones might round otherwise")
    config = config_for(method, even_models, parameters=parameters)
    merge(config, tmp_path / "whole", kernels=False)
    expected, failed = output_bytes(tmp_path / "whole"), room(4096)
    for keep in (False, True):
        monkeypatch.setattr(torch_pieces, "TorchMath", partial(TorchMath, keep=keep))
        failed.clear()
        merge(config, tmp_path / f"shrunk {keep}", kernels=False)
        assert failed
        assert output_bytes(tmp_path / f"shrunk {keep}") == expected


def test_where_the_smallest_block_does_not_fit_the_error_says_what_to_do(
    make_models: Callable[..., list[Path]], tmp_path: Path, room: Callable[[int], list[int]]
) -> None:
    room(0)
    with pytest.raises(WorldError, match=r"is out of memory: free .*--device cpu"):
        merge(config_for("task_arithmetic", make_models()), tmp_path / "out", kernels=False)


def test_a_pool_prepares_each_buffer_once_and_dismisses_all_of_them() -> None:
    made: list[int] = []
    given_up: list[int] = []

    def note(where: list[int]) -> Callable[[Bytes], None]:
        return lambda buffer: where.append(buffer.ctypes.data)

    pool, stop = Pool(1 << 20, note(made), note(given_up)), threading.Event()
    for size in (1 << 18, 1 << 18, 1 << 19, 1 << 20):
        with pool.lease(size, stop) as buffer:
            assert buffer is not None
            assert buffer.ctypes.data in made
    pool.close()
    assert len(made) == 3
    assert sorted(given_up) == sorted(made)


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("method", "parameters"), VARIANTS)
def test_a_gpu_gives_the_bytes_of_the_cpu(
    method: str,
    parameters: dict[str, Any],
    dtype: torch.dtype,
    make_models: Callable[..., list[Path]],
    tmp_path: Path,
) -> None:
    config = config_for(method, make_models(dtype=dtype), parameters=parameters)
    merge(config, tmp_path / "cpu", device="cpu")
    merge(config, tmp_path / "gpu", device="cuda")
    assert output_bytes(tmp_path / "gpu") == output_bytes(tmp_path / "cpu")
