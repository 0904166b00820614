"""Methods of whole matrices on a GPU, which is played by the CPU: where tensors are made, and what its memory does not hold."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from streammerge.algebra.block import Applied, Block, Operand
from streammerge.algebra.extent import Extent
from streammerge.algebra.rules import MatrixMerge, Rule
from streammerge.algebra.rules.matrix_merge import Deltas
from streammerge.api import merge, plan
from streammerge.backends.base import Backend
from streammerge.backends.gpu.backend import FUSED
from streammerge.backends.registry import BACKENDS
from streammerge.backends.torch.backend import CUDA, TORCH
from streammerge.backends.torch.device_block import DeviceHooks
from streammerge.backends.torch.math import TorchMath
from streammerge.errors import InputError, WorldError
from streammerge.methods.catalog import load_builtin
from streammerge.methods.registry import all_methods
from streammerge.planning.backend import rest_of
from tests.conftest import config_for, output_bytes, write_model

load_builtin()
METHODS = sorted(name for name, one in all_methods().items() if one.matrices and one.origin == "built in")
SHAPES = {
    "model.layers.0.mlp.up_proj.weight": (61, 24),
    "model.layers.0.mlp.experts.down_proj": (3, 10, 17),
    "model.layers.0.input_layernorm.weight": (24,),
}
FACTORIES = {
    torch.empty,
    torch.zeros,
    torch.ones,
    torch.full,
    torch.eye,
    torch.arange,
    torch.tensor,
    torch.rand,
}


class Placed(TorchFunctionMode):
    """Refuses tensors of which nobody says where they are made, and those that leave the device whole."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        assert func not in FACTORIES or (kwargs or {}).get("device") is not None, f"{func} without a device"
        return func(*args, **(kwargs or {}))


class Played(TorchMath):
    """The arithmetic of a GPU."""

    def apply(self, rule: Rule, out: Operand) -> Applied:
        if isinstance(rule, MatrixMerge):
            combine = rule.combine

            def guarded(deltas: Deltas) -> torch.Tensor:
                with Placed():
                    return combine(deltas)

            rule = replace(rule, combine=guarded)
        return super().apply(rule, out)


@pytest.fixture
def freed() -> list[str]:
    """Return the devices whose unused memory was given back."""
    return []


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, freed: list[str]) -> Callable[[int], None]:
    """Return a function that adds a device, ``played``, with so many free bytes."""

    def math_of(block: Block, device: str, extent: Extent) -> Played:
        return Played(block, "cpu", 1 << 12, hooks=DeviceHooks(free_unused=freed.append))

    def add(room: int) -> None:
        mine = replace(
            CUDA,
            name="played",
            device="played",
            find=lambda n: f"played:{n}",
            turn=None,
            math=math_of,
            room=lambda _: room,
        )
        monkeypatch.setitem(BACKENDS, "played", mine)

    return add


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    place, paths = tmp_path_factory.mktemp("matrices"), []
    for seed in range(4):
        made = torch.Generator().manual_seed(seed)
        tensors = {name: torch.randn(shape, generator=made) for name, shape in SHAPES.items()}
        paths.append(write_model(place / f"m{seed}", tensors))
    return paths


def weights(out: Path) -> dict[str, bytes]:
    return {name: data for name, data in output_bytes(out).items() if name.endswith(".safetensors")}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_of_matrices_runs_where_it_is_asked_to_and_says_so(
    method: str, models: list[Path], tmp_path: Path, gpu: Callable[[int], None]
) -> None:
    gpu(1 << 40)
    config = config_for(method, models)
    for device in ("cpu", "played"):
        merge(config, tmp_path / device, memory="4GiB", progress=False, device=device)
    assert weights(tmp_path / "played") == weights(tmp_path / "cpu")
    assert "device" not in plan(config, device="cpu").identity()
    assert plan(config, device="played", memory="4GiB").identity()["device"] == "played"


@pytest.mark.parametrize("times", [1, 2])
def test_memory_kept_for_other_streams_is_given_back_once(
    times: int,
    models: list[Path],
    tmp_path: Path,
    gpu: Callable[[int], None],
    freed: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpu(1 << 40)
    change, failures = MatrixMerge.change, [torch.OutOfMemoryError] * times

    def failing(self: MatrixMerge, *arguments: Any) -> Any:
        if failures:
            raise failures.pop()
        return change(self, *arguments)

    config = config_for("tsv_m", models)
    merge(config, tmp_path / "cpu", memory="4GiB", progress=False, threads=1)
    monkeypatch.setattr(MatrixMerge, "change", failing)
    if times == 2:
        with pytest.raises(WorldError, match=r"is out of memory: free some, or merge with --device cpu"):
            merge(config, tmp_path / "out", memory="4GiB", progress=False, device="played", threads=1)
        return
    merge(config, tmp_path / "out", memory="4GiB", progress=False, device="played")
    assert weights(tmp_path / "out") == weights(tmp_path / "cpu")
    assert freed == ["cpu"]


def test_a_matrix_that_a_gpu_does_not_hold_is_refused_before_a_byte_is_written(
    models: list[Path], tmp_path: Path, gpu: Callable[[int], None]
) -> None:
    gpu(1 << 16)
    with pytest.raises(
        InputError,
        match=r"up_proj\.weight: decomposing it takes [0-9.]+ [KM]iB of the GPU's memory, of which 64.0 KiB are free: use --device",
    ):
        merge(config_for("iso_c", models), tmp_path / "out", memory="4GiB", progress=False, device="played")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("number", [None, "cuda:0"])
def test_what_has_no_kernel_is_left_to_a_torch_that_finds_the_gpu(number: str | None) -> None:
    """cuda-core may be installed beside torch's CPU build."""
    theirs: Backend = replace(CUDA, find=lambda _: number)
    assert rest_of(replace(FUSED, rest=theirs)) is (TORCH if number is None else theirs)
