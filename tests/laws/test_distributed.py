"""Merges of checkpoints of torch.distributed: the bytes of a merge of the same models in safetensors, however they are cut."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import streammerge
from streammerge.errors import OutputError, Stopped
from streammerge.output.shards import ShardWriter
from tests.conftest import as_float64, output_bytes, read_tensors, write_model
from tests.formats.dcp_files import grid, write_dcp

SHAPES = {"layers.0.weight": (96, 130), "layers.1.weight": (96, 130), "norm": (130,)}
CUTS = {
    "layers.0.weight": grid((96, 130), (31, 64), ()),
    "layers.1.weight": grid((96, 130), (48,), (65,)),
    "norm": grid((130,), (65,)),
}


def tensors_of(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Return a run of three checkpoints, each written by the processes it was sharded over."""
    for step in (900, 1000, 1100):
        tensors = {f"model.{name}": tensor for name, tensor in tensors_of(step).items()}
        moments = {"optimizer.state.norm.exp_avg": torch.zeros(130)}
        cuts = {f"model.{name}": cut for name, cut in CUTS.items()}
        write_dcp(tmp_path / "run" / f"step-{step}", {**tensors, **moments}, cuts, n_files=3)
        write_model(tmp_path / "plain" / f"step-{step}", tensors_of(step))
    return tmp_path / "run"


def average(directory: Path, **more: Any) -> dict[str, Any]:
    return {"merge_method": "linear", "checkpoints": {"directory": directory, "schedule": "wma", **more}}


def quietly(event: object) -> None:
    """Hear an event."""


def test_an_average_of_sharded_checkpoints_has_the_bytes_of_plain_ones(run: Path, tmp_path: Path) -> None:
    warned: list[str] = []
    streammerge.merge(
        average(run, strip="model."),
        tmp_path / "out",
        memory="1GiB",
        on_event=lambda event: warned.append(str(event.values.get("message", ""))),
    )
    streammerge.merge(average(tmp_path / "plain"), tmp_path / "expected", memory="1GiB", on_event=quietly)
    found, expected = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "expected"))
    assert found == expected
    verdict = streammerge.verify(
        tmp_path / "out", against=average(run, strip="model."), sample=None, progress=False
    )
    assert verdict.problems == ()
    models = [as_float64(tmp_path / "plain" / f"step-{step}") for step in (900, 1000, 1100)]
    for name, values in read_tensors(tmp_path / "out").items():
        total = sum((i + 1) / 6 * model[name] for i, model in enumerate(models))
        np.testing.assert_array_equal(values.numpy(), np.asarray(total, np.float32))
    assert not (tmp_path / "out" / "config.json").exists()
    assert any("no config.json in" in text for text in warned)
    assert any("'optimizer', 'step' beside the weights" in text for text in warned)
    assert sorted(output_bytes(tmp_path / "out")) == [
        "README.md",
        "model.safetensors",
        "streammerge.json",
        "streammerge_config.yml",
    ]


@pytest.mark.parametrize("capacity", [1 << 18, 1 << 20])
def test_memory_and_threads_change_no_bit(
    capacity: int, run: Path, tmp_path: Path, small_capacity: Callable[[int, int], None]
) -> None:
    """Pieces begin and end within chunks and across them; ties takes statistics of whole tensors."""
    base = write_model(tmp_path / "base", tensors_of(0))
    models = [{"model": run / f"step-{step}", "strip": "model."} for step in (900, 1000)]
    config = {"merge_method": "ties", "base_model": base, "parameters": {"density": 0.3}}
    streammerge.merge({**config, "models": models}, tmp_path / "whole", memory="1GiB", on_event=quietly)
    small_capacity(capacity, 2)
    streammerge.merge({**config, "models": models}, tmp_path / "pieces", on_event=quietly)
    plain = [{"model": tmp_path / "plain" / f"step-{step}"} for step in (900, 1000)]
    streammerge.merge({**config, "models": plain}, tmp_path / "plain-out", on_event=quietly)
    first, *others = (
        (tmp_path / out / "model.safetensors").read_bytes() for out in ("whole", "pieces", "plain-out")
    )
    assert all(other == first for other in others)


