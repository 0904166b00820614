"""Read ranges of elements from a store of Fisher diagonals or Gram matrices, one compressed chunk file at a time.

A chunk file holds the output of the store's codecs: little-endian values in a Blosc frame with a CRC-32C. A chunk is
read, checked and decompressed in buffers of the caller, so that it counts against the memory budget. A whole chunk is
decompressed directly to its target.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator

import numpy as np

from streammerge.dtypes import itemsize
from streammerge.errors import ModelError, printable
from streammerge.formats.refs import Ref
from streammerge.io.buffer_pool import Bytes
from streammerge.io.pages import PAGE, slot_bytes
from streammerge.io.reader import Reader
from streammerge.io.scratch import Scratch
from streammerge.records import dataclass
from streammerge.timing import Stages

MADE_BY = {"Fisher diagonals": "streammerge fisher import", "Gram matrices": "streammerge gram compute"}
"""Kinds of content of stores, with the command that makes such a store."""
_CRC_BYTES = 4
_BLOSC_HEADER = 16
_FRAME = 64
"""Bytes that a compressed chunk may have in addition to its elements."""


@dataclass(frozen=True, slots=True)
class ChunkedRef(Ref):
    """One tensor's array in a store: ranges of elements, each in its own compressed file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: str
    """The array's directory."""
    chunk: tuple[int, ...]
    """Shape of a chunk: ones, then one axis that is cut, then whole axes. Its elements are contiguous in the tensor."""
    square_sum: float
    """Sum of squares of the elements, in fp64."""
    stored_nbytes: int
    """Bytes of all chunk files."""
    kind: str = "Fisher diagonals"
    """The kind of content of the store: a key of `MADE_BY`."""

    @property
    def nbytes(self) -> int:
        """Bytes of the decompressed elements."""
        return self.n_elements * itemsize(self.dtype)

    @property
    def chunk_elements(self) -> int:
        """Number of elements of a whole chunk."""
        return math.prod(self.chunk)

    @property
    def scratch_bytes(self) -> int:
        """Bytes for one compressed and one decompressed chunk."""
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
        """See `Ref`; reading and decompressing are timed separately.

        Raises
        ------
        ModelError
            If a chunk is missing or corrupt.
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
    """Return the axis along which a tensor is cut into chunks: the first on which a chunk is longer than 1."""
    return next((i for i, size in enumerate(chunk) if size != 1), max(0, len(shape) - 1))


def _decode(path: str, stored: Bytes, decoded: Bytes, kind: str = "Fisher diagonals") -> None:
    import google_crc32c
    from numcodecs import blosc

    blosc.use_threads = False  # the workers already run in parallel
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
