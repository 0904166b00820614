"""A statistic is one file, and so is a rule: a method of both merges resident, streamed and resumed to the same bits."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest
import torch

import streammerge
from streammerge.algebra.extent import Extent
from streammerge.api import merge
from streammerge.engine.streaming import Streamer
from streammerge.errors import Stopped
from streammerge.output.shards import ShardWriter
from streammerge.planning.job import Job
from streammerge.statistics.asking import ask_all
from tests.algebra.capped_merge import CappedMerge
from tests.conftest import config_for, output_bytes, read_tensors
from tests.statistics.largest_magnitude import LargestMagnitude

SHAPES = {"w": (2000, 1000), "v": (40,)}
CAPACITY = 11 << 20
"""Bytes: a block of a formula fits, the larger tensor does not."""
PARAMETERS = {"share": 0.25}


def caps(extent: Extent) -> Callable[..., Generator[Any, Any, CappedMerge]]:
    def capped(context: streammerge.TensorContext, *, share: float = 0.5) -> Generator[Any, Any, CappedMerge]:
        vectors = context.task_vectors((0.5,) * context.n_models)
        largest = yield from ask_all([LargestMagnitude(vector, extent) for vector in vectors])
        return CappedMerge(tuple(vectors), tuple(share * one for one in largest))

    return capped


@pytest.fixture(scope="module", params=[Extent.TENSOR, Extent.MODEL])
def method(request: pytest.FixtureRequest) -> str:
    name = f"capped_by_{request.param}"
    streammerge.method(name, base="required", access=request.param)(caps(request.param))
    return name


def expected(paths: list[Path], method: str) -> dict[str, torch.Tensor]:
    base, *models = (read_tensors(path) for path in paths)
    deltas = [{name: m[name].float() - base[name].float() for name in base} for m in models]
    merged = {}
    for name in base:
        total = base[name].double()
        for delta in deltas:
            seen = [delta[name]] if method.endswith("tensor") else list(delta.values())
            limit = 0.25 * float(max(part.abs().max() for part in seen))
            total = total + 0.5 * delta[name].double().clamp(-limit, limit)
        merged[name] = total.to(base[name].dtype)
    return merged


def test_the_merge_is_the_formula_and_the_same_streamed_and_in_torch(
    method: str,
    make_models: Callable[..., list[Path]],
    tmp_path: Path,
    small_capacity: Callable[[int, int], None],
) -> None:
    paths = make_models(shapes=SHAPES)
    config = config_for(method, paths, parameters=PARAMETERS)
    merge(config, tmp_path / "resident")
    for name, tensor in expected(paths, method).items():
        assert torch.equal(read_tensors(tmp_path / "resident")[name], tensor)
    merge(config, tmp_path / "torch", kernels=False)
    small_capacity(CAPACITY, 2)
    merge(config, tmp_path / "streamed")
    assert output_bytes(tmp_path / "torch") == output_bytes(tmp_path / "resident")
    assert output_bytes(tmp_path / "streamed") == output_bytes(tmp_path / "resident")


def test_a_value_that_was_streamed_is_taken_from_the_journal(
    method: str,
    make_models: Callable[..., list[Path]],
    tmp_path: Path,
    small_capacity: Callable[[int, int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    small_capacity(CAPACITY, 1)
    config = config_for(method, make_models(shapes=SHAPES), parameters=PARAMETERS)
    merge(config, tmp_path / "whole")
    stop, passed = threading.Event(), []
    add, write = Streamer._add_loaded, ShardWriter.write

    def counted(self: Streamer, job: Job, *rest: Any) -> None:
        passed.append(job.ordinal)
        add(self, job, *rest)

    def write_then_stop(self: ShardWriter, *arguments: Any) -> None:
        write(self, *arguments)
        if passed and arguments[2].size > 1024:  # not the small tensor beside it, whose turn may come first
            stop.set()

    monkeypatch.setattr(Streamer, "_add_loaded", counted)
    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "write", write_then_stop)
        with pytest.raises(Stopped):
            merge(config, tmp_path / "out", stop=stop, signal_received=lambda: 15)
    assert passed
    passed.clear()
    assert merge(config, tmp_path / "out").bytes_resumed > 0
    assert not passed
    assert output_bytes(tmp_path / "out") == output_bytes(tmp_path / "whole")
