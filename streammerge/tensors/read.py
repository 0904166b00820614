"""Elements of a tensor as its model has them: as they lie in a file, put in order or together, with an adapter, gathered."""

from __future__ import annotations

import numpy as np

from streammerge.checkpoint.refs.blocks import BlocksRef
from streammerge.checkpoint.refs.float8 import WidenedRef
from streammerge.checkpoint.refs.made import AdaptedRef, PatchedRef, SourceRef, scratch_bytes
from streammerge.dtypes import BITS
from streammerge.formats.safetensors import TensorRef
from streammerge.io.buffer_pool import Bytes
from streammerge.io.reader import Reader
from streammerge.tensors import adapted, blocks, float8, gathered, patched, strided
from streammerge.tensors.made import read_to
from streammerge.tensors.scratch import Scratch

__all__ = [
    "adapted",
    "blocks",
    "float8",
    "gathered",
    "patched",
    "prefetch_source",
    "read_elements",
    "read_source",
    "strided",
]
"""The modules are the kinds whose readers are known once this is imported."""


def read_source(
    reader: Reader, ref: SourceRef, start: int, stop: int, slot: Bytes, scratch: Bytes, *, again: bool = False
) -> int:
    """Read elements `start` to `stop` of a tensor into a slot (see `plan.arena`); return where in it they begin.

    Parameters
    ----------
    scratch
        Room of `scratch_bytes(ref)`.
    again
        The same elements will be read once more.

    Raises
    ------
    WorldError
        If a file ends early or the device fails.
    """
    if isinstance(ref, TensorRef):
        first, last = (element * BITS[ref.dtype] // 8 for element in (start, stop))
        return reader.read_slot(ref.path, ref.offset + first, last - first, slot, again=again)
    read_to(reader, ref, start, stop, slot, Scratch(scratch))
    return 0


def read_elements(reader: Reader, ref: SourceRef, start: int, stop: int) -> Bytes:
    """Return elements `start` to `stop` of a tensor in memory of their own: for a small or sparse look."""
    first, last = (element * BITS[ref.dtype] // 8 for element in (start, stop))
    data = np.empty(last - first, np.uint8)
    read_to(reader, ref, start, stop, data, Scratch(np.empty(scratch_bytes(ref), np.uint8)))
    return data


def prefetch_source(reader: Reader, ref: SourceRef, start: int, stop: int) -> None:
    """Ask the kernel to begin reading what elements `start` to `stop` are made of, where that lies together."""
    while isinstance(ref, AdaptedRef | PatchedRef | WidenedRef):
        ref = ref.source
    if isinstance(ref, BlocksRef):
        for tensor, first, last in blocks.blocks_of(ref, start, stop):
            prefetch_source(reader, tensor, first, last)
    elif isinstance(ref, TensorRef):
        first, last = (element * BITS[ref.dtype] // 8 for element in (start, stop))
        reader.prefetch(ref.path, ref.offset + first, last - first)
