"""Constants of fp32 arithmetic that all backends share, and counts of NaN and infinity."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streammerge.dtypes import itemsize
from streammerge.records import dataclass

LARGEST = 3.4028234663852886e38
"""The largest finite fp32 number."""
UNKNOWN = 0x7FC00000
"""The pattern of a non-finite score, which ranks above all others."""
SMOOTHING = 1e-8
"""Constant added to every probability of a softmax (mergekit's)."""
_STEP = 1 << 18
"""Number of elements checked together."""
_EXPONENT = {
    "F8_E4M3": 0x7F,
    "F8_E5M2": 0x7C,
    "BF16": 0x7F80,
    "F16": 0x7C00,
    "F32": 0x7F800000,
    "F64": 0x7FF0000000000000,
}


@dataclass(frozen=True)
class Tally:
    """The count of elements of some kind, and the index of the first."""

    count: int = 0
    first: int = -1

    def plus(self, mask: NDArray[np.bool_], start: int) -> Tally:
        """Return this tally with the elements of `mask` added; `mask` begins at element `start`."""
        count = int(np.count_nonzero(mask))
        first = start + int(np.argmax(mask)) if self.count == 0 and count else self.first
        return Tally(self.count + count, first)

    def then(self, later: Tally) -> Tally:
        """Return this tally with that of later elements added."""
        return Tally(self.count + later.count, self.first if self.count else later.first)


def tally(raw: NDArray[np.uint8], dtype: str, start: int = 0) -> Tally:
    """Return the tally of NaN and infinite elements; `raw` begins at element `start` of the tensor.

    Other dtypes narrower than 16 bits, and complex ones, are never merged, so they are not checked.
    """
    found = Tally()
    if dtype in _EXPONENT:
        width = itemsize(dtype)
        for first, last in steps(0, raw.size // width):
            found = found.plus(is_bad(raw[first * width : last * width], dtype), start + first)
    return found


def is_bad(raw: NDArray[np.uint8], dtype: str) -> NDArray[np.bool_]:
    """Return which elements are NaN or infinite: those whose exponent is all ones."""
    bits = raw.view(_unsigned(dtype))
    exponent = bits.dtype.type(_EXPONENT[dtype])
    return (bits & exponent) == exponent


def is_negative(raw: NDArray[np.uint8], dtype: str) -> NDArray[np.bool_]:
    """Return which elements are negative; negative zero does not count."""
    bits = raw.view(_unsigned(dtype))
    shift = bits.dtype.type(8 * bits.itemsize - 1)
    return (bits >> shift == 1) & (bits << bits.dtype.type(1) != 0)


def _unsigned(dtype: str) -> Any:
    return {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}[itemsize(dtype)]


def steps(start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Cut a range of elements into ranges that are checked together."""
    for first in range(start, stop, _STEP):
        yield first, min(stop, first + _STEP)
