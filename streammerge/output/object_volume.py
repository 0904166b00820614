"""The working files of an output in an object store: claims, signs of life and records, each one small object.

A store has no folders that could be removed, so a process that has slept through the end of a run would put its files into
a finished output. After each of its own it therefore looks whether the run is still there, and takes the file back if not.
"""

from __future__ import annotations

import time
from contextlib import suppress

from streammerge.errors import StreammergeError
from streammerge.io.object_small import (
    create_object,
    facts_of,
    list_objects,
    names_below,
    put_object,
    read_small,
    remove_object,
)
from streammerge.io.private import own_token
from streammerge.output.place import RUN, is_run
from streammerge.output.same_kernel import have_seen_end, processes
from streammerge.output.volume import Gone

_CLOCK_SECONDS = 30.0
"""Seconds after which the store is asked for its time again."""
_MOST = 100_000
"""Most working files that are removed."""
_CLOCK = "clock-"
"""The beginning of the names of objects that tell the store's time."""


class ObjectFolder:
    """A volume below a URL; see `Volume`.

    Parameters
    ----------
    url
        Its URL, without a slash at the end.
    run
        The run that this process takes part in; empty if it only looks.
    """

    def __init__(self, url: str, run: str = "") -> None:
        self._url, self._run = url, run
        self._asked: tuple[float, float] | None = None
        """The store's time and the monotonic clock's when it was asked."""

    @property
    def domain(self) -> str:
        """See `Volume`: the kernel and its set of process numbers."""
        return processes()

    def prepare(self, run: str) -> None:
        """See `Volume`: a store needs no folders."""

    def has_ended(self, domain: str, pid: int) -> bool:
        """See `Volume`."""
        return have_seen_end(domain, pid)

    def leave(self, run: str) -> None:
        """See `Volume`."""

    def runs(self) -> list[str]:
        """See `Volume`."""
        return sorted(filter(is_run, names_below(self._url)[1]))

    def exists(self, name: str) -> bool:
        """See `Volume`."""
        if not name:
            return any(names_below(self._url))
        return facts_of(f"{self._url}/{name}") is not None

    def read(self, name: str) -> bytes | None:
        """See `Volume`."""
        return read_small(f"{self._url}/{name}")

    def put(self, name: str, data: bytes, *, durable: bool = True) -> None:
        """See `Volume`; every object is durable."""
        put_object(f"{self._url}/{name}", data)
        self._look(name)

    def create(self, name: str, data: bytes) -> bool:
        """See `Volume`."""
        created = create_object(f"{self._url}/{name}", data)
        if created:
            self._look(name)
        return created

    def names(self, folder: str = "") -> list[str]:
        """See `Volume`."""
        prefix = f"{folder}/" if folder else ""
        found, _ = names_below(f"{self._url}/{folder}" if folder else self._url)
        return sorted(prefix + name for name in found if not name.startswith(_CLOCK))

    def age(self, name: str) -> float | None:
        """See `Volume`."""
        written = self._written(name)
        return None if written is None else max(0.0, self._now() - written)

    def remove(self, name: str) -> None:
        """See `Volume`."""
        remove_object(f"{self._url}/{name}")

    def discard(self, run: str) -> None:
        """See `Volume`."""
        remove_object(f"{self._url}/{run}/{RUN}")
        self._remove_all(f"{run}/")

    def clear(self) -> None:
        """See `Volume`."""
        for run in self.runs():
            self.discard(run)
        self._remove_all("")

    def _remove_all(self, prefix: str) -> None:
        for name in list_objects(f"{self._url}/{prefix}".rstrip("/"), _MOST):
            remove_object(f"{self._url}/{prefix}{name}")

    def _look(self, name: str) -> None:
        """Take an own file back if the run has ended."""
        about = f"{self._run}/{RUN}"
        if self._run and name != about and not self.exists(about):
            self.remove(name)
            raise Gone(f"{self._url}/{about}")

    def _written(self, name: str) -> float | None:
        """Return the time, by the store's clock, when a file was written; None if there is none."""
        facts = facts_of(f"{self._url}/{name}")
        return None if facts is None else facts.written

    def _now(self) -> float:
        """Return the time of the store, which is that of an object written just now."""
        now = time.monotonic()
        if self._asked is None or now - self._asked[1] > _CLOCK_SECONDS:
            told = None
            if self._run:  # one that only looks writes nothing
                probe = _CLOCK + own_token()
                with suppress(StreammergeError):
                    put_object(f"{self._url}/{probe}", b"?")
                    told = self._written(probe)
                    self.remove(probe)
            self._asked = time.time() if told is None else told, now
        return self._asked[0] + now - self._asked[1]
