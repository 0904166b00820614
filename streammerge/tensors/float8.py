"""Read FP8 tensors and widen them to bf16."""

from __future__ import annotations

import numpy as np

from streammerge.checkpoint.refs.float8 import WIDENED_BLOCK, WidenedRef
from streammerge.formats.readers import reads
from streammerge.io.buffer_pool import Bytes
from streammerge.io.reader import Reader
from streammerge.io.scratch import Scratch
from streammerge.numerics.casts import BYTE, table


@reads(WidenedRef)
def _read_widened(
    reader: Reader, ref: WidenedRef, start: int, stop: int, target: Bytes, scratch: Scratch
) -> None:
    codes = scratch.take((WIDENED_BLOCK,), BYTE)
    out = target[: 2 * (stop - start)].view(np.uint16)
    of = table(ref.source.dtype)
    for first in range(start, stop, WIDENED_BLOCK):
        last = min(stop, first + WIDENED_BLOCK)
        ref.source.read(reader, first, last, codes, scratch.rest())
        np.take(of, codes[: last - first], out=out[first - start : last - start])
