"""Standard streams that are closed, full, or that nobody reads: a merge is done at once, or when run again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file

from streammerge.cli import cli
from tests.laws.hostile.case import MEAN, sound

CLOSED = [">&-", "2>&-", ">&- 2>&-", "<&-", "<&- >&- 2>&-"]
FULL = [">/dev/full", "2>/dev/full", ">/dev/full 2>/dev/full"]


def shell(directory: Path, command: str, config: str = "config.yml") -> subprocess.CompletedProcess[str]:
    line = f"{sys.executable} -m streammerge.cli merge {config} out {command}; exit ${{PIPESTATUS[0]}}"
    return subprocess.run(["bash", "-c", line], cwd=directory, capture_output=True, text=True, check=False)


def assert_merged(directory: Path) -> None:
    merged = load_file(directory / "out" / "model.safetensors")
    assert set(merged) == {"w", "n"}
    assert all((tensor == MEAN).all() for tensor in merged.values())


@pytest.mark.parametrize("streams", CLOSED)
def test_a_stream_that_the_caller_closed_is_done_without(streams: str, tmp_path: Path) -> None:
    sound(tmp_path)
    run = shell(tmp_path, "--json " + streams)
    assert run.returncode == 0
    assert run.stderr == ""
    assert_merged(tmp_path)
    assert shell(tmp_path, streams, "nowhere.yml").returncode == 2


@pytest.mark.parametrize("streams", FULL)
def test_a_stream_that_takes_nothing_costs_at_most_a_second_run(
    streams: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sound(tmp_path)
    run = shell(tmp_path, "--json " + streams)
    assert run.returncode in (0, 1)
    assert "Traceback" not in run.stderr
    monkeypatch.chdir(tmp_path)
    assert CliRunner().invoke(cli, ["merge", "config.yml", "out"]).exit_code == 0
    assert_merged(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["merge", "config.yml", "out", "--json"], 0),
        (["merge", "config.yml", "out"], 0),
        (["plan", "config.yml", "--json"], 128 + signal.SIGPIPE),
    ],
)
@pytest.mark.parametrize("both", [False, True])
def test_a_merge_that_nobody_listens_to_goes_on_and_what_only_prints_ends(
    both: bool, arguments: list[str], code: int, tmp_path: Path
) -> None:
    """As behind ``| head``: silent, with the exit code of success, or of a closed pipe."""
    sound(tmp_path)
    reads, writes = os.pipe()
    os.close(reads)
    command = [sys.executable, "-m", "streammerge.cli", *arguments]
    run = subprocess.run(
        command, cwd=tmp_path, stdout=writes, stderr=writes if both else subprocess.PIPE, check=False
    )
    os.close(writes)
    assert (run.returncode, run.stderr) == (code, None if both else b"")
    if arguments[0] == "merge":
        assert_merged(tmp_path)
