"""Write large objects: each is one multipart upload, in the order of its bytes, without a local copy."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from queue import Empty, Queue

from streammerge.errors import StreammergeError, WorldError, printable
from streammerge.io.buffer_pool import Bytes
from streammerge.io.object_errors import AGAIN, explained, is_aborted, is_passing, while_writing
from streammerge.io.object_stores import e_tag_of, library, split_url, store_of
from streammerge.io.object_waiting import Patience

PART = 8 << 20
"""Least bytes of a part."""
_MOSTPARTS = 9_000
"""Most parts of an object; stores take 10,000."""
AT_ONCE = 4
"""Parts of an object that are sent at once."""
_LARGEST_SHARD = PART * _MOSTPARTS
_WAIT_SECONDS = 0.2
_ABORT_SECONDS = 10.0


def upload_nbytes(largest: int) -> int:
    """Return the resident memory of an upload of an object of so many bytes, beyond the buffers that it is fed from.

    Parts in flight, one being sent on, one being filled, and what the library's connections hold.
    """
    return (AT_ONCE + 3) * part_nbytes(largest) + (16 << 20)


def part_nbytes(nbytes: int) -> int:
    """Return the size of the parts of an object: all equal, as some stores demand."""
    return PART if nbytes <= _LARGEST_SHARD else -(-nbytes // _MOSTPARTS)


class UploadLostError(WorldError):
    """An upload broke off, though the store is there again: its parts are gone, and the object must be made anew."""


class _Given(Exception):
    """Raised within an upload that is given up, so that the library aborts it."""


class Upload:
    """One object, uploaded as its bytes come; it appears whole, when it is finished.

    Parameters
    ----------
    nbytes
        Its size.
    stop
        Set to give up while waiting for the store.
    before_end
        Called when all parts have been handed over; an exception that it raises gives the upload up.
    tell
        Told of a wait for the store, from the thread of the upload.
    was
        The ETag of the object that the upload replaces, empty if there is none: an object of the right size that has a
        different one is this upload, complete, though the answer was lost. None: not known.
    """

    def __init__(
        self,
        url: str,
        nbytes: int,
        stop: threading.Event,
        before_end: Callable[[], None] = lambda: None,
        tell: Callable[[str], None] = lambda line: None,
        was: str | None = None,
    ) -> None:
        self._url, self._stop, self._before_end = url, stop, before_end
        self._nbytes, self._tell, self._was = nbytes, tell, was
        self._ending = False
        """True once the library has taken all parts."""
        self._part = part_nbytes(nbytes)
        self._filled = bytearray()
        self._parts: Queue[bytes | None] = Queue(1)
        self._first: list[bytes] | None = []
        """The first part, once it has been taken; None if more has been asked for, so that it cannot be sent again."""
        self._given_up = threading.Event()
        self._failure: BaseException | None = None
        self._e_tag = ""
        self._thread = threading.Thread(target=self._run, name="upload", daemon=True)
        self._thread.start()

    def write(self, data: Bytes | bytes) -> None:
        """Take the next bytes; they may be reused on return.

        Raises
        ------
        WorldError
            If the store fails.
        """
        view = memoryview(data) if isinstance(data, bytes) else data.data
        while len(view):
            n = min(len(view), self._part - len(self._filled))
            self._filled += view[:n]
            view = view[n:]
            if len(self._filled) == self._part:
                part, self._filled = bytes(self._filled), bytearray()
                self._hand(part)

    def finish(self, look: Callable[[], None] = lambda: None) -> str:
        """Send the rest, and return the object's ETag when the store has it whole.

        Parameters
        ----------
        look
            Called a few times a second meanwhile.

        Raises
        ------
        WorldError
            If the store fails.
        """
        if self._filled:
            part, self._filled = bytes(self._filled), bytearray()
            self._hand(part)
        try:
            self._before_end()
        except BaseException:
            self.give_up()
            raise
        self._hand(None)
        while self._thread.is_alive():
            self._thread.join(_WAIT_SECONDS)
            look()
            if self._stop.is_set():
                self.give_up()
                break
        self._check()
        return self._e_tag

    def close(self) -> None:
        """Give it up, unless it is finished."""
        if self._thread.is_alive():
            self.give_up()

    def give_up(self) -> None:
        """Abort it, so that the store frees its parts; a store that is away is not waited for."""
        self._given_up.set()
        self._thread.join(_ABORT_SECONDS)

    def _hand(self, part: bytes | None) -> None:
        while True:
            self._check()
            try:
                self._parts.put(part, timeout=_WAIT_SECONDS)
                return
            except Exception:  # full
                if self._stop.is_set():
                    self._given_up.set()

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure
        if self._given_up.is_set():
            raise WorldError(f"{printable(self._url)}: the upload was given up: {AGAIN}")

    def _run(self) -> None:
        store, key = store_of(self._url, patient=True)
        obstore = library(split_url(self._url)[0])
        patience = Patience(self._url, self._given_up, self._tell)
        while True:
            try:
                done = obstore.put(store, key, self._each(), chunk_size=self._part, max_concurrency=AT_ONCE)
                self._e_tag = e_tag_of(done)
                patience.came()
            except BaseException as error:  # a panic of the library is no Exception
                if isinstance(error, Exception) and not self._given_up.is_set():
                    # The library does not repeat the request that begins an upload if the store dies while it answers.
                    if self._first is not None and patience.wait(error):
                        continue
                    if self._first is None and (is_passing(error) or is_aborted(error)):
                        try:
                            self._failure = self._look_for(error)
                        except BaseException as failure:
                            self._failure = while_writing(self._url, failure)
                        return
                self._failure = while_writing(self._url, error)
            return

    def _look_for(self, error: Exception) -> StreammergeError | None:
        """Wait until the store is there again, and look for the object; return what is to be raised, if it is not whole.

        The library does not repeat later parts, or the end, of an upload whose answer was cut; the parts are gone.
        """
        patience, why = Patience(self._url, self._given_up, self._tell), error
        while is_aborted(why) or patience.wait(why):
            try:
                store, key = store_of(self._url)
                meta = library(split_url(self._url)[0]).head(store, key)
            except Exception as failure:
                if not isinstance(explained(self._url, failure), FileNotFoundError):
                    why = failure
                    continue
                meta = None
            patience.came()
            if self._ending and meta is not None and self._was is not None:
                found = e_tag_of(meta)
                if meta["size"] == self._nbytes and found != self._was:
                    self._e_tag = found
                    return None
            self._abort()
            return UploadLostError(str(while_writing(self._url, error)))
        return while_writing(self._url, why)

    def _abort(self) -> None:
        """Free the parts: the library has tried to while the store was away."""
        from streammerge.io.object_leftovers import abort_uploads  # it takes an HTTP client

        folder, _, name = self._url.rpartition("/")
        abort_uploads(folder, {name})

    def _each(self) -> Iterator[bytes]:
        """Yield the parts; the first one is kept, and yielded again by a later call, until a second is asked for."""
        for part in self._first or ():
            yield part
            self._first = None
        while True:
            try:
                part_or_end = self._parts.get(timeout=_WAIT_SECONDS)
            except Empty:
                if self._given_up.is_set():
                    raise _Given from None
                continue
            if part_or_end is None:
                self._ending = True
                return
            if self._first is not None:
                self._first.append(part_or_end)
            yield part_or_end
            self._first = None
