"""Hand out units of work that several processes share: each does what nobody does, until all is done by whomever."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

from streammerge.engine.taking import Taking, poll_seconds
from streammerge.errors import ModelError
from streammerge.output.shared_ledger import SharedLedger, in_turn
from streammerge.output.volume import Gone

_WAIT_SECONDS = 0.25


def check_failure(ledger: SharedLedger) -> None:
    """Raise what a different process met and no process would escape: a value that is not finite, say.

    Raises
    ------
    ModelError
        With the message of the process that met it.
    """
    failure = ledger.failure()
    if failure is not None:
        raise ModelError(failure[1])


class Sharing:
    """The units that this process takes part in.

    Parameters
    ----------
    worker
        The token of this process.
    taking
        Decides which units this process does.
    on_wait
        Called four times a second while others work; an exception that it raises ends the wait.
    """

    def __init__(
        self,
        ledger: SharedLedger,
        worker: str,
        stop: threading.Event,
        taking: Taking,
        on_wait: Callable[[], None],
    ) -> None:
        self._ledger, self._worker, self._stop, self._on_wait = ledger, worker, stop, on_wait
        self._taking = taking

    def share(self, units: Mapping[str, Callable[[], Mapping[str, Any]]]) -> None:
        """Do units that nobody does, each recorded with what its function returns; return when all are recorded.

        Raises
        ------
        Gone
            If the work has ended without this process.
        """
        order = in_turn(list(units), [1] * len(units), self._worker)
        while True:
            check_failure(self._ledger)
            done = self._ledger.done()
            left = [unit for unit in order if unit not in done]
            if not left:
                return
            unit = self._taking.take(self._ledger, left)
            if unit is not None:
                self._ledger.record(unit, units[unit]())
                self._taking.recorded(self._ledger, unit)
                continue
            if self._ledger.about() is None:
                raise Gone(left[0])
            self._wait()

    def value(self, unit: str) -> Mapping[str, Any]:
        """Return the record of a unit that is done.

        Raises
        ------
        Gone
            If it has been removed: the work has ended without this process.
        """
        value = self._ledger.value(unit)
        if value is None:
            raise Gone(unit)
        return value

    def _wait(self) -> None:
        left = poll_seconds()
        while left > 0:
            self._on_wait()
            if self._taking.pause(min(left, _WAIT_SECONDS), self._stop):
                self._on_wait()
                return
            left -= _WAIT_SECONDS
