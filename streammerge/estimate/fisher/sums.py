"""The sums that a store records for each diagonal, so that merges normalise and apply floors without a pass."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from streammerge.errors import ModelError, printable
from streammerge.numerics.casts import from_bf16
from streammerge.numerics.compiled import is_compiled
from streammerge.numerics.ordered_sum import BLOCK, block_sums, in_order


class DiagonalSums:
    """Sum, sum of squares, largest value and number of zeros of one tensor's diagonal, from runs of its elements.

    The sum of squares has the bits that a merge would compute: it adds blocks of 4096 elements from the tensor's first
    element, however the runs are cut.

    Parameters
    ----------
    dtype
        F32, or BF16 as uint16 patterns.
    """

    def __init__(self, tensor: str, dtype: str) -> None:
        self._tensor = tensor
        self._dtype = dtype
        self._left = np.zeros(0, np.uint16 if dtype == "BF16" else np.float32)
        self._partials: list[NDArray[np.float64]] = []
        self._sum = 0.0
        self._largest = 0.0
        self._zeros = 0
        self._n = 0

    def add(self, values: NDArray[Any]) -> None:
        """Add a run of elements.

        Raises
        ------
        ModelError
            If one is negative or not finite; the message names tensor and element.
        """
        flat = values.reshape(-1)
        whole = np.concatenate([self._left, flat]) if self._left.size else flat
        n = whole.size // BLOCK * BLOCK
        self._take(whole[:n])
        self._left = whole[n:].copy()

    def values(self) -> dict[str, Any]:
        """Return the recorded values, after all runs were added."""
        self._take(self._left)
        partials = np.concatenate(self._partials) if self._partials else np.zeros(0)
        return {
            "sum": self._sum,
            "square_sum": in_order(partials),
            "largest": self._largest,
            "zeros": self._zeros,
        }

    def _take(self, values: NDArray[Any]) -> None:
        if not values.size:
            return
        sums = _by_kernel if is_compiled("diagonals") else _by_numpy
        partials, bad, total, largest, zeros = sums(values, self._dtype)
        if bad:
            raise self._bad(values)
        self._partials.append(partials)
        self._sum += float(total)
        self._largest = max(self._largest, float(largest))
        self._zeros += int(zeros)
        self._n += values.size

    def _bad(self, values: NDArray[Any]) -> ModelError:
        numbers = _as_float32(values, self._dtype)
        place = int(np.flatnonzero(~(numbers >= 0) | np.isinf(numbers))[0])
        return ModelError(
            f"Fisher diagonal of tensor {printable(self._tensor)}: {numbers[place]} at element {self._n + place}: a mean of "
            "squares must be finite and not negative"
        )


_Sums = tuple[NDArray[np.float64], int, float, float, int]
"""(sums of squares per 4096 elements, number of invalid values, sum, largest value, number of zeros)"""


def _by_kernel(values: NDArray[Any], dtype: str) -> _Sums:
    from streammerge.kernels import fisher
    from streammerge.kernels.operands import CODES, Operand

    buffer = np.zeros(-(-values.nbytes // 8) * 8, np.uint8)
    buffer[: values.nbytes] = values.view(np.uint8)
    diagonal = Operand(buffer.view(np.uint16), buffer.view(np.uint32), 0, CODES[dtype])
    partials = np.empty(-(-values.size // BLOCK), np.float64)
    bad = fisher.square_sums(diagonal, values.size, partials)
    return partials, bad, *fisher.sums(diagonal, values.size)


def _by_numpy(values: NDArray[Any], dtype: str) -> _Sums:
    wide = _as_float32(values, dtype).astype(np.float64)
    bad = int((~(wide >= 0) | np.isinf(wide)).sum())
    return block_sums(wide * wide), bad, in_order(wide), float(wide.max()), int((wide == 0).sum())


def _as_float32(values: NDArray[Any], dtype: str) -> NDArray[np.float32]:
    return from_bf16(values) if dtype == "BF16" else values
