"""Output shards in an object store: each is one upload, in the order of its bytes; whoever is early waits for its turn."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from queue import Empty, SimpleQueue

from streammerge.errors import Stopped
from streammerge.io.buffer_pool import Bytes
from streammerge.io.object_upload import Upload
from streammerge.output.object_place import object_of
from streammerge.output.own_shards import OwnShards, Written
from streammerge.output.place import Place
from streammerge.output.shards import Sink
from streammerge.output.side_parts import SideParts
from streammerge.planning.layout import Layout
from streammerge.planning.streamed import sides_in

_WAIT_SECONDS = 0.2


class ObjectShards(OwnShards):
    """The shards that this process has claimed; a `Sink` that takes pieces in the order of the claims and of the file.

    A piece that comes early waits, and holds its buffer. This cannot end in a deadlock: buffers are leased in the order
    of the chunks (`engine.turns`), so the piece whose turn it is always has one.

    Parameters
    ----------
    run
        The run that the processes share; see `run_of`.
    stop
        Set to stop the merge; pieces that wait give up.
    check
        Called before an object gets its name; an exception that it raises, because the run has ended, gives it up.
    holds_last
        Whether the shard whose presence marks a finished model ends last; the same process must then commit.
    tell
        Told of waits for the store, in the thread that calls `tell_remarks` or `publish`.
    """

    def __init__(
        self,
        place: Place,
        layout: Layout,
        run: str,
        stop: threading.Event,
        check: Callable[[], None],
        *,
        holds_last: bool = True,
        tell: Callable[[str], None] = lambda line: None,
    ) -> None:
        super().__init__(place, layout, run, direct=False)
        self._stop, self._check, self._tell = stop, check, tell
        self._remarks: SimpleQueue[str] = SimpleQueue()
        self.present: Mapping[str, tuple[int, str]] | None = None
        """Size and ETag of the objects that were there before; None if it is not known."""
        self._last = layout.last if holds_last and not layout.beside else None
        self._run = run
        self._sides = [SideParts(sides_in(layout, number)) for number in range(len(layout.shards))]
        self._draining = threading.RLock()
        self._turn = threading.Condition()
        self._waiting: list[int] = []
        """The shards that have been begun, the current one first."""
        self._at = 0
        self._upload: Upload | None = None
        self._held: Upload | None = None
        """The upload of the shard whose presence marks a finished model: it ends last."""
        self._failure: BaseException | None = None
        self._e_tags: dict[int, str] = {}

    @property
    def holds_last(self) -> bool:
        """Whether the shard that ends last has been uploaded except for its end."""
        return self._held is not None

    def begin(self, number: int) -> None:
        """Take pieces of a shard when those begun before are whole.

        Raises
        ------
        WorldError
            If the store fails.
        """
        with self._turn:
            self._waiting.append(number)
            is_next = len(self._waiting) == 1
        if is_next:
            self._open(number)

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
        if self.take_side(shard, offset, data):
            with self._turn:
                self.bytes_written += data.size
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
            self._drain(shard)
        except BaseException as error:
            self._failure = error
            raise
        finally:
            with self._turn:
                self.bytes_written += data.size
                self._turn.notify_all()

    def early(self) -> Sink:
        """See `Sink`: side parts."""
        return _Early(self)

    def take_side(self, shard: int, offset: int, data: Bytes) -> bool:
        """Keep bytes that belong to a side part, until its place comes; return False if they belong to none."""
        if not self._sides[shard].take(offset, data):
            return False
        self._drain(shard)
        return True

    def sync(self, shards: set[int]) -> None:
        """See `Sink`: a shard is durable when the store has it whole."""

    def end(self, number: int) -> Written:
        """Return what to record of a shard that is whole."""
        shard = self._layout.shards[number]
        return Written(shard.name, shard.nbytes, 0.0, self._e_tags.get(number, ""))

    def look_at(self, number: int, is_sound: Callable[[], bool]) -> Written | None:
        """See `OwnShards`: nothing else writes shards into a store."""
        return None

    def drop(self, number: int) -> None:
        """See `OwnShards`: an object that somebody else has written too has the same bytes."""

    def publish(self, shard: int) -> None:
        """Finish the shard that was held back until all other files are there; all others have their names."""
        if shard == self._last and self._held is not None:
            self._e_tags[shard] = self._held.finish(self.tell_remarks)
            self._held = None

    def upload(self, name: str, nbytes: int, was: str | None = None) -> Upload:
        """Begin the upload of a file of the output; it ends with this merge, and tells of waits as those of shards do."""
        return Upload(str(self._place.path(name)), nbytes, self._stop, self._check, self._remarks.put, was)

    def tell_remarks(self) -> None:
        """Tell the remarks that uploads have made since the last call."""
        with suppress(Empty):
            while True:
                self._tell(self._remarks.get_nowait())

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
        if number == self._last:
            self._held, self._upload = self._upload, None
        else:
            self._e_tags[number] = self._upload.finish()
            self._upload = None
        with self._turn:
            self._waiting.pop(0)
            self._at = 0
            following = self._waiting[:1]
        if following:
            self._open(following[0])

    def _open(self, number: int) -> None:
        shard = self._layout.shards[number]
        name = object_of(self._place, self._layout, self._run, number)
        was = None if self.present is None else self.present.get(name, (0, ""))[1]
        self._upload = self.upload(name, shard.nbytes, was)
        self._upload.write(shard.header)
        with self._turn:
            self._at = len(shard.header)
            self._turn.notify_all()
        if len(shard.header) == shard.nbytes:
            self._advance(shard.nbytes)
        else:
            self._drain(number)

    def _drain(self, shard: int) -> None:
        """Upload the side parts whose place has come."""
        try:
            with self._draining:
                while True:
                    with self._turn:
                        at = self._at if self._waiting[:1] == [shard] else 0
                    side = self._sides[shard].ready(at) if at else None
                    if side is None:
                        return
                    assert self._upload is not None
                    self._upload.write(side)
                    self._advance(at + len(side))
        except BaseException as error:
            self._failure = error
            raise
        finally:
            with self._turn:
                self._turn.notify_all()


class _Early:
    """Takes the side parts of a store's shards, and nothing else; a `Sink`."""

    bytes_written = 0

    def __init__(self, shards: ObjectShards) -> None:
        self._shards = shards

    def write(self, shard: int, offset: int, data: Bytes) -> None:
        """See `Sink`."""
        self._shards.take_side(shard, offset, data)

    def early(self) -> Sink:
        """See `Sink`."""
        return self

    def sync(self, shards: set[int]) -> None:
        """See `Sink`."""
