"""Start the processes of a shared merge, restart those that die, show one progress, end with one result."""

from __future__ import annotations

import signal
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from streammerge.errors import InputError, Stopped, StreammergeError, WorldError
from streammerge.events import Control, Event
from streammerge.launch.base import Ended, Launcher
from streammerge.output.status import status_of
from streammerge.records import dataclass

_POLL_SECONDS = 0.25
_LOOK_EVERY = 4
"""Polls between two looks at the output."""


@dataclass
class Driven:
    """What the processes did, as far as they could tell."""

    bytes_read: int = 0
    bytes_written: int = 0
    seconds: float = 0.0


def drive(
    launcher: Launcher, command: Sequence[str], out: Path, plan: Mapping[str, Any], control: Control
) -> Driven:
    """Run the processes until the merge is done.

    Parameters
    ----------
    command
        The arguments of ``streammerge`` in each process.
    plan
        The values of the event ``plan``.

    Raises
    ------
    InputError
        What one process met and all would meet; the others have been stopped.
    WorldError
        If the machine failed too often.
    Stopped
        If `control.stop` was set; all processes have been stopped cleanly.
    """
    driven, restarts, began = Driven(), Counter[int](), time.monotonic()
    running = set(range(launcher.count))
    known = set(plan.get("warnings", ()))
    last, polls = "", 0
    try:
        for number in sorted(running):
            launcher.start(number, command)
        control.emit(Event("start", {"bytes_done": 0}))
        while running:
            if control.stop.wait(_POLL_SECONDS):
                raise Stopped(control.signal() or signal.SIGTERM)
            _hear(launcher.heard(), driven, known, control)
            for end in launcher.ended():
                running.discard(end.number)
                _hear(end.events, driven, known, control)
                if end.code == 0:
                    continue
                last = _message(end)
                if end.code == 2:
                    raise InputError(last)
                if restarts[end.number] < launcher.restarts:
                    restarts[end.number] += 1
                    control.warn(f"process {end.number} ended: {last}: it is started again")
                    launcher.start(end.number, command)
                    running.add(end.number)
            polls += 1
            if polls % _LOOK_EVERY == 0:
                _show(out, plan, driven, control)
    finally:
        launcher.stop()
    if last and not _is_finished(out):
        tried = f" (after {launcher.restarts} restarts of each process)" if launcher.restarts else ""
        raise WorldError(f"{last}{tried}; run the same command again")
    driven.seconds = time.monotonic() - began
    return driven


def _hear(events: Iterable[Mapping[str, object]], driven: Driven, known: set[str], control: Control) -> None:
    """Add up what a process did, and hand on its warnings, each once."""
    for event in events:
        message = str(event.get("message", ""))
        if event.get("event") == "warning" and message not in known:
            known.add(message)
            control.warn(message)
        elif event.get("event") == "done":
            driven.bytes_read += _number(event.get("bytes_read"))
            driven.bytes_written += _number(event.get("bytes_written"))


def _message(end: Ended) -> str:
    told = [
        str(event["message"]) for event in end.events if event.get("event") == "error" and "message" in event
    ]
    if end.code < 0:
        with suppress(ValueError):
            return f"killed by {signal.Signals(-end.code).name}"
    return (told or [end.last_line or f"exit code {end.code}"])[-1]


def _number(value: object) -> int:
    return value if isinstance(value, int) else 0


def _show(out: Path, plan: Mapping[str, Any], driven: Driven, control: Control) -> None:
    try:
        status = status_of(out)
    except StreammergeError:
        return  # nothing has begun, or all has just ended
    if not status.nbytes:
        return
    alive = [one.sign for one in status.workers if one.sign.is_fresh]
    share = status.nbytes_done / status.nbytes
    read, written = (
        sum(_number(sign.progress.get(key)) for sign in alive) for key in ("bytes_read", "bytes_written")
    )
    control.emit(
        Event(
            "progress",
            {
                "bytes_read": driven.bytes_read + read,
                "bytes_written": driven.bytes_written + written,
                "tensors": round(share * plan["tensors"]),
                "tensors_total": plan["tensors"],
                "elements": round(share * plan["elements"]),
                "elements_total": plan["elements"],
                "workers": len(alive),
                "shards_done": status.shards_done,
                "shards": status.shards,
            },
        )
    )


def _is_finished(out: Path) -> bool:
    with suppress(StreammergeError):
        return status_of(out).finished
    return False
