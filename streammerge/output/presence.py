"""The presence of a merge that works alone: told to other hosts, and refused if one of theirs is there."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

from streammerge.errors import OutputError, printable
from streammerge.io.durable import fsync_directory, world_errors
from streammerge.output.heartbeat import Heartbeat, Sign, domain_of, signs_of, stale_seconds
from streammerge.output.place import WORKERS, Place
from streammerge.output.volume import Folder
from streammerge.units import format_seconds


class Presence:
    """The sign of life of a merge that works alone, and a look at those of others.

    Parameters
    ----------
    progress
        See `Heartbeat`.
    """

    def __init__(self, place: Place, progress: Callable[[], Mapping[str, Any]]) -> None:
        self._place, self._progress = place, progress
        self._volume = Folder(place.state)
        self._heartbeat: Heartbeat | None = None

    def check(self) -> None:
        """Refuse an output where a process on a different host gave a sign of life just now.

        On this host, and on hosts that share its locks, the lock of the directory has decided already.

        Raises
        ------
        OutputError
            If there is one.
        """
        if self._place.state.is_symlink() or not self._place.state.is_dir():
            return
        with world_errors(self._place.state):
            domain = domain_of(self._place.state)
        for sign in signs_of(self._volume, outside=domain):
            if sign.is_fresh:
                raise OutputError(taken_by(self._place, sign))

    def begin(self) -> None:
        """Give signs of life from now on."""
        workers = self._place.state / WORKERS
        with world_errors(workers):
            self._place.state.mkdir(exist_ok=True)
            fsync_directory(self._place.folder)
            workers.mkdir(exist_ok=True)
            domain = domain_of(workers)
        heartbeat = Heartbeat(self._volume, domain, "", self._progress)
        heartbeat.start()
        self._heartbeat = heartbeat
        self.check()  # a different host may have begun at the same moment

    def end(self) -> None:
        """Give no more signs of life."""
        if self._heartbeat is not None:
            self._heartbeat.stop()
            self._heartbeat = None
            with contextlib.suppress(OSError):  # a different host has left its own there
                (self._place.state / WORKERS).rmdir()


def taken_by(place: Place, sign: Sign) -> str:
    """Return the message that a process on a different host is at work in an output."""
    return (
        f"{printable(place.out)}: a merge is writing there, process {sign.pid} on {printable(sign.host, 80)}, heard of "
        f"{format_seconds(sign.age)} ago: wait for it or, if it is dead, run the same command again in "
        f"{format_seconds(stale_seconds())}"
    )
