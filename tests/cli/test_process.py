"""The command as a process: streams that are full or closed, and what it imports."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.cli.running import Cli, shell
from tests.conftest import config_for
from tests.patience import PATIENCE


def test_a_full_stdout_does_not_lose_the_merge(config: Path, tmp_path: Path, cli: Cli) -> None:
    with open("/dev/full", "w") as full:
        run = shell("merge", config, tmp_path / "out", stdout=full)
    assert run.returncode != 0
    assert "Traceback" not in run.stderr
    assert run.stderr.splitlines() == [
        "streammerge: standard output cannot be written: No space left on device"
    ]
    again = cli("merge", config, tmp_path / "out")
    assert again.code == 0
    assert "nothing was done" in again.out
    assert cli("verify", tmp_path / "out").code == 0


def test_a_full_stdout_in_the_middle_of_json_events_leaves_a_merge_that_can_be_resumed(
    config: Path, tmp_path: Path, cli: Cli
) -> None:
    with open("/dev/full", "w") as full:
        run = shell("merge", config, tmp_path / "out", "--json", stdout=full)
    assert run.returncode != 0
    assert "Traceback" not in run.stderr
    assert cli("merge", config, tmp_path / "out").code == 0
    assert cli("verify", tmp_path / "out").code == 0


_HEAVY = """
import sys
from streammerge import cli
try:
    cli.main()
except SystemExit as stopped:
    print(stopped.code, *sorted({"numba", "torch", "rich", "safetensors"} & set(sys.modules)))
"""


@pytest.mark.parametrize("arguments", [["--help"], ["merge", "--help"], ["merge", "none.yml", "out"]])
def test_help_and_config_errors_import_neither_numba_nor_torch(arguments: list[str], tmp_path: Path) -> None:
    command = [sys.executable, "-c", _HEAVY, *arguments]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE, check=False)
    code = "2" if "none.yml" in arguments else "0"
    assert run.stdout.splitlines()[-1].split() == [code], run


def test_a_closed_stdout_is_no_traceback(make_models: Callable[..., list[Path]], tmp_path: Path) -> None:
    config = tmp_path / "c.yml"
    config.write_text(yaml.safe_dump(config_for("linear", make_models())))
    command = f"{sys.executable} -m streammerge.cli merge {config} {tmp_path / 'out'} >&-"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr
    assert (tmp_path / "out" / "model.safetensors").exists()
