"""Read an object by ranged requests, several at a time, each of which fails if the object is no longer the same."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from functools import cache
from itertools import islice
from typing import Any

from streammerge.errors import InputError, StreammergeError, printable
from streammerge.io.buffer_pool import Bytes
from streammerge.io.local_file import shrunk
from streammerge.io.object_errors import while_merging
from streammerge.io.object_stores import library, split_url, store_of
from streammerge.io.object_waiting import Patience

CONNECTIONS = "STREAMMERGE_CONNECTIONS"
"""Variable of the environment, set by ``--connections``: most requests in flight in a process."""
DEFAULT_CONNECTIONS = 16
MOST_CONNECTIONS = 256
PIECE = 8 << 20
"""Most bytes of one request: large enough that its latency does not count, small enough that many share a range."""
_CHUNK = 1 << 20
"""Bytes taken from an answer at a time, so that it is never held whole."""
_HELD = 3 << 20
"""Bytes that a request in flight holds: a chunk, and what the connection has buffered (measured: 2.1 MiB)."""
_LIBRARY = 8 << 20
"""Bytes of obstore itself, and of its threads (measured: 5 MiB)."""
_AHEAD = 1 << 18
"""Bytes fetched by a small read: the header of most files."""
_BATCH = 256
"""Scattered reads that are submitted together."""


def connections() -> int:
    """Return the most requests in flight.

    Raises
    ------
    InputError
        If the environment's number is none.
    """
    text = os.environ.get(CONNECTIONS) or str(DEFAULT_CONNECTIONS)
    if not (text.isascii() and text.isdecimal() and 1 <= int(text[:9]) <= MOST_CONNECTIONS):
        raise InputError(
            f"{CONNECTIONS} {printable(text, 40)!r}: give a whole number from 1 to {MOST_CONNECTIONS}"
        )
    return int(text)


def requests_nbytes() -> int:
    """Return the resident memory of all requests in flight, beyond the buffers that they fill."""
    return connections() * _HELD + _LIBRARY


@cache
def _in_flight(most: int) -> threading.BoundedSemaphore:
    return threading.BoundedSemaphore(most)


@cache
def _threads(most: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(most, thread_name_prefix="requests")


class ObjectFile:
    """An object that is open for reading, as it was when it was listed.

    Parameters
    ----------
    status
        Its status; has ``e_tag`` and ``st_size``.
    stop
        Set to wait no longer for a store that is away.
    """

    direct = False

    def __init__(self, url: str, status: Any, stop: threading.Event | None = None) -> None:
        self._url = url
        self._stop = stop
        self._status = status
        self._store, self._key = store_of(url)
        self._obstore = library(split_url(url)[0])
        self._ahead = (0, b"")
        self.users = 0

    def status(self) -> Any:
        """See `InputFile`."""
        return self._status

    def pread(self, nbytes: int, offset: int) -> bytes:
        """Return up to `nbytes` bytes from `offset` on; fewer only at the object's end."""
        begin, held = self._ahead
        end = min(offset + nbytes, self._status.st_size)
        if end <= offset:
            return b""
        if not begin <= offset <= end <= begin + len(held):
            stop = min(max(end, offset + _AHEAD), self._status.st_size)
            held = b"".join(self._stream(offset, stop - offset))
            begin = offset
            if len(held) <= _AHEAD:
                self._ahead = (begin, held)
        return held[offset - begin : end - begin]

    def read(self, offset: int, target: Bytes) -> None:
        """See `InputFile`.

        Raises
        ------
        WorldError
            If the object has changed or is gone, or the store fails.
        """
        starts = range(0, target.size, PIECE)
        if len(starts) < 2:
            self._fill(offset, [target.data] if target.size else [])
            return
        self._together((offset + start, [target[start : start + PIECE].data]) for start in starts)

    read_mapped = read

    def read_parts(self, parts: Iterable[tuple[int, list[memoryview]]]) -> int:
        """See `InputFile`."""
        pieces = (piece for offset, views in parts for piece in _pieces(offset, views))
        total = 0
        while batch := list(islice(pieces, _BATCH)):
            self._together(batch)
            total += sum(len(view) for _, views in batch for view in views)
        return total

    def _together(self, pieces: Iterable[tuple[int, list[memoryview]]]) -> None:
        """Read several pieces at a time; on return no thread writes to them any more, also after a failure."""
        futures: list[Future[None]] = [_threads(connections()).submit(self._fill, *piece) for piece in pieces]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            for future in futures:
                future.cancel()
            wait(futures)
        for future in futures:
            if not future.cancelled():
                future.result()

    def _fill(self, offset: int, views: list[memoryview]) -> None:
        """Fill buffers with consecutive bytes by one request."""
        waiting = iter(views)
        view = next(waiting, memoryview(b""))
        for chunk in self._stream(offset, sum(map(len, views))):
            while len(chunk):
                if not len(view):
                    view = next(waiting)
                n = min(len(view), len(chunk))
                view[:n] = chunk[:n]
                view, chunk = view[n:], chunk[n:]

    def _stream(self, offset: int, nbytes: int) -> Iterator[memoryview]:
        if not nbytes:
            return
        done, patience = 0, Patience(self._url, self._stop)
        while done < nbytes:
            before = done
            try:
                with _in_flight(connections()):
                    options = {"range": (offset + done, offset + nbytes), "if_match": self._status.e_tag}
                    answer = self._obstore.get(self._store, self._key, options=options)
                    for chunk in answer.stream(min_chunk_size=_CHUNK):
                        done += len(chunk)
                        if done > nbytes:
                            break
                        yield memoryview(chunk)
            except StreammergeError:
                raise
            except Exception as error:
                if done > before:
                    patience.came()
                if not patience.wait(error):
                    raise while_merging(self._url, error) from None
            else:
                patience.came()
                break
        if done != nbytes:
            raise shrunk(self._url)

    def read_past_cache(self, offset: int, slot: Bytes, nbytes: int) -> None:
        """Not possible: `direct` is False."""
        raise NotImplementedError

    def cached_share(self, offset: int, nbytes: int) -> float:
        """See `InputFile`."""
        return 0.0

    def will_need(self, offset: int, nbytes: int) -> None:
        """See `InputFile`; there is no cache."""

    def forget(self, offset: int, nbytes: int) -> None:
        """See `InputFile`; there is no cache."""

    def close(self) -> None:
        """See `InputFile`; connections belong to the bucket."""


def _pieces(offset: int, views: list[memoryview]) -> Iterator[tuple[int, list[memoryview]]]:
    """Cut consecutive buffers into requests of at most `PIECE` bytes, and more only for one large buffer."""
    some: list[memoryview] = []
    nbytes = 0
    for view in views:
        if some and nbytes + len(view) > PIECE:
            yield offset, some
            offset, some, nbytes = offset + nbytes, [], 0
        some.append(view)
        nbytes += len(view)
    if some:
        yield offset, some
