"""Elements of a tensor as its model has them: as they lie in a file, put in order or together, with an adapter, gathered."""

from __future__ import annotations

import numpy as np

from streammerge.dtypes import BITS
from streammerge.formats.refs import Ref
from streammerge.io.buffer_pool import Bytes
from streammerge.io.reader import Reader
from streammerge.io.scratch import Scratch
from streammerge.tensors import (
    adapted,
    blocks,
    codebooks,
    float8,
    gathered,
    integers,
    patched,
    quantized,
    sharded,
    strided,
)
from streammerge.timing import Stages

__all__ = [
    "adapted",
    "blocks",
    "codebooks",
    "float8",
    "gathered",
    "integers",
    "patched",
    "quantized",
    "read_elements",
    "read_source",
    "sharded",
    "strided",
]
"""The modules register the readers of their kinds when this is imported."""


def read_source(
    reader: Reader,
    ref: Ref,
    start: int,
    stop: int,
    slot: Bytes,
    scratch: Bytes,
    stages: Stages | None = None,
    *,
    again: bool = False,
) -> int:
    """Read elements `start` to `stop` of a tensor into a slot (see `io.pages`); return where in it they begin.

    Parameters
    ----------
    scratch
        Room of `ref.scratch_bytes`.
    stages
        Takes the time.
    again
        The same elements will be read once more.

    Raises
    ------
    WorldError
        If a file ends early or the device fails.
    """
    return ref.read_slot(reader, start, stop, slot, Scratch(scratch), stages or Stages(), again=again)


def read_elements(reader: Reader, ref: Ref, start: int, stop: int) -> Bytes:
    """Return elements `start` to `stop` of a tensor in memory of their own: for a small or sparse look."""
    first, last = (element * BITS[ref.dtype] // 8 for element in (start, stop))
    data = np.empty(last - first, np.uint8)
    ref.read(reader, start, stop, data, Scratch(np.empty(ref.scratch_bytes, np.uint8)))
    return data
