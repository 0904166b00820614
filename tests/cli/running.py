"""The command line, run in this process or in one of its own."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

import streammerge.cli
from tests.patience import PATIENCE

FEW: dict[str, tuple[int, ...]] = {"embed.weight": (50, 16), "layers.0.weight": (16, 16), "norm": (16,)}


class Run(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def complaints(self) -> list[str]:
        """The lines of stderr that are neither warnings nor, on a slow machine, the progress of each ten seconds."""
        return [line for line in self.err.splitlines() if not line.startswith(("warning:", "after "))]


Cli = Callable[..., Run]


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Return a function that runs the command line in this process."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def run(*arguments: object) -> Run:
        monkeypatch.setattr(sys, "argv", ["streammerge", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            streammerge.cli.main()
        captured = capsys.readouterr()
        return Run(int(stopped.value.code or 0), captured.out, captured.err)

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


def shell(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own."""
    command = [sys.executable, "-m", "streammerge.cli", *map(str, arguments)]
    options = {"stdout": subprocess.PIPE, **options}
    return subprocess.run(
        command, stderr=subprocess.PIPE, text=True, timeout=PATIENCE, check=False, **options
    )


def write_config(path: Path, config: Any) -> Path:
    path.write_text(config if isinstance(config, str) else yaml.safe_dump(config))
    return path


def assert_refused(run: Run, *words: str) -> None:
    """Exit code 2, exactly one line, every word in it, no traceback."""
    assert run.code == 2, run
    assert len(run.complaints) == 1, run.err
    assert "Traceback" not in run.err
    assert "\x1b" not in run.err
    for word in words:
        assert word in run.complaints[0]


def tree_of(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}
