"""How tensors that are made as they are read get their elements: one reader for each kind, by its class.

A kind registers its reader beside its mathematics; one that is made of others reads them through `read_to`, whatever they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from streammerge.checkpoint.refs.made import MadeRef, RenamedRef, SourceRef
from streammerge.dtypes import BITS
from streammerge.formats.safetensors import TensorRef
from streammerge.io.buffer_pool import Bytes
from streammerge.io.reader import Reader
from streammerge.tensors.scratch import Scratch

Read = Callable[[Reader, Any, int, int, Bytes, Scratch], None]
"""Makes elements (first, end) of a tensor at the beginning of the bytes, with scratch of its `scratch_bytes`."""
_READERS: dict[type[MadeRef], Read] = {}


def reads(kind: type[MadeRef]) -> Callable[[Read], Read]:
    """Register the reader of a kind of made tensors."""

    def register(read: Read) -> Read:
        _READERS[kind] = read
        return read

    return register


def read_to(reader: Reader, ref: SourceRef, start: int, stop: int, target: Bytes, scratch: Scratch) -> None:
    """Read elements `start` to `stop` of a tensor to the beginning of `target`, through the page cache where they lie in a file.

    Raises
    ------
    WorldError
        If a file ends early or the device fails.
    """
    if isinstance(ref, TensorRef):
        first, last = (element * BITS[ref.dtype] // 8 for element in (start, stop))
        reader.read_into(ref.path, ref.offset + first, target[: last - first])
    else:
        _READERS[type(ref)](reader, ref, start, stop, target, scratch)


@reads(RenamedRef)
def _read_renamed(
    reader: Reader, ref: RenamedRef, start: int, stop: int, target: Bytes, scratch: Scratch
) -> None:
    read_to(reader, ref.source, start, stop, target, scratch)
