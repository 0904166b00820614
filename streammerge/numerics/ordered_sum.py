"""Sums in a fixed order of parts that arrive in any order: a part is folded once all parts before it have arrived."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Partials = NDArray[np.float64]
BLOCK = 4096
"""Number of elements in one partial sum."""
Part = tuple[tuple[int | None, int], Partials | None, dict[tuple[int | None, int], tuple[int, Partials]]]
"""The next block to fold, the sums of all blocks before it, and the waiting blocks by tensor and first element."""
_ROWS = 64
"""Number of blocks folded at a time; each fold copies."""


def part_of(tensor: int, start: int, n: int, partials: Partials) -> Part:
    """Return the part of an `OrderedSum` that is one piece: `n` elements of a tensor, from element `start` on."""
    return (tensor, start), None, {(tensor, start): (n, partials)}


class OrderedSum:
    """Sums the columns of partial sums (blocks, columns) one after the other in index order.

    A piece that arrives early waits. As long as pieces are handed out in order, few at a time, only few wait.

    Parameters
    ----------
    tensors
        (ordinal, number of elements) of each tensor, in order; no tensor is empty.
    """

    def __init__(self, tensors: Sequence[tuple[int, int]]) -> None:
        self._ends = dict(tensors)
        self._after = dict(zip(self._ends, [*list(self._ends)[1:], None], strict=True))
        self._next: tuple[int | None, int] = (next(iter(self._ends), None), 0)
        self._early: dict[tuple[int | None, int], tuple[int, Partials]] = {}
        self._totals: Partials | None = None
        self._lock = threading.Lock()

    def add(self, tensor: int, start: int, n: int, partials: Partials) -> None:
        """Add the partial sums (blocks, columns) of elements `start` to `start + n` of a tensor."""
        with self._lock:
            self._early[tensor, start] = n, partials
        self._fold_early()

    def _fold_early(self) -> None:
        """Fold all blocks whose predecessors have all arrived."""
        with self._lock:
            while self._next in self._early:
                size, part = self._early.pop(self._next)
                self._fold(part)
                tensor_now, position = self._next
                assert tensor_now is not None
                position += size
                done = position >= self._ends[tensor_now]
                self._next = (self._after[tensor_now], 0) if done else (tensor_now, position)

    def _fold(self, partials: Partials) -> None:
        for first in range(0, len(partials), _ROWS):
            rows = partials[first : first + _ROWS]
            known = rows if self._totals is None else np.concatenate((self._totals[None], rows))
            self._totals = np.add.accumulate(known)[-1]  # sequential; `sum` chooses its own order

    def part(self) -> Part:
        """Return everything added so far as a picklable value: the folded sums and the waiting blocks."""
        with self._lock:
            return self._next, self._totals, dict(self._early)

    def absorb(self, part: Part) -> None:
        """Add the part of a different instance over the same tensors; no block may occur in both.

        If several instances share the blocks, only the instance with the very first block has folded any.
        """
        following, totals, early = part
        if totals is not None:
            with self._lock:
                assert self._totals is None, "a block was added twice"
                self._next, self._totals = following, totals
        for (tensor, start), (n, partials) in early.items():
            assert tensor is not None
            self.add(tensor, start, n, partials)
        self._fold_early()

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in self.__dict__.items() if name != "_lock"}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    @property
    def totals(self) -> list[float]:
        """The sum of each column, once all pieces of all tensors have arrived."""
        assert self._next[0] is None, "a piece is missing"
        return [] if self._totals is None else [float(total) for total in self._totals]


def in_order(values: NDArray[np.float64]) -> float:
    """Return the sequential sum of values; numpy's `sum` chooses its own order."""
    return float(np.cumsum(values)[-1]) if values.size else 0.0


def block_sums(values: NDArray[np.float64], length: int = BLOCK) -> NDArray[np.float64]:
    """Return the sum of each `length` values in the kernels' order: eight sequential lanes, then pairwise."""
    groups, lines = -(-values.size // length), -(-length // 8)
    padded = np.zeros((groups, length))
    padded.reshape(-1)[: values.size] = values
    blocks = np.zeros((groups, lines, 8))
    blocks.reshape(groups, -1)[:, :length] = padded
    lanes = np.zeros((groups, 8))
    for line in range(lines):  # all groups at once, each in its own order
        lanes += blocks[:, line]
    total: NDArray[np.float64] = ((lanes[:, 0] + lanes[:, 1]) + (lanes[:, 2] + lanes[:, 3])) + (
        (lanes[:, 4] + lanes[:, 5]) + (lanes[:, 6] + lanes[:, 7])
    )
    return total
