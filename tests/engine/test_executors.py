"""An executor is one file: chunks run in processes of their own give the bytes that threads give."""

from __future__ import annotations

import os
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from streammerge.api import plan
from streammerge.engine.executors.base import executor, make_executor
from streammerge.engine.merge import Options, execute
from streammerge.engine.opening import open_worker
from streammerge.engine.worker import RunSpec
from streammerge.errors import InputError, ModelError, Stopped, WorldError
from streammerge.events import Control, Event
from streammerge.io.reader import Reader
from streammerge.output.identity import identify
from streammerge.output.journal import Receipt
from streammerge.output.shards import ShardWriter
from streammerge.report.card import model_card
from tests.conftest import config_for, output_bytes, write_models
from tests.engine.process_executor import Processes

METHODS = """
import torch
from streammerge import method
from helper import double

@method("halved")
def halved(models, base=None):
    return sum(double(model) for model in models) * 0.25

@method("centered", access="tensor")
def centered(models, base=None):
    total = sum(models)
    return total - total.mean()
"""


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_models(tmp_path_factory.mktemp("models"), n_models=2)


@pytest.fixture(scope="module")
def methods(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("methods")
    (directory / "helper.py").write_text("def double(x):\n    return 2 * x\n")
    (directory / "mine.py").write_text(METHODS)
    return directory / "mine.py"


def merge_by(
    name: str, config: Any, out: Path, control: Control | None = None, *, methods: Path | None = None
) -> None:
    decided = plan(config, threads=2, methods=methods, shard_size=100_000)
    execute(decided, out, Options(executor=name), control or Control(), model_card)


def written_here(self: ShardWriter, *arguments: Any) -> None:
    raise AssertionError("the driver wrote a chunk")


CASES: list[tuple[str, dict[str, Any]]] = [
    ("linear", {}),
    ("ties", {"density": 0.3}),
    ("ties", {"density": 0.3, "trim_scope": "model"}),
    ("dare_linear", {"density": 0.5}),
    ("halved", {}),
    ("centered", {}),
]


@pytest.mark.parametrize(("method", "parameters"), CASES)
def test_processes_give_the_bytes_of_threads(
    method: str,
    parameters: dict[str, Any],
    paths: list[Path],
    methods: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own = method in ("halved", "centered")
    config = config_for(method, paths, parameters=parameters)
    if own:
        config = {"merge_method": method, "models": [{"model": str(path)} for path in paths[1:]]}
    own_methods = methods if own else None
    merge_by("threads", config, tmp_path / "threads", methods=own_methods)
    monkeypatch.setattr(ShardWriter, "write", written_here)
    merge_by("processes", config, tmp_path / "processes", methods=own_methods)
    assert output_bytes(tmp_path / "processes") == output_bytes(tmp_path / "threads")


def test_a_streamed_tensor_is_known_to_the_process_that_merges_it(
    paths: list[Path], tmp_path: Path, small_capacity: Callable[[int, int], None]
) -> None:
    small_capacity(1 << 17, 2)
    config = config_for("ties", paths, parameters={"density": 0.3})
    assert "streamed" in {work.mode for work in plan(config, threads=2).work}
    for name in ("threads", "processes"):
        merge_by(name, config, tmp_path / name)
    assert output_bytes(tmp_path / "processes") == output_bytes(tmp_path / "threads")


def test_what_processes_began_threads_finish(paths: list[Path], tmp_path: Path) -> None:
    config = config_for("linear", paths)
    merge_by("threads", config, tmp_path / "whole")
    stop = threading.Event()

    def on_event(event: Event) -> None:
        if event.kind == "progress" and event.values["tensors"]:
            stop.set()

    with pytest.raises(Stopped):
        merge_by("processes", config, tmp_path / "out", Control(on_event, stop))
    merge_by("threads", config, tmp_path / "out")
    assert output_bytes(tmp_path / "out") == output_bytes(tmp_path / "whole")


def test_a_refusal_in_a_process_is_that_of_the_merge(tmp_path: Path) -> None:
    paths = write_models(tmp_path, n_models=2, spread=float("inf"))
    with pytest.raises(ModelError, match="NaN or infinity"):
        merge_by("processes", config_for("linear", paths), tmp_path / "out")


# --- what travels


@pytest.mark.parametrize("method", ["della", "halved"])
def test_what_is_handed_to_a_worker_pickles_and_survives_it(
    method: str, paths: list[Path], methods: Path, tmp_path: Path
) -> None:
    config = config_for("della", paths)
    if method == "halved":
        config = {"merge_method": method, "models": [{"model": str(path)} for path in paths[1:]]}
    decided = plan(config, methods=methods if method == "halved" else None)
    reader = Reader()
    spec = RunSpec(decided, tmp_path, identify(decided, reader))
    reader.close()
    again = pickle.loads(pickle.dumps(spec))
    assert again.identity == spec.identity
    assert again.plan.identity() == decided.identity()
    assert list(again.plan.steps()) == list(decided.steps())
    for step in decided.steps():
        assert pickle.loads(pickle.dumps(step)) == step
    receipt = Receipt(0, 0, 4096, (7,), (1, 2), 3, 4, differs=True)
    assert pickle.loads(pickle.dumps(receipt)) == receipt


def test_a_worker_makes_no_file(paths: list[Path], tmp_path: Path) -> None:
    decided = plan(config_for("linear", paths))
    reader = Reader()
    spec = RunSpec(decided, tmp_path, identify(decided, reader))
    reader.close()
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(WorldError), open_worker(spec):
        pass
    assert list(tmp_path.iterdir()) == []
    assert len(os.listdir("/proc/self/fd")) == before


# --- the registry


def test_an_unknown_executor_is_refused_with_the_names_that_there_are() -> None:
    with pytest.raises(InputError, match=r"no executor 'clouds': choose one of .*threads"):
        make_executor("clouds")


def test_a_name_is_given_once() -> None:
    assert executor("processes")(Processes) is Processes
    with pytest.raises(ValueError, match="already registered"):
        executor("threads")(Processes)


def test_the_page_shows_the_executor_that_is_tested_here() -> None:
    root = Path(__file__).parents[2]
    source = (root / "tests/engine/process_executor.py").read_text()
    assert f"```python\n{source}```\n" in (root / "docs/build/executor.md").read_text()


def test_an_unknown_executor_is_refused_before_anything_is_made(paths: list[Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no executor 'clouds'"):
        merge_by("clouds", config_for("linear", paths), tmp_path / "out")
    assert not (tmp_path / "out").exists()
