"""The driver of a shared merge: restarts, one result, one progress; and the state of a merge as others see it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import pytest
import torch
import yaml

from streammerge.api import merge
from streammerge.cli.entry import cli
from streammerge.cli.launching import command_of
from streammerge.cli.merging import merge as merge_command
from streammerge.engine.joined_session import JoinedSession
from streammerge.errors import InputError, OutputError, Stopped, WorldError
from streammerge.events import Control, Event
from streammerge.launch import drive as drive_module
from streammerge.launch.base import MOST_RESTARTS, Ended, Needs, launcher, make_launcher
from streammerge.launch.drive import drive
from streammerge.launch.launchers.processes import cpus_of
from streammerge.output.place import STATE
from streammerge.output.status import status_of
from streammerge.report.status import status_text, status_values
from tests.conftest import config_for, output_bytes, write_model
from tests.patience import PATIENCE

PLAN = {"tensors": 4, "elements": 32, "warnings": ["known"]}


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look often."""
    monkeypatch.setattr(drive_module, "_POLL_SECONDS", 0.01)


@pytest.fixture
def config(tmp_path: Path) -> dict[str, Any]:
    """Return a merge whose output has four shards of one tensor."""
    tensors = {f"layers.{i}.w": torch.full((8,), float(i)) for i in range(4)}
    return config_for("linear", [write_model(tmp_path / name, tensors) for name in ("base", "a", "b")])


class Acted:
    """A launcher whose processes end as they are told; the last one finishes the merge in this process."""

    restarts = MOST_RESTARTS
    elsewhere = False

    def __init__(self, ends: list[Ended], finish: Any = lambda: None) -> None:
        self.count = 2
        self.ends, self.finish = list(ends), finish
        self.started: list[int] = []
        self.stopped = False

    def start(self, number: int, command: Sequence[str]) -> None:
        self.started.append(number)

    def heard(self) -> list[dict[str, Any]]:
        return []

    def ended(self) -> list[Ended]:
        if not self.ends:
            self.finish()
            return [Ended(number, 0, (), "") for number in range(self.count)]
        return [self.ends.pop(0)]

    def stop(self) -> None:
        self.stopped = True


def hear(heard: list[Event]) -> Control:
    return Control(heard.append)


def test_processes_that_die_are_started_again_and_their_work_is_added_up(
    config: dict[str, Any], tmp_path: Path
) -> None:
    done = {"event": "done", "bytes_read": 5, "bytes_written": 3}
    told = [{"event": "warning", "message": text} for text in ("known", "new", "new")]
    acted = Acted(
        [
            Ended(1, -9, (), ""),
            Ended(1, 1, ({"event": "error", "message": "disk full"},), ""),
            Ended(0, 0, (*told, done), ""),
            Ended(1, 0, (*told, done), ""),
        ]
    )
    heard: list[Event] = []
    merge(config, tmp_path / "out", progress=False)
    driven = drive(acted, ["merge"], tmp_path / "out", PLAN, hear(heard))
    assert acted.started == [0, 1, 1, 1]
    assert acted.stopped
    assert (driven.bytes_read, driven.bytes_written) == (10, 6)
    warned = [event.values["message"] for event in heard if event.kind == "warning"]
    assert warned == [
        "process 1 ended: killed by SIGKILL: it is started again",
        "process 1 ended: disk full: it is started again",
        "new",
    ]


def test_what_all_would_meet_stops_all_with_its_line(tmp_path: Path) -> None:
    acted = Acted([Ended(1, 2, ({"event": "error", "message": "NaN in layers.1"},), "")])
    with pytest.raises(InputError, match=r"NaN in layers\.1"):
        drive(acted, ["merge"], tmp_path, PLAN, hear([]))
    assert acted.stopped
    assert acted.started == [0, 1]


