"""A merge in processes that can be stopped while it writes."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import yaml

from streammerge.api import merge
from streammerge.output.place import JOURNAL as NAME
from streammerge.output.place import STATE
from tests.conftest import config_for, output_bytes
from tests.patience import PATIENCE

_SLOW = """
import itertools, os, signal, sys, time
from streammerge.engine import scheduler as run
from streammerge.output import shards as writer
run._SYNC_SECONDS = 0.02
kill_at, slow_from = (int(number) for number in sys.argv[1:3])
del sys.argv[1:3]
calls = itertools.count(1)
real = os.pwrite
def pwrite(descriptor, data, offset):
    half = len(data) // 2
    real(descriptor, data[:half], offset)
    call = next(calls)
    if call == kill_at:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.25 if call >= slow_from else 0.01)
    return half + real(descriptor, data[half:], offset + half)
os.pwrite = pwrite
for name in ("replace", "fsync", "fdatasync"):
    def slowly(*arguments, real=getattr(os, name)):
        if next(calls) == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments)
    setattr(os, name, slowly)
from streammerge.planning.memory import budget
from tests.fixed_budget import Fixed
budget.make_budget = lambda memory, n, reserve: Fixed(reserve + (2 << 20), reserve, 1)
from streammerge.cli import main
main()
"""
_OPTIONS = ["--shard-size", "700KB"]


def without_progress(err: str) -> list[str]:
    """Return the lines of a merge's messages without those that tell, every ten seconds, how far it is."""
    return [line for line in err.splitlines() if not line.startswith("after ")]


NEVER = 10**9

ROOT = Path(__file__).parents[3]


class Slow:
    """A merge in processes that can be stopped while it writes, because each write takes its time."""

    def __init__(self, paths: list[Path], directory: Path) -> None:
        self.config = directory / "config.yml"
        parameters = {"density": 0.3, "trim_scope": "model"}
        self.config.write_text(yaml.safe_dump(config_for("ties", paths, parameters=parameters)))
        self.out = directory / "out"
        self.running: list[subprocess.Popen[str]] = []

    def start(
        self, *options: str, kill_at: int = NEVER, slow_from: int = NEVER, stderr: int = subprocess.PIPE
    ) -> subprocess.Popen[str]:
        """Start a merge that kills itself at a given call to the system, or dawdles from one on."""
        numbers = [str(kill_at), str(slow_from)]
        arguments = [*numbers, "merge", str(self.config), str(self.out), *_OPTIONS, *options]
        process = subprocess.Popen(
            [sys.executable, "-c", _SLOW, *arguments],
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )
        self.running.append(process)
        return process

    def start_and_wait_for_work(self) -> subprocess.Popen[str]:
        """Start, and return when some elements are finished and recorded; the rest takes seconds."""
        path = self.out / STATE / NAME
        process = self.start(slow_from=15)
        until = time.monotonic() + PATIENCE
        while process.poll() is None and time.monotonic() < until:
            if path.exists() and path.read_bytes().count(b'"done"') >= 3:
                break
            time.sleep(0.01)
        return process

    def expected(self) -> dict[str, bytes]:
        reference = self.out.with_name("reference")
        merge(self.config, reference, shard_size=700_000)
        return output_bytes(reference)

    def finish(self) -> None:
        """Run it to the end and compare."""
        process = self.start("--quiet")
        out, err = process.communicate(timeout=PATIENCE)
        assert (process.returncode, out, err) == (0, "", "")
        assert output_bytes(self.out) == self.expected()
