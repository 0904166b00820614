"""Reads runs of elements out of a store of Fisher diagonals or Gram matrices, one compressed chunk file after the other.

A chunk lies on disk as the store's codecs left it: little-endian values, a Blosc frame, a CRC-32C. It is read,
checked and decompressed in buffers of the caller, so that it counts against the budget; a whole chunk is
decompressed straight to where it is wanted.
"""

from __future__ import annotations

import numpy as np

from streammerge.dtypes import itemsize
from streammerge.errors import ModelError, printable
from streammerge.formats.zarr_store import MADE_BY, ChunkedRef
from streammerge.io.buffer_pool import Bytes
from streammerge.io.pages import PAGE
from streammerge.io.reader import Reader
from streammerge.timing import Stages

_CRC_BYTES = 4
_BLOSC_HEADER = 16


def read_stored(
    reader: Reader, stages: Stages, ref: ChunkedRef, start: int, stop: int, target: Bytes, scratch: Bytes
) -> None:
    """Fill `target` with elements `start` to `stop` of one tensor of a store.

    `scratch` has room for a chunk as it lies and for one decompressed.

    Raises
    ------
    ModelError
        If a chunk is missing or its bytes are not what was stored.
    WorldError
        If the machine cannot read it.
    """
    width = itemsize(ref.dtype)
    whole = ref.chunk_elements * width
    room = (scratch.size - whole) // PAGE * PAGE
    for path, first, end in ref.chunks(start, stop):
        with stages.time("read"):
            nbytes = reader.read_file(path, scratch[:room])
        inside = start <= first and end <= stop and (end - first) * width == whole
        place = (first - start) * width
        decoded = target[place : place + whole] if inside else scratch[room : room + whole]
        with stages.time("decompress"):
            _decode(path, scratch[:nbytes], decoded, ref.kind)
        if not inside:
            a, b = max(start, first), min(stop, end)
            target[(a - start) * width : (b - start) * width] = decoded[
                (a - first) * width : (b - first) * width
            ]


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