def test_the_config_json_comes_from_the_model_that_has_one(run: Path, tmp_path: Path) -> None:
    models = [{"model": run / "step-900", "strip": "model."}, {"model": tmp_path / "plain" / "step-900"}]
    streammerge.merge(
        {"merge_method": "linear", "models": models}, tmp_path / "out", memory="1GiB", on_event=quietly
    )
    assert (tmp_path / "out" / "config.json").exists()
    for name, values in read_tensors(tmp_path / "out").items():
        assert torch.equal(values, tensors_of(900)[name])


def test_a_base_is_stripped_and_what_lacks_the_prefix_is_counted(run: Path, tmp_path: Path) -> None:
    write_dcp(run / "step-900", {"model.norm": torch.ones(4), "head": torch.ones(4), "tail": torch.ones(4)})
    write_model(tmp_path / "tuned", {"norm": torch.full((4,), 3.0)})
    config = {
        "merge_method": "task_arithmetic",
        "base_model": {"model": str(run / "step-900"), "strip": "model."},
        "models": [{"model": str(tmp_path / "tuned"), "parameters": {"weight": 0.5}}],
    }
    plan = streammerge.plan(config, memory="1GiB")
    assert any(
        "2 tensors whose names do not begin with 'model.' are left out (first: 'tail')" in w
        for w in plan.warnings
    )
    streammerge.merge(config, tmp_path / "out", memory="1GiB", on_event=quietly)
    assert read_tensors(tmp_path / "out")["norm"].tolist() == [2.0] * 4


@pytest.mark.parametrize(
    ("models", "words"),
    [
        (
            "[{model: run/step-900, strip: module.}]",
            "strip: 'module.': no tensor's name begins so (the first is 'model.",
        ),
        ("[{model: run/step-900, strip: model.}, {model: run/step-900}]", "give both the same"),
        ("[{model: run/step-900, strip: 3}]", "must be a string"),
    ],
)
def test_a_prefix_that_cannot_be_meant_is_refused(
    models: str, words: str, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run.parent)
    with pytest.raises(streammerge.InputError) as refused:
        streammerge.plan(f"merge_method: linear\nmodels: {models}\n", memory="1GiB")
    assert words in str(refused.value)


@pytest.fixture
def stopped(
    run: Path, tmp_path: Path, small_capacity: Callable[[int, int], None], monkeypatch: pytest.MonkeyPatch
) -> Path:
    """Return the output of an average that was stopped after its first piece."""
    small_capacity(1 << 18, 1)
    stop, write = threading.Event(), ShardWriter.write

    def write_then_stop(self: ShardWriter, *arguments: Any) -> None:
        write(self, *arguments)
        stop.set()

    config, out = average(run, strip="model."), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "write", write_then_stop)
        with pytest.raises(Stopped):
            streammerge.merge(config, out, stop=stop, signal_received=lambda: 15, on_event=quietly)
    assert not (out / "model.safetensors").exists()
    return out


def test_an_average_that_was_stopped_continues_to_the_same_bytes(
    stopped: Path, run: Path, tmp_path: Path
) -> None:
    config = average(run, strip="model.")
    summary = streammerge.merge(config, stopped, on_event=quietly)
    assert summary.bytes_read < streammerge.plan(config).bytes_to_read()
    streammerge.merge(config, tmp_path / "expected", on_event=quietly)
    assert output_bytes(stopped) == output_bytes(tmp_path / "expected")


@pytest.mark.parametrize("name", ["__2_0.distcp", ".metadata"])
def test_a_file_that_changed_meanwhile_is_named(name: str, stopped: Path, run: Path) -> None:
    file = run / "step-1000" / name
    before = file.stat()
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    with pytest.raises(OutputError, match=f"step-1000: {name} has a different date"):
        streammerge.merge(average(run, strip="model."), stopped, on_event=quietly)
