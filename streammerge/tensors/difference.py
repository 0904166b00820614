"""Read the change of a weight: the difference of two tensors block by block, or the factors of a sum of products."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from streammerge.checkpoint.refs.difference import DifferenceRef, SumOfProductsRef
from streammerge.dtypes import itemsize
from streammerge.formats.readers import reads
from streammerge.io.buffer_pool import Bytes
from streammerge.io.reader import Reader
from streammerge.io.scratch import Scratch
from streammerge.numerics.casts import BYTE, F64, widened
from streammerge.tensors.matrices import read_matrix

_AT_ONCE = 1 << 18
"""Number of elements that are widened together."""


@reads(DifferenceRef)
def read_difference(
    reader: Reader, ref: DifferenceRef, start: int, stop: int, target: Bytes, scratch: Scratch
) -> None:
    """Write elements `start` to `stop` of the difference, in fp64, to the beginning of `target`.

    Raises
    ------
    WorldError
        If a file ends early or the device fails.
    """
    out = target[: 8 * (stop - start)].view(F64)
    step = ref.read_elements
    for first in range(start, stop, step):
        last = min(stop, first + step)
        part = out[first - start : last - start]
        for other, sign in ((ref.source, 1), (ref.base, -1)):
            raw = scratch.rest().take(((last - first) * itemsize(other.dtype),), BYTE)
            other.read(reader, first, last, raw, _behind(scratch, raw))
            _add(raw, other.dtype, part, sign)


def _behind(scratch: Scratch, raw: Bytes) -> Scratch:
    """Return the space that follows the bytes at the beginning of `scratch`."""
    rest = scratch.rest()
    rest.take((raw.size,), BYTE)
    return rest.rest()


def _add(raw: Bytes, dtype: str, out: NDArray[np.float64], sign: int) -> None:
    """Write elements to `out`, or subtract them from it if `sign` is -1."""
    width = itemsize(dtype)
    for first in range(0, out.size, _AT_ONCE):
        part = out[first : first + _AT_ONCE]
        values = widened(raw[first * width : (first + part.size) * width], dtype, F64)
        if sign > 0:
            part[:] = values
        else:
            part -= values


def read_factors(reader: Reader, ref: SumOfProductsRef) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the factors of a sum of products, (rows, r) and (r, columns), in fp64, scaled on the left.

    Raises
    ------
    WorldError
        If a file ends early or the device fails.
    """
    rows, columns = ref.terms[0][1].block_rows, ref.terms[0][1].columns
    left, right = np.empty((rows, ref.rank)), np.ones((ref.rank, columns))
    place = 0
    for coefficient, adapted in ref.terms:
        end = place + adapted.rank
        part = np.empty((rows, adapted.rank))
        read_matrix(reader, adapted.left, 0, 0, part)
        left[:, place:end] = part * (coefficient * adapted.scale)
        if adapted.right is not None:
            other = np.empty((adapted.rank, columns))
            read_matrix(reader, adapted.right, 0, 0, other)
            right[place:end] = other
        place = end
    return left, right
