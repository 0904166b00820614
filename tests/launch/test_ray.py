"""A merge on a Ray cluster: engines, actors, nodes and the head die in the middle, and the bytes are those of one process.

The engines stop at a gate after a given number of records, so that what dies does so at a known moment.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from streammerge.api import merge
from streammerge.api.launching import merge_on
from streammerge.engine.session import Options
from streammerge.errors import StreammergeError, WorldError
from streammerge.events import Control, Event
from streammerge.output.place import STATE
from tests.conftest import config_for, output_bytes, write_model
from tests.patience import PATIENCE

pytest.importorskip("ray", reason="the extra `ray` is not installed")

SHARDS = 8
METHODS = str(Path(__file__).parent / "gate.py")
DARE = ("dare_linear", {"density": 0.4})
WHOLE = ("ties", {"density": 0.4, "trim_scope": "model"})


def start_cluster() -> Any:
    """Return a running cluster on this host: a head without CPUs, and three nodes of one."""
    from ray.cluster_utils import Cluster

    class Made(Cluster):  # type: ignore[misc]
        """A cluster that knows its nodes."""

        def more(self) -> None:
            """Add a node."""
            self.nodes.append(self.add_node(num_cpus=1, memory=1 << 30, **small))

    small = {"object_store_memory": 80 << 20, "include_dashboard": False}
    system = {"gcs_rpc_server_reconnect_timeout_s": 3}
    made = Made(True, head_node_args={"num_cpus": 0, "_system_config": system, **small})
    made.nodes = []
    for _ in range(3):
        made.more()
    return made


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    made = start_cluster()
    yield made
    made.shutdown()


class Case:
    """One merge on the cluster, in a thread of this process."""

    def __init__(self, directory: Path, case: tuple[str, dict[str, Any]]) -> None:
        self.directory, self.out, self.gate = directory, directory / "out", directory / "gate"
        paths = []
        for number, name in enumerate(("base", "a", "b")):
            random = torch.Generator().manual_seed(number)
            tensors = {f"layers.{i}.w": torch.randn(64, 64, generator=random) for i in range(SHARDS)}
            paths.append(write_model(directory / name, tensors))
        config = config_for(case[0], paths, parameters=case[1], seed=1)
        self.config = directory / "c.yml"
        self.config.write_text(yaml.safe_dump(json.loads(json.dumps(config, default=str))))
        self.planned = {"shard_size": 16384, "memory": 700 << 20, "threads": 1, "methods": METHODS}
        merge(self.config, directory / "alone", progress=False, **self.planned)
        self.heard: list[Event] = []
        self.stop = threading.Event()
        self.result: Any = None
        self.records = SHARDS + (case[1].get("trim_scope") == "model") * (SHARDS + 2)
        """Records of a whole merge, at least."""

    def run(self, where: str) -> Any:
        """Merge; return the summary."""
        shard = str(self.planned["shard_size"])
        command = ["merge", str(self.config), str(self.out), "--join", "--json"]
        command += ["--shard-size", shard, "--methods", METHODS]
        control = Control(self.heard.append, self.stop, lambda: signal.SIGINT)
        return merge_on(where, self.config, self.out, command, self.planned, Options(), control)

    @property
    def is_running(self) -> bool:
        """Whether the merge runs."""
        return self._thread.is_alive()

    def start(self, where: str, allowed: int) -> None:
        """Begin to merge; return when so many records are there."""
        self.allow(allowed)

        def action() -> None:
            try:
                self.result = self.run(where)
            except StreammergeError as error:
                self.result = error

        self._thread = threading.Thread(target=action)
        self._thread.start()
        self.wait_for(allowed)

    def allow(self, records: int) -> None:
        """Let so many records through."""
        self.gate.with_suffix(".new").write_text(str(records))
        self.gate.with_suffix(".new").replace(self.gate)

    def wait_for(self, records: int) -> None:
        """Wait until so many records are there."""
        wait(lambda: len(list(self.out.glob(f"{STATE}/*/*.done"))) >= records or not self.is_running)
        assert self._thread.is_alive(), self.result

    def end(self) -> Any:
        """Let all records through; return the summary or the error of the merge."""
        self.allow(1000)
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive()
        return self.result

    def warnings(self) -> str:
        """Return what the user was told."""
        return "\n".join(str(event.values["message"]) for event in self.heard if event.kind == "warning")

    def check(self) -> None:
        """See that the output is that of one process."""
        assert output_bytes(self.out) == output_bytes(self.directory / "alone")
        assert not list(self.directory.glob(".streammerge-*"))


def wait(condition: Callable[[], bool], seconds: float = PATIENCE) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.02)


def parent_of(number: int) -> int:
    return int(Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[1])


@pytest.fixture
def make(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[tuple[str, dict[str, Any]]], Case]:
    """Return what makes a case on the cluster."""
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)

    def made(case: tuple[str, dict[str, Any]]) -> Case:
        one = Case(tmp_path, case)
        monkeypatch.setenv("STREAMMERGE_GATE", str(one.gate))
        return one

    return made


def processes(words: str, out: Path) -> list[int]:
    """Return the processes whose command line has some words, and of which one works on an output."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            line = (place / "cmdline").read_bytes().decode(errors="replace")
        except OSError:
            continue
        if words in line and str(out) in line:
            found.append(int(place.name))
    return found


def test_engines_actors_and_a_node_may_die(make: Callable[..., Case], cluster: Any) -> None:
    one = make(DARE)
    one.start("ray:3", 2)
    engine = processes("--units-from-stdin", one.out)[0]
    os.kill(engine, signal.SIGKILL)
    one.allow(4)
    one.wait_for(4)
    actor = parent_of(processes("--units-from-stdin", one.out)[0])
    os.kill(actor, signal.SIGKILL)
    one.allow(5)
    one.wait_for(5)
    cluster.remove_node(cluster.nodes.pop(), allow_graceful=False)
    # Else the others may finish before Ray has noticed.
    wait(lambda: "was lost: its shards go to the others" in one.warnings() or not one.is_running)
    summary = one.end()
    assert not isinstance(summary, Exception), (summary, one.warnings())
    one.check()
    assert "killed by SIGKILL: its actor is restarted" in one.warnings()
    assert "was lost: its shards go to the others" in one.warnings()


def test_a_node_may_be_lost_while_the_whole_model_is_counted(make: Callable[..., Case], cluster: Any) -> None:
    one = make(WHOLE)
    one.start("ray:2", 3)
    assert not list(one.out.glob(f"{STATE}/*/merge-*.done"))
    cluster.remove_node(cluster.nodes.pop(), allow_graceful=False)
    summary = one.end()
    assert not isinstance(summary, Exception), (summary, one.warnings())
    one.check()


def test_the_head_may_be_lost_and_what_is_finished_stays(make: Callable[..., Case], cluster: Any) -> None:
    one = make(DARE)
    one.start("ray:1", 2)
    cluster.remove_node(cluster.head_node, allow_graceful=False)
    one._thread.join(PATIENCE)
    assert isinstance(one.result, WorldError)
    assert "the connection to the Ray cluster was lost" in str(one.result)
    assert "run the same command again" in str(one.result)
    one.allow(1000)
    wait(lambda: not processes("--units-from-stdin", one.out))
    summary = merge(one.config, one.out, join=True, progress=False, **one.planned)
    assert summary.bytes_resumed >= 2 * 16384
    one.check()
