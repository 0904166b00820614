"""Runs of elements of a store of Fisher diagonals or Gram matrices, one compressed chunk file after the other.

A chunk lies on disk as the store's codecs left it: little-endian values, a Blosc frame, a CRC-32C. It is read,
checked and decompressed in buffers of the caller, so that it counts against the budget; a whole chunk is
decompressed straight to where it is wanted.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from streammerge.dtypes import itemsize
from streammerge.errors import ModelError, printable
from streammerge.formats.refs import Ref
from streammerge.io.buffer_pool import Bytes
from streammerge.io.pages import PAGE, slot_bytes
from streammerge.io.reader import Reader
from streammerge.io.scratch import Scratch
from streammerge.timing import Stages

MADE_BY = {"Fisher diagonals": "streammerge fisher import", "Gram matrices": "streammerge gram compute"}
"""What stores hold, and the command that makes one."""
_CRC_BYTES = 4
_BLOSC_HEADER = 16
_FRAME = 64
"""Bytes that a compressed chunk may have in addition to its elements."""


@dataclass(frozen=True, slots=True)
class ChunkedRef(Ref):
    """Where one tensor's diagonal lies in a store: runs of elements, each a compressed file of its own."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: str
    """The array's directory."""
    chunk: tuple[int, ...]
    """Shape of a chunk: ones, then one axis that is cut, then whole axes. Its elements lie in a row."""
    square_sum: float
    """Sum of squares of the diagonal, in fp64."""
    stored_nbytes: int
    """Of all its chunk files."""
    kind: str = "Fisher diagonals"
    """What its store holds: a key of `MADE_BY`."""

    @property
    def nbytes(self) -> int:
        """Of the elements once they are decompressed."""
        return self.n_elements * itemsize(self.dtype)

    @property
    def chunk_elements(self) -> int:
        """Elements of a whole chunk."""
        return math.prod(self.chunk)

    @property
    def scratch_bytes(self) -> int:
        """Room for a chunk as it lies and for one decompressed."""
        return 2 * slot_bytes(self.chunk_bytes + _FRAME)

    def read_slot(
        self,
        reader: Reader,
        start: int,
        stop: int,
        slot: Bytes,
        scratch: Scratch,
        stages: Stages,
        *,
        again: bool = False,
    ) -> int:
        """See `Ref`; reading and decompressing are timed apart.

        Raises
        ------
        ModelError
            If a chunk is missing or its bytes are not what was stored.
        WorldError
            If the machine cannot read it.
        """
        width = itemsize(self.dtype)
        whole = self.chunk_elements * width
        room = (scratch.room.size - whole) // PAGE * PAGE
        for path, first, end in self.chunks(start, stop):
            with stages.time("read"):
                nbytes = reader.read_file(path, scratch.room[:room])
            inside = start <= first and end <= stop and (end - first) * width == whole
            place = (first - start) * width
            decoded = slot[place : place + whole] if inside else scratch.room[room : room + whole]
            with stages.time("decompress"):
                _decode(path, scratch.room[:nbytes], decoded, self.kind)
            if not inside:
                a, b = max(start, first), min(stop, end)
                part = decoded[(a - first) * width : (b - first) * width]
                slot[(a - start) * width : (b - start) * width] = part
        return 0

    def read(self, reader: Reader, start: int, stop: int, target: Bytes, scratch: Scratch) -> None:
        """See `Ref`."""
        self.read_slot(reader, start, stop, target, scratch, Stages())

    def prefetch(self, reader: Reader, start: int, stop: int) -> None:
        """See `Ref`."""
        for path in self.files(start, stop):
            reader.prefetch_file(path)

    def files(self, start: int, stop: int) -> Iterator[str]:
        """See `Ref`: the chunk files."""
        for path, _, _ in self.chunks(start, stop):
            yield path

    def chunks(self, start: int, stop: int) -> Iterator[tuple[str, int, int]]:
        """Yield the chunks that hold elements `start` to `stop`: (file, first element, end)."""
        axis = cut_axis(self.shape, self.chunk)
        line = math.prod(self.shape[axis:])
        size = min(self.chunk_elements, line)
        per_line = -(-line // size) if line else 0
        while start < stop:
            row, inside = divmod(start, line)
            number = inside // size
            first = row * line + number * size
            end = row * line + min(line, (number + 1) * size)
            yield self._file(row, number if axis < len(self.shape) else 0), first, end
            assert number < per_line
            start = end

    def _file(self, row: int, number: int) -> str:
        """Return the file of a chunk by Zarr's default key encoding: ``c/0/3/0``; a scalar's is ``c``."""
        axis = cut_axis(self.shape, self.chunk)
        place = []
        for size in reversed(self.shape[:axis]):
            row, index = divmod(row, size)
            place.append(index)
        keys = [*place[::-1], number, *(0 for _ in self.shape[axis + 1 :])] if self.shape else []
        return os.path.join(self.path, "c", *map(str, keys))


def cut_axis(shape: tuple[int, ...], chunk: tuple[int, ...]) -> int:
    """Return the axis along which a tensor is cut into chunks: the first that a chunk has more than one of."""
    return next((i for i, size in enumerate(chunk) if size != 1), max(0, len(shape) - 1))


def _decode(path: str, stored: Bytes, decoded: Bytes, kind: str = "Fisher diagonals") -> None:
    import google_crc32c
    from numcodecs import blosc

    blosc.use_threads = False  # the workers are the threads
    frame = stored[:-_CRC_BYTES]
    frame.flags.writeable = False
    sound = frame.size > _BLOSC_HEADER and google_crc32c.value(frame) == int.from_bytes(
        stored[-_CRC_BYTES:].tobytes(), "little"
    )
    if sound:
        # Blosc's own header: bytes decompressed, block size, bytes compressed.
        nbytes, _, frame_nbytes = np.frombuffer(frame[4:_BLOSC_HEADER], "<u4").tolist()
        sound = (nbytes, frame_nbytes) == (decoded.size, frame.size)
    if not sound:
        raise _damaged(path, kind, "its checksum is wrong")
    try:
        blosc.decompress(frame, decoded)
    except RuntimeError:
        raise _damaged(path, kind, "it does not decompress") from None


def _damaged(path: str, kind: str, how: str) -> ModelError:
    return ModelError(
        f"{printable(path)}: a chunk of a store of {kind} is damaged ({how}); make the store again with "
        f"`{MADE_BY[kind]}`"
    )
