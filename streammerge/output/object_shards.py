"""Output shards in an object store: each is one upload, in the order of its bytes; whoever is early waits for its turn."""

from __future__ import annotations

import signal
import threading
from collections.abc import Collection

from streammerge.errors import Stopped
from streammerge.io.buffer_pool import Bytes
from streammerge.io.object_upload import Upload
from streammerge.planning.layout import Layout

_WAIT_SECONDS = 0.2


class ObjectShards:
    """The shards of one merge; a `Sink` that takes pieces in file order only.

    A piece that comes early waits, and holds its buffer. This cannot end in a deadlock: buffers are leased in the order
    of the chunks (`engine.turns`), so the piece whose turn it is always has one.

    Parameters
    ----------
    url
        The output.
    stop
        Set to stop the merge; pieces that wait give up.

    Attributes
    ----------
    e_tags
        The ETag of each shard that is whole, by number.
    """

    def __init__(self, url: str, layout: Layout, stop: threading.Event) -> None:
        self._url, self._layout, self._stop = url, layout, stop
        self._turn = threading.Condition()
        self._waiting: list[int] = []
        self._at = 0
        self._upload: Upload | None = None
        self._held: Upload | None = None
        """The upload of the shard whose presence marks a finished model: it ends last."""
        self._failure: BaseException | None = None
        self.e_tags: dict[int, str] = {}
        self.bytes_written = 0

    def begin(self, done: Collection[int]) -> None:
        """Start with the first shard that is not done."""
        self._open([number for number in range(len(self._layout.shards)) if number not in done])

    def write(self, shard: int, offset: int, data: Bytes) -> None:
        """See `Sink`.

        Raises
        ------
        WorldError
            If the store fails.
        Stopped
            If the merge is stopped while the piece waits for its turn.
        """
        if not data.size:
            return
        with self._turn:
            while (self._waiting[:1], self._at) != ([shard], offset):
                if self._failure is not None:
                    raise self._failure
                if self._stop.is_set():
                    raise Stopped(signal.SIGTERM)
                self._turn.wait(_WAIT_SECONDS)
        try:
            assert self._upload is not None
            self._upload.write(data)
            self._advance(offset + data.size)
        except BaseException as error:
            self._failure = error
            raise
        finally:
            with self._turn:
                self.bytes_written += data.size
                self._turn.notify_all()

    def sync(self, shards: set[int]) -> None:
        """See `Sink`: a shard is durable when the store has it whole."""

    def release(self) -> None:
        """Finish the shard that was held back until all other files are there."""
        if self._held is not None and self._layout.last is not None:
            self.e_tags[self._layout.last] = self._held.finish()
            self._held = None

    def close(self) -> None:
        """Abort the uploads that are not finished."""
        for upload in (self._upload, self._held):
            if upload is not None:
                upload.give_up()
        self._upload = self._held = None

    def _advance(self, at: int) -> None:
        """Go on from a position of the current shard: within it, or to the next shard."""
        number = self._waiting[0]
        if at < self._layout.shards[number].nbytes:
            with self._turn:
                self._at = at
            return
        assert self._upload is not None
        if number == self._layout.last:
            self._held, self._upload = self._upload, None
        else:
            self.e_tags[number] = self._upload.finish()
            self._upload = None
        self._open(self._waiting[1:])

    def _open(self, waiting: list[int]) -> None:
        if not waiting:
            with self._turn:
                self._waiting = []
            return
        shard = self._layout.shards[waiting[0]]
        self._upload = Upload(f"{self._url}/{shard.name}", shard.nbytes, self._stop)
        self._upload.write(shard.header)
        with self._turn:
            self._waiting, self._at = waiting, len(shard.header)
        if len(shard.header) == shard.nbytes:
            self._advance(shard.nbytes)
