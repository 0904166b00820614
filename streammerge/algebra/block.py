"""A block: the same elements of every model, in memory. What can be asked of it, and what a merge of it reports.

A backend implements `BlockMath`. All backends return the same bits: integers, or fp64 sums of fixed runs of elements,
each in one order (`streammerge.numerics.ordered_sum.block_sums`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from streammerge.dtypes import itemsize
from streammerge.numerics.philox import RandomKeys

if TYPE_CHECKING:
    from streammerge.algebra.rules import Rule, TaskVectorMerge
    from streammerge.algebra.scores import Score, Selection
    from streammerge.algebra.task_vectors import TaskVector

Counts = NDArray[np.int64]
Bins = NDArray[np.int32]


@dataclass(frozen=True)
class Operand:
    """Where one input, or the output, lies inside a block's buffer."""

    offset: int
    """Bytes from the start of the buffer; a multiple of 8."""
    dtype: str
    """As safetensors names it: F64, F32, F16 or BF16."""


@dataclass(frozen=True)
class Block:
    """The same elements of every model of one tensor, as they were read."""

    arena: NDArray[np.uint8]
    """The buffer that all operands lie in; its length is a multiple of 8 bytes."""
    models: tuple[Operand, ...]
    base: Operand | None
    tensor: str
    """Canonical output name; it keys the random words."""
    start: int
    """Flat row-major index of the first element in the whole tensor."""
    n: int
    """Number of elements."""
    shape: tuple[int, ...]
    """Shape that a plain formula sees: (n,), (rows, row length), or that of the whole tensor."""
    keys: RandomKeys
    fishers: tuple[Operand, ...] = ()
    """The models' Fisher diagonals, for methods that weigh by them; otherwise empty."""

    @property
    def row_length(self) -> int:
        """Elements of one row of what a plain formula sees."""
        return self.shape[-1] if self.shape else 1


@dataclass(frozen=True)
class Applied:
    """The report of the merge of one block."""

    not_finite: int
    """Elements of the output that are NaN or infinite, and Fisher diagonals that are negative."""
    kept: tuple[int, ...]
    """Entries of each model's task vector that survived; empty for methods without removal."""
    floored: int = 0
    """Elements in which a Fisher floor makes up more than half of the weight."""


class Call(NamedTuple):
    """A method of `BlockMath` that a statistic calls: a backend knows by it which kernels to compile beforehand."""

    method: str
    """Its name; `words_between`: no method, the random stream alone."""
    subject: object = None
    """The vector, score, selection or rule that it is called with, where kernels differ by that."""


class BlockMath(Protocol):
    """The arithmetic that statistics and the engine ask of a loaded block.

    No method keeps a result, and only `apply` writes to the buffer. Task vectors are taken after their drops and cuts
    ("surviving"), and in sums after their rescaling too. Entries that are not finite count as 0 in sums of task
    vectors, and rank above all others.
    """

    def count_keys(
        self, vector: TaskVector | Score, low: int, high: int, shift: int, bins: Bins
    ) -> tuple[int, int]:
        """Count fp32 bit patterns (sign bit off) of magnitudes of a task vector before its cut, or of scores.

        Adds to `bins` (int32) those in `low` to `high`, pattern p in bin (p - low) >> shift. Returns how many lie above
        `high`, and the largest pattern in the block.
        """

    def abs_sums(self, vector: TaskVector) -> NDArray[np.float64]:
        """Return the sums of abs(surviving entry) per 4096 elements, (blocks,); not rescaled."""

    def squares(self, vectors: tuple[TaskVector, ...], selection: Selection | None) -> NDArray[np.float64]:
        """Return the sums of squares of each vector over the selected elements, per 4096, (blocks, vectors).

        Without a `selection` all elements count.
        """

    def touches(self, vectors: tuple[TaskVector, ...], epsilon: float) -> Counts:
        """Return how many elements each vector alone exceeds `epsilon` at, and how many it and others do, (2, vectors)."""

    def ties(self, vector: TaskVector | Score, key: int, size: int) -> Counts:
        """Return how many elements have the pattern `key`, per run of `size` elements, (runs,)."""

    def dots(self, vectors: Sequence[TaskVector], length: int) -> NDArray[np.float64]:
        """Return the dot products of all pairs of vectors over every `length` elements, (groups, pairs).

        The vectors are the surviving, rescaled task vectors or, where there are none, the base and the models. Pairs
        are those of the upper triangle of a Gram matrix, row by row.
        """

    def add_column_dots(self, vectors: Sequence[TaskVector], sums: NDArray[np.float64]) -> None:
        """Add the dot products of all pairs over the rows of the block to `sums`, (pairs, columns)."""

    def sign_total(self, merge: TaskVectorMerge) -> int:
        """Return elements that elect + minus elements that elect -."""

    def fisher_squares(self, model: int) -> tuple[NDArray[np.float64], int]:
        """Return the sums of squares of a diagonal per 4096 elements, (blocks,), and how many values are no certainty.

        No certainty: negative, NaN or infinite.
        """

    def apply(self, rule: Rule, out: Operand) -> Applied:
        """Write the merged block at `out`, rounded once to its dtype; it may lie over an input of at least its width."""


def operand_bytes(operand: Operand, n: int) -> int:
    """Return the bytes of `n` elements of an operand."""
    return n * itemsize(operand.dtype)