def test_a_machine_that_fails_again_and_again_is_given_up(tmp_path: Path) -> None:
    acted = Acted([Ended(n, 1, (), "no space") for n in (0, 1) for _ in range(MOST_RESTARTS + 1)])
    with pytest.raises(WorldError, match=r"no space .*run the same command again"):
        drive(acted, ["merge"], tmp_path, PLAN, hear([]))
    assert len(acted.started) == 2 * (MOST_RESTARTS + 1)


def test_ctrl_c_stops_all(tmp_path: Path) -> None:
    control = Control(signal=lambda: signal.SIGINT)
    control.stop.set()
    acted = Acted([])
    with pytest.raises(Stopped) as stopped:
        drive(acted, ["merge"], tmp_path, PLAN, control)
    assert stopped.value.exit_code == 130
    assert acted.stopped


def test_a_process_gets_the_options_that_were_given_and_no_others() -> None:
    line = ["c.yml", "out", "--on", "processes:3", "--memory", "2GiB", "--quiet", "--no-copy-tokenizer"]
    with (
        cli.make_context("streammerge", ["merge"]) as above,
        merge_command.make_context("merge", line, parent=above),
    ):
        found = command_of(click.get_current_context())
    assert found[:5] == ["merge", "c.yml", "out", "--join", "--json"]
    assert sorted(found[5:]) == ["--memory", "--no-copy-tokenizer", str(2 << 30)]


def test_a_launcher_is_one_registration_and_an_unknown_one_is_refused() -> None:
    @launcher("acted")
    def make(needs: Needs) -> Acted:
        return Acted([])

    assert make_launcher("acted", Needs(None, None, None, "cpu")).count == 2
    with pytest.raises(InputError, match=r"--on ssh: choose one of acted, processes, ray"):
        make_launcher("ssh", Needs(None, None, None, "cpu"))
    assert cpus_of("0-3,7\n") == {0, 1, 2, 3, 7}


def test_the_state_of_a_shared_merge_is_told_from_its_files_alone(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with pytest.raises(OutputError, match="no merge has begun here"):
        status_of(out)

    def fail(*_: object) -> None:
        seen.append((status_text(status_of(out)), status_values(status_of(out))))
        raise WorldError("stopped here")

    seen: list[tuple[str, dict[str, Any]]] = []
    with monkeypatch.context() as patch:
        patch.setattr(JoinedSession, "finish", fail)
        with pytest.raises(WorldError, match="stopped here"):
            merge(config, out, join=True, shard_size=32, progress=False)
    text, values = seen[0]
    assert ": finishing · 4 of 4 shards done (" in text
    assert f"({os.getpid()}): waits · read " in text
    assert (values["shards_done"], values["workers"][0]["alive"]) == (4, True)
    assert "nobody works on it" in status_text(status_of(out))
    assert status_values(status_of(out))["workers"] == []
    merge(config, out, join=True, shard_size=32, progress=False)
    assert status_text(status_of(out)) == f"{out}: finished"


@pytest.mark.slow
def test_processes_on_this_host_give_the_bytes_of_one_and_end_with_their_driver(
    config: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "c.yml").write_text(yaml.safe_dump(json.loads(json.dumps(config, default=str))))
    merge(config, tmp_path / "alone", shard_size=32, progress=False)
    command = [sys.executable, "-m", "streammerge", "merge", "c.yml", "out", "--shard-size", "32"]
    command += ["--on", "processes:2", "--memory", "700MiB", "--threads", "1"]
    driver = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL)
    while not list((tmp_path / "out" / STATE).glob("*/run.json")) and driver.poll() is None:
        time.sleep(0.01)
    driver.kill()
    driver.wait()
    deadline = time.monotonic() + PATIENCE
    while _workers(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _workers(tmp_path)
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    assert output_bytes(tmp_path / "out") == output_bytes(tmp_path / "alone")


def _workers(directory: Path) -> list[str]:
    """Return the processes that work in a directory."""
    found = []
    for place in Path("/proc").glob("[0-9]*/cwd"):
        try:
            if os.readlink(place) == str(directory) and b"--join" in (place.parent / "cmdline").read_bytes():
                found.append(place.parent.name)
        except OSError:
            continue
    return found
