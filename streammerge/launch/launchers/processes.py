"""Processes on this host: one for each GPU or NUMA node, or as many as are asked for."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from streammerge.launch.base import MOST_RESTARTS, PARENT, Ended, Needs, launcher
from streammerge.machine import available_memory, gpus
from streammerge.records import dataclass

_PATIENCE = 30.0
"""Seconds between the wish that a process stops and its end by force."""


@dataclass
class _Running:
    process: subprocess.Popen[bytes]
    out: IO[bytes]
    err: IO[bytes]


@launcher("processes")
class Processes:
    """Starts processes here; they end with this one, however it ends."""

    restarts = MOST_RESTARTS
    elsewhere = False

    def __init__(self, needs: Needs) -> None:
        self._needs, self._running = needs, dict[int, _Running]()
        self._gpus = gpus() if needs.device in ("auto", "cuda") else []
        self._nodes = numa_nodes()
        self.count = needs.count or len(self._gpus) or len(self._nodes)

    def start(self, number: int, command: Sequence[str]) -> None:
        """See `Launcher`."""
        environment = {**os.environ, PARENT: str(os.getpid())}
        if self._gpus:
            environment["CUDA_VISIBLE_DEVICES"] = self._gpus[number % len(self._gpus)]
        out, err = (tempfile.TemporaryFile() for _ in range(2))  # noqa: SIM115 they are read when it has ended
        process = subprocess.Popen(
            [sys.executable, "-m", "streammerge", *command, *self._shares()],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            env=environment,
            start_new_session=True,  # Ctrl-C reaches the driver alone, which stops them
        )
        if len(self._nodes) > 1 and self.count > 1:
            with suppress(OSError):
                os.sched_setaffinity(process.pid, self._nodes[number % len(self._nodes)])
        self._running[number] = _Running(process, out, err)

    def _shares(self) -> list[str]:
        """Return the options that divide this host between the processes, as far as they were not given."""
        shares = []
        if self._needs.memory is None:
            shares += ["--memory", str(available_memory() // 2 // self.count)]
        if self._needs.threads is None:
            shares += ["--threads", str(max(1, len(os.sched_getaffinity(0)) // self.count))]
        return shares

    def heard(self) -> list[dict[str, Any]]:
        """See `Launcher`; what they say is read at their end."""
        return []

    def ended(self) -> list[Ended]:
        """See `Launcher`."""
        found = []
        for number, one in list(self._running.items()):
            if (code := one.process.poll()) is not None:
                del self._running[number]
                found.append(Ended(number, code, _events(one.out), _last_line(one.err)))
        return found

    def stop(self) -> None:
        """See `Launcher`."""
        for one in self._running.values():
            with suppress(ProcessLookupError):
                one.process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + _PATIENCE
        for one in self._running.values():
            try:
                one.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                one.process.kill()
                one.process.wait()


def _events(file: IO[bytes]) -> tuple[dict[str, Any], ...]:
    file.seek(0)
    found = []
    for line in file.read().splitlines():
        with suppress(ValueError):
            event = json.loads(line)
            found += [event] if isinstance(event, dict) else []
    file.close()
    return tuple(found)


def _last_line(file: IO[bytes]) -> str:
    file.seek(0)
    lines = file.read().decode(errors="replace").splitlines()
    file.close()
    return lines[-1].removeprefix("streammerge: ") if lines else ""


def numa_nodes() -> list[set[int]]:
    """Return the CPUs of each NUMA node that this process may use; at least one node."""
    mine, found = os.sched_getaffinity(0), []
    for path in sorted(Path("/sys/devices/system/node").glob("node[0-9]*/cpulist")):
        with suppress(OSError, ValueError):
            found.append(cpus_of(path.read_text()) & mine)
    return [node for node in found if node] or [mine]


def cpus_of(text: str) -> set[int]:
    """Return the CPUs of a list as the kernel writes it.

    >>> sorted(cpus_of("0-2,8"))
    [0, 1, 2, 8]
    """
    cpus: set[int] = set()
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        if first:
            cpus |= set(range(int(first), int(last or first) + 1))
    return cpus
