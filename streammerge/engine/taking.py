"""How a process of a shared merge comes by the units that it does: it claims them, or a scheduler hands them to it."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections import deque
from collections.abc import Sequence
from typing import Any, Protocol, TextIO

from streammerge.io.private import own_token
from streammerge.output.heartbeat import stale_seconds
from streammerge.output.shared_ledger import SharedLedger

_POLL_SECONDS = 1.0
"""Seconds between two looks at what the others have done, for a process that waits."""


def poll_seconds() -> float:
    """Return the seconds between two looks at what others have done."""
    return min(_POLL_SECONDS, stale_seconds() / 10)


class Taking(Protocol):
    """Decides which units this process does."""

    def take(self, ledger: SharedLedger, units: Sequence[str]) -> str | None:
        """Return one of some units that are not done, for this process to do now; None if there is none at the moment."""

    def recorded(self, ledger: SharedLedger, unit: str) -> None:
        """Hear that a unit which this process took is recorded."""

    def given_up(self) -> None:
        """Hear that this process will not do what it took and has not recorded; it may take it again."""

    def pause(self, seconds: float, stop: threading.Event) -> bool:
        """Wait; return True as soon as it is worth asking again."""


class Claiming:
    """Takes the first unit that nobody claims."""

    def take(self, ledger: SharedLedger, units: Sequence[str]) -> str | None:
        """See `Taking`."""
        return next((unit for unit in units if ledger.claim(unit)), None)

    def recorded(self, ledger: SharedLedger, unit: str) -> None:
        """See `Taking`."""

    def given_up(self) -> None:
        """See `Taking`: whoever claims has given up its claims."""

    def pause(self, seconds: float, stop: threading.Event) -> bool:
        """See `Taking`."""
        return stop.wait(seconds)


class HandedOut:
    """Takes the units that a scheduler names, on lines of text, in answer to an offer of those that are left.

    ::

        this process   {"event": "offer", "units": ["0123456789abcdef/merge-00017", …], "worker": …}
        scheduler      0123456789abcdef/merge-00017             take this unit
                       (an empty line)                          look again: what is left has changed
        this process   {"event": "recorded", "unit": …}         or "declined", if others have done it meanwhile,
                                                                or its upload broke off

    Claims are written for others to see and stop nobody: the scheduler knows better who is alive. The end of the
    scheduler's lines is its end, and stops this process.

    Parameters
    ----------
    lines, told
        Where the scheduler's lines come from, and where this process's events go.
    """

    def __init__(self, lines: TextIO, told: TextIO) -> None:
        self._lines, self._told = lines, told
        self._woken = threading.Event()
        self._offered: set[str] = set()
        """The units of the offer that is open; empty if none is."""
        self._in_hand: set[str] = set()
        self._answers = deque[str]()
        threading.Thread(target=self._listen, name="scheduler", daemon=True).start()

    def take(self, ledger: SharedLedger, units: Sequence[str]) -> str | None:
        """See `Taking`."""
        names = {f"{ledger.run}/{unit}": unit for unit in units}
        self._woken.clear()
        while self._answers:
            name = self._answers.popleft()
            self._offered = set()
            if name in names:
                self._in_hand.add(name)
                ledger.seize(names[name])
                return names[name]
            if name:
                self._tell({"event": "declined", "unit": name})
        if self._offered.isdisjoint(names) and names:
            self._offered = set(names)
            self._tell({"event": "offer", "units": list(names), "worker": own_token()})
        return None

    def recorded(self, ledger: SharedLedger, unit: str) -> None:
        """See `Taking`."""
        self._in_hand.discard(f"{ledger.run}/{unit}")
        self._tell({"event": "recorded", "unit": f"{ledger.run}/{unit}"})

    def given_up(self) -> None:
        """See `Taking`."""
        for name in sorted(self._in_hand):
            self._tell({"event": "declined", "unit": name})
        self._in_hand.clear()

    def pause(self, seconds: float, stop: threading.Event) -> bool:
        """See `Taking`."""
        return self._woken.wait(seconds) or stop.is_set()

    def _tell(self, event: dict[str, Any]) -> None:
        # In one piece, whatever the main thread has written of a line: recorded units are told by a different one.
        self._told.write(f"\n{json.dumps(event)}\n")
        self._told.flush()

    def _listen(self) -> None:
        for line in self._lines:
            self._answers.append(line.strip())
            self._woken.set()
        os.kill(os.getpid(), signal.SIGTERM)
