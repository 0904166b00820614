"""What runs in an actor: it keeps an engine in a process of its own, so that ``--memory`` is that of the engine alone."""

from __future__ import annotations

import json
import os
import platform
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from streammerge.version import __version__

_PATIENCE = 20.0
"""Seconds between the wish that the engine stops and its end by force."""
_POLL_SECONDS = 10.0


def versions() -> dict[str, str]:
    """Return the versions that must be the same everywhere."""
    return {"streammerge": __version__, "Python": platform.python_version()}


class Engine:
    """An engine on some node. Its methods run in threads; each argument and result is plain data."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._events: list[dict[str, Any]] = []
        self._changed = threading.Condition()

    def hello(self, marker: str) -> dict[str, Any]:
        """Return what the driver checks first: the versions here, and whether this node sees its marker file."""
        told = Path(marker).name
        with suppress(OSError):
            told = Path(marker).read_text()
        return {"versions": versions(), "sees": told, "host": socket.gethostname()}

    def begin(self, command: Sequence[str], environment: Mapping[str, str], directory: str) -> None:
        """Start the engine: ``streammerge`` with some arguments. It takes the place of an earlier one.

        There is one if the driver could not reach this actor for a moment, took it for lost, and begins anew.
        """
        self.stop()
        with self._changed:
            self._process, self._events = None, []
        errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 it is read when the engine has ended
        self._process = subprocess.Popen(
            [sys.executable, "-m", "streammerge", *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            env={**os.environ, **environment},
            cwd=directory if os.path.isdir(directory) else None,
            text=True,
            start_new_session=True,  # a signal to the actor is no signal to the engine, which ends with its input
        )
        threading.Thread(target=self._listen, args=(self._process, errors), daemon=True).start()

    def heard(self, since: int) -> list[dict[str, Any]]:
        """Return the events of the engine from number `since` on; wait for one, but not for ever."""
        with self._changed:
            self._changed.wait_for(lambda: len(self._events) > since, _POLL_SECONDS)
            return self._events[since:]

    def do(self, unit: str) -> str:
        """Let the engine do a unit; return how that ended: ``recorded``, ``declined`` or ``ended``."""
        seen = len(self._events)
        self.look(unit)
        with self._changed:
            while True:
                for event in [*self._events[seen:], *self._events[-1:]]:
                    if event["event"] == "ended" or event.get("unit") == unit:
                        return str(event["event"])
                self._changed.wait()

    def look(self, unit: str = "") -> None:
        """Let the engine see what is left."""
        process = self._process
        assert process is not None
        assert process.stdin is not None
        with suppress(OSError, ValueError):  # it has ended, which an event tells
            process.stdin.write(unit + "\n")
            process.stdin.flush()

    def stop(self) -> None:
        """Let the engine stop cleanly; end it by force if it does not."""
        process = self._process
        if process is None:
            return
        with suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        try:
            process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()

    def _listen(self, process: subprocess.Popen[str], errors: Any) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            try:
                event = json.loads(line)
            except ValueError:
                continue
            if isinstance(event, dict) and event.get("event") != "progress":
                self._tell(process, event)
        code = process.wait()
        with errors:
            errors.seek(0)
            lines = errors.read().splitlines()
        for pipe in (process.stdout, process.stdin):
            with suppress(OSError):  # what was written and not read goes nowhere
                if pipe is not None:
                    pipe.close()
        last = lines[-1].removeprefix("streammerge: ") if lines else ""
        self._tell(process, {"event": "ended", "code": code, "last": last, "at": time.time()})

    def _tell(self, process: subprocess.Popen[str], event: dict[str, Any]) -> None:
        with self._changed:
            if process is self._process:
                self._events.append(event)
                self._changed.notify_all()
