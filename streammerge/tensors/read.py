"""Read elements of a tensor of any kind: stored, strided, assembled, quantised, adapted or gathered."""

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
    difference,
    float8,
    gates,
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
    "difference",
    "float8",
    "gates",
    "gathered",
    "integers",
    "patched",
    "quantized",
    "read_elements",
    "read_source",
    "sharded",
    "strided",
]
"""Importing these modules registers their readers."""


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
    """Read elements `start` to `stop` of a tensor into a slot (see `io.pages`); return the offset at which they begin.

    Parameters
    ----------
    scratch
        Working memory of `ref.scratch_bytes`.
    stages
        Records the time taken.
    again
        Whether the same elements will be read again.

    Raises
    ------
    WorldError
        If a file ends early or the device fails.
    """
    return ref.read_slot(reader, start, stop, slot, Scratch(scratch), stages or Stages(), again=again)


def read_elements(reader: Reader, ref: Ref, start: int, stop: int) -> Bytes:
    """Return elements `start` to `stop` of a tensor in newly allocated memory, for small or sparse reads."""
    first, last = (element * BITS[ref.dtype] // 8 for element in (start, stop))
    data = np.empty(last - first, np.uint8)
    ref.read(reader, start, stop, data, Scratch(np.empty(ref.scratch_bytes, np.uint8)))
    return data
