"""Signs of life of the processes that write an output: small files that say who works there, renewed while work moves.

A lock may hold on one host only (a directory's does on NFS and Lustre), so a process also looks for signs of life from
elsewhere. They prevent double work and confusion, not damage: nothing that is written relies on them.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import field, replace
from pathlib import Path
from typing import Any

from streammerge.errors import StreammergeError
from streammerge.io.private import own_token
from streammerge.output.place import WORKERS
from streammerge.output.same_kernel import have_seen_end, processes
from streammerge.output.volume import Folder, Gone, Volume
from streammerge.records import dataclass

STALE_SECONDS = "STREAMMERGE_STALE_SECONDS"
"""The environment variable with the seconds after which a process without a sign of life counts as dead."""
_STALE = 60.0
_BEAT = 5.0
_LEAST_CPU = 0.02
"""Share of the time that a process must compute to count as working if it moves no bytes; waiting takes less."""


def stale_seconds() -> float:
    """Return the seconds after which a process without a sign of life counts as dead."""
    try:
        return max(0.1, float(os.environ[STALE_SECONDS]))
    except (KeyError, ValueError):
        return _STALE


@dataclass(frozen=True)
class Sign:
    """The sign of life of one process."""

    worker: str
    """The token of the process, which its temporary files have in their names."""
    host: str
    pid: int
    domain: str
    """The place where locks hold: one kernel and one mount."""
    run: str
    """The merge that it shares with others; empty if it is alone."""
    age: float
    """Seconds since it was renewed, by the store's clock."""
    progress: Mapping[str, Any] = field(default_factory=dict)
    processes: str = ""
    """Where its number holds; see `streammerge.output.same_kernel`."""

    @property
    def has_ended(self) -> bool:
        """Whether it is known to have ended, killed perhaps: on a different host that cannot be seen."""
        return have_seen_end(self.processes, self.pid)

    @property
    def is_fresh(self) -> bool:
        """Whether the process counts as alive."""
        return self.age <= stale_seconds()


def domain_of(directory: Path) -> str:
    """Return a name of the kernel and the mount of an existing directory: inside it, file locks hold."""
    return Folder(directory).domain


def signs_of(volume: Volume, *, outside: str = "") -> list[Sign]:
    """Return the signs of life that can be read, ours included; others count as none.

    Parameters
    ----------
    outside
        Leave out those of this domain, without a look at the store's clock.
    """
    found = []
    for name in volume.names(WORKERS):
        with contextlib.suppress(StreammergeError):
            sign = _parsed(name, volume.read(name))
            if sign is not None and (not outside or sign.domain != outside):
                age = volume.age(name)
                found += [] if age is None else [replace(sign, age=age)]
    return found


class Heard:
    """The processes of which a sign of life was seen; one is looked for again only when the last may have gone stale."""

    def __init__(self, volume: Volume) -> None:
        self._volume = volume
        self._known: dict[str, tuple[float, Sign]] = {}
        """The sign of each process, and the time by the monotonic clock until which it is fresh."""

    def of(self, worker: str) -> bool:
        """Return whether a process gave a sign of life lately, and has not ended since so far as can be told."""
        name, now = f"{WORKERS}/{worker}.json", time.monotonic()
        until, sign = self._known.get(worker, (now, None))
        if sign is None or now >= until:
            age = self._volume.age(name)
            if age is None or age > stale_seconds():
                return False
            sign = _parsed(name, self._volume.read(name))
            if sign is None:
                return True
            self._known[worker] = now + stale_seconds() - age, sign
        return not self._volume.has_ended(sign.domain, sign.pid)


def _parsed(name: str, raw: bytes | None) -> Sign | None:
    if raw is None:
        return None
    try:
        told = json.loads(raw[: 1 << 16])
        worker = name.removeprefix(f"{WORKERS}/").removesuffix(".json")
        pid, progress = int(told["pid"]), dict(told["progress"])
        where = str(told.get("processes", ""))
        return Sign(
            worker, str(told["host"]), pid, str(told["domain"]), str(told["run"]), 0.0, progress, where
        )
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


class Heartbeat:
    """The sign of life of this process, renewed by a thread of its own.

    Parameters
    ----------
    volume
        That of the working files of an output; its folder for signs of life must exist.
    domain
        See `domain_of`.
    run
        The merge that is shared with others; empty: none is.
    progress
        Returns what is told to others; its value under ``moved`` changes when bytes have moved. ``idle``: true if nothing
        is in hand, so that a process that only waits counts as alive.
    """

    def __init__(
        self, volume: Volume, domain: str, run: str, progress: Callable[[], Mapping[str, Any]]
    ) -> None:
        self._volume, self._domain, self._run, self._progress = volume, domain, run, progress
        self.worker = own_token()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._moved: object = None
        self._cpu = 0.0
        self.is_alone = False
        """Whether the working files have been removed: the merge has ended without this process."""

    @property
    def name(self) -> str:
        """The name of its file."""
        return f"{WORKERS}/{self.worker}.json"

    def start(self) -> None:
        """Give the first sign of life, and renew it from now on.

        Raises
        ------
        WorldError
            If it cannot be written.
        Gone
            If the working files have been removed.
        """
        self._tell()
        self._thread.start()

    def stop(self) -> None:
        """Give no more signs, and take the last one away."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        with contextlib.suppress(StreammergeError):
            self._volume.remove(self.name)

    def _tell(self) -> None:
        told = self._progress()
        self._moved, self._cpu = told.get("moved"), time.process_time()
        own = {"host": socket.gethostname(), "pid": os.getpid(), "processes": processes()}
        sign = {**own, "domain": self._domain, "run": self._run}
        self._volume.put(self.name, json.dumps({**sign, "progress": told}).encode(), durable=False)

    def _beat(self) -> None:
        period = min(_BEAT, stale_seconds() / 6)
        while not self._stop.wait(period):
            told, cpu = self._progress(), time.process_time()
            worked, self._cpu = cpu - self._cpu > _LEAST_CPU * period, cpu
            if worked or told.get("idle") or told.get("moved") != self._moved:
                try:
                    self._tell()
                except Gone:
                    self.is_alone = True
                    return
                except StreammergeError:
                    continue  # a full disk, say; the merge itself will report it
