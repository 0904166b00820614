"""Run a user's command on a finished output and read its score: the number on the last line that it prints."""

from __future__ import annotations

import contextlib
import math
import os
import re
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import IO

from streammerge.errors import InputError, printable
from streammerge.events import Control
from streammerge.lazy import late_pattern
from streammerge.records import dataclass
from streammerge.units import format_seconds

PLACE = "{}"
"""Stands for the directory of the output in a command."""
_TAIL = 1 << 14
"""Bytes kept of what the command prints."""
_POLL_SECONDS = 0.05
_GRACE_SECONDS = 5.0
"""Seconds between asking a command to end and killing it."""
_NUMBER = late_pattern(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", re.ASCII)


@dataclass(frozen=True)
class Score:
    """What a command said of an output."""

    value: float | None
    """The score; None if the command failed."""
    reason: str = ""
    """Why there is no score, in one line."""


def check_command(command: str) -> None:
    """Refuse a command that does not say where the output's directory goes.

    Raises
    ------
    InputError
        If it lacks ``{}``.
    """
    if "\0" in command:
        raise InputError("--score: the command holds a NUL character")
    if PLACE not in command:
        raise InputError(
            f"--score {printable(command, 120)!r}: nothing stands for the point's directory: write {PLACE} where it goes, as in "
            f"--score 'python score.py {PLACE}'"
        )


def score(command: str, directory: Path, timeout: float | None, control: Control) -> Score:
    """Run a command by the shell, with ``{}`` replaced by the directory of an output.

    It has no standard input, and it is ended, with everything that it has started, once `timeout` seconds have passed.

    Raises
    ------
    Stopped
        If the caller stops the run; the command is then ended too.
    """
    script = filled(command, str(directory))
    try:
        process = subprocess.Popen(
            ["/bin/sh", "-c", script],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
    except OSError as error:
        return Score(None, f"the command cannot be started: {error.strerror or error}")
    assert process.stdout is not None
    assert process.stderr is not None
    printed, complained = _Tail(process.stdout), _Tail(process.stderr)
    try:
        ended = _wait(process, timeout, control)
    finally:
        _end(process)
        last, complaint = printed.last_line(), complained.last_line()
    control.check()
    if not ended:
        assert timeout is not None
        return Score(None, f"the command took longer than {format_seconds(timeout)}")
    return _read(process.returncode, last, complaint)


def filled(command: str, directory: str) -> str:
    """Return the command with the directory in place of ``{}``, quoted as the place requires.

    >>> filled("score {} '{}/x' \\"{}\\"", "a b")
    'score \\'a b\\' \\'a b/x\\' "a b"'
    """
    quoted = {
        "": "'" + directory.replace("'", "'\\''") + "'",
        "'": directory.replace("'", "'\\''"),
        '"': re.sub(r'([\\"$`])', r"\\\1", directory),
    }
    parts, quote, position = [], "", 0
    while position < len(command):
        if command.startswith(PLACE, position):
            parts.append(quoted[quote])
            position += len(PLACE)
            continue
        character = command[position]
        if character == "\\" and quote != "'":
            parts.append(command[position : position + 2])
            position += 2
            continue
        if character in "'\"" and quote in ("", character):
            quote = "" if quote else character
        parts.append(character)
        position += 1
    return "".join(parts)


def _read(code: int, last: str, complaint: str) -> Score:
    """Return the score that a command printed, given its exit code and its last lines."""
    if code:
        how = f"was killed by {_name_of(-code)}" if code < 0 else f"ended with exit code {code}"
        return Score(None, f"the command {how}" + (f": {printable(complaint, 200)}" if complaint else ""))
    if not last:
        return Score(None, "the command printed nothing")
    if last.lower().lstrip("+-") in ("nan", "inf", "infinity"):
        return Score(None, f"the last line, {printable(last, 80)!r}, is not a finite number")
    if not _NUMBER.fullmatch(last) or not math.isfinite(float(last)):
        return Score(None, f"the last line is not a number: {printable(last, 80)!r}")
    return Score(float(last))


def _name_of(signum: int) -> str:
    try:
        return signal.Signals(signum).name
    except ValueError:
        return f"signal {signum}"


def _wait(process: subprocess.Popen[bytes], timeout: float | None, control: Control) -> bool:
    """Wait until a process ends; return False if it took too long or the run is stopped."""
    began = time.monotonic()
    while not control.stop.is_set():
        left = math.inf if timeout is None else timeout - (time.monotonic() - began)
        if left <= 0:
            return False
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(min(_POLL_SECONDS, left))
            return True
    return False


def _end(process: subprocess.Popen[bytes]) -> None:
    """End everything that a command has started and that is still running."""
    with contextlib.suppress(OSError):
        os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE_SECONDS)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


class _Tail:
    """The end of what a stream prints, read in a thread so that the command never waits."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream, self._data = stream, b""
        self._thread = threading.Thread(target=self._read, name="score", daemon=True)
        self._thread.start()

    def _read(self) -> None:
        descriptor = self._stream.fileno()
        with contextlib.suppress(OSError, ValueError):
            while data := os.read(descriptor, _TAIL):
                self._data = (self._data + data)[-_TAIL:]

    def last_line(self) -> str:
        """Return the last line that is not blank, once the stream ends; an orphan may hold it open a little longer."""
        self._thread.join(_GRACE_SECONDS)
        if not self._thread.is_alive():
            self._stream.close()
        lines = self._data.decode("utf-8", "replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "")
