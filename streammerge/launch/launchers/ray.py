"""A Ray cluster: Ray places the engines, restarts them, and shows each shard as a task.

This file starts the process that talks to Ray; see `streammerge.launch.on_ray.driver`. It is a process of its own because
Ray ends its driver without a word when the head of the cluster is lost, and writes to stderr as it likes.
"""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from importlib.util import find_spec
from typing import IO, Any

from streammerge.errors import InputError, printable
from streammerge.launch.base import Ended, Needs, launcher

_PATIENCE = 40.0
"""Seconds between the wish that the driver stops and its end by force; engines have half of that."""
LOST = (
    "the connection to the Ray cluster was lost (its head has ended, or the network has): finished shards stay, "
    "and a cluster that is back goes on"
)


@launcher("ray")
class Ray:
    """Starts the driver of a merge on a Ray cluster."""

    count = 1
    restarts = 0
    """Ray restarts engines; a driver that has lost its cluster does not find it again."""
    elsewhere = True

    def __init__(self, needs: Needs) -> None:
        if find_spec("ray") is None:
            raise InputError(
                "--on ray needs the extra `ray`: pip install 'streammerge[ray]', here and on all nodes"
            )
        if needs.device.partition(":")[0] not in ("auto", "cpu", "cuda"):
            raise InputError(f"--device {printable(needs.device)} with --on ray: choose auto, cpu or cuda")
        self._needs = needs
        self._process: subprocess.Popen[bytes] | None = None
        self._out: IO[bytes] | None = None
        self._at, self._rest = 0, b""
        self._taken: list[dict[str, Any]] = []
        self._kept: list[dict[str, Any]] = []

    def start(self, number: int, command: Sequence[str]) -> None:
        """See `Launcher`."""
        self._out = tempfile.TemporaryFile()  # noqa: SIM115 it is read while the driver writes it
        told = {"command": list(command), "needs": asdict(self._needs), "directory": os.getcwd()}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "streammerge.launch.on_ray.driver", json.dumps(told)],
            stdin=subprocess.PIPE,  # it ends with this process, or when this is closed
            stdout=self._out,
            stderr=None if os.environ.get("STREAMMERGE_DEBUG") == "1" else subprocess.DEVNULL,
            env={**os.environ, **_environment()},
            start_new_session=True,  # Ctrl-C reaches this process alone, which stops that one
        )

    def heard(self) -> list[dict[str, Any]]:
        """See `Launcher`."""
        warnings = [event for event in self._new() if event.get("event") == "warning"]
        self._kept += [event for event in self._taken if event.get("event") != "warning"]
        return warnings

    def _new(self) -> list[dict[str, Any]]:
        """Return the events that the driver has told since the last call."""
        self._taken = []
        if self._out is not None:
            size = os.fstat(self._out.fileno()).st_size
            text = self._rest + os.pread(self._out.fileno(), size - self._at, self._at)
            self._at = size
            *lines, self._rest = text.split(b"\n")
            for line in lines:
                with suppress(ValueError):
                    event = json.loads(line)
                    self._taken += [event] if isinstance(event, dict) else []
        return self._taken

    def ended(self) -> list[Ended]:
        """See `Launcher`."""
        process = self._process
        if process is None or (code := process.poll()) is None:
            return []
        events = [*self.heard(), *self._kept]
        self.stop()
        if code not in (0, 1, 2):
            events.append({"event": "error", "message": LOST})
            code = 1
        return [Ended(0, code, tuple(events), LOST)]

    def stop(self) -> None:
        """See `Launcher`."""
        process, self._process = self._process, None
        if process is None or process.stdin is None or self._out is None:
            return
        process.stdin.close()
        try:
            process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        self.heard()
        self._out.close()
        self._out = None
        for event in self._kept:
            if event.get("event") == "marker":
                with suppress(OSError):
                    os.unlink(str(event["path"]))  # it is still there if the driver was killed


def _environment() -> dict[str, str]:
    """Return the variables that Ray reads when it is imported."""
    quiet = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    if os.environ.get("RAY_ADDRESS"):
        return quiet
    # A cluster of our own: without a token, who reaches its ports runs code here.
    return {**quiet, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
