"""Sums whose order is fixed, of parts that come in any order: of pieces, folded as soon as all before them are there."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Partials = NDArray[np.float64]
BLOCK = 4096
"""Elements of one partial sum."""
Part = tuple[tuple[int | None, int], Partials | None, dict[tuple[int | None, int], tuple[int, Partials]]]
"""The next block to fold, the sums of all before it, and blocks that wait, by tensor and first element."""
_ROWS = 64
"""Blocks folded at a time: a fold is a copy."""


def part_of(tensor: int, start: int, n: int, partials: Partials) -> Part:
    """Return the part of an `OrderedSum` that is one piece: `n` elements of a tensor, from element `start` on."""
    return (tensor, start), None, {(tensor, start): (n, partials)}


class OrderedSum:
    """The sums of the columns of partial sums (blocks, columns), each added one after the other in index order.

    A piece that comes early waits. So long as pieces are handed out in order, few at a time, as few wait.

    Parameters
    ----------
    tensors
        Ordinal and elements of the tensors, in order, whose pieces come; none of them is empty.
    """

    def __init__(self, tensors: Sequence[tuple[int, int]]) -> None:
        self._ends = dict(tensors)
        self._after = dict(zip(self._ends, [*list(self._ends)[1:], None], strict=True))
        self._next: tuple[int | None, int] = (next(iter(self._ends), None), 0)
        self._early: dict[tuple[int | None, int], tuple[int, Partials]] = {}
        self._totals: Partials | None = None
        self._lock = threading.Lock()

    def add(self, tensor: int, start: int, n: int, partials: Partials) -> None:
        """Take the partial sums, (blocks, columns), of `n` elements of a tensor, from element `start` on."""
        with self._lock:
            self._early[tensor, start] = n, partials
        self._fold_early()

    def _fold_early(self) -> None:
        """Fold all blocks that nothing before is missing of."""
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
            self._totals = np.add.accumulate(known)[
                -1
            ]  # one after the other, where `sum` chooses its own order

    def part(self) -> Part:
        """Return all that was added, as a value that pickles: what is folded, and what waits for others."""
        with self._lock:
            return self._next, self._totals, dict(self._early)

    def absorb(self, part: Part) -> None:
        """Add what another instance over the same tensors was given: no block twice.

        Of several that share the blocks only the one with the first of all has folded any.
        """
        following, totals, early = part
        if totals is not None:
            with self._lock:
                assert self._totals is None, "blocks that came twice"
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
        """The sum of each column, when all pieces of all tensors have come."""
        assert self._next[0] is None, "a piece is missing"
        return [] if self._totals is None else [float(total) for total in self._totals]


def in_order(values: NDArray[np.float64]) -> float:
    """Return the sum of values added one after the other, where `sum` chooses its own order."""
    return float(np.cumsum(values)[-1]) if values.size else 0.0


def block_sums(values: NDArray[np.float64], length: int = BLOCK) -> NDArray[np.float64]:
    """Return the sum of each `length` values in the kernels' order: eight lanes, each in sequence, added pairwise."""
    groups, lines = -(-values.size // length), -(-length // 8)
    padded = np.zeros((groups, length))
    padded.reshape(-1)[: values.size] = values
    blocks = np.zeros((groups, lines, 8))
    blocks.reshape(groups, -1)[:, :length] = padded
    lanes = np.zeros((groups, 8))
    for line in range(lines):  # all groups at a time, each in its order
        lanes += blocks[:, line]
    total: NDArray[np.float64] = ((lanes[:, 0] + lanes[:, 1]) + (lanes[:, 2] + lanes[:, 3])) + (
        (lanes[:, 4] + lanes[:, 5]) + (lanes[:, 6] + lanes[:, 7])
    )
    return total
