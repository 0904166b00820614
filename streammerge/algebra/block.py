"""Blocks (the same elements of every model, in memory), the arithmetic on them, and the report of a block's merge.

A backend implements `BlockMath`. All backends return the same bits: integers, or fp64 sums of fixed runs of elements in
a fixed order (`streammerge.numerics.ordered_sum.block_sums`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from streammerge.dtypes import itemsize
from streammerge.numerics.philox import RandomKeys
from streammerge.records import dataclass

if TYPE_CHECKING:
    from streammerge.algebra.rules import Rule, TaskVectorMerge
    from streammerge.algebra.scores import Ranked, Selection
    from streammerge.algebra.task_vectors import Cut, TaskVector

Counts = NDArray[np.int64]
Bins = NDArray[np.int32]


@dataclass(frozen=True)
class Operand:
    """The place of one input, or of the output, in a block's buffer."""

    offset: int
    """Offset from the start of the buffer in bytes; a multiple of 8."""
    dtype: str
    """The dtype in safetensors' notation: F64, F32, F16 or BF16."""


@dataclass(frozen=True)
class Block:
    """The same elements of one tensor of every model, as read."""

    buffer: NDArray[np.uint8]
    """The buffer that contains all operands; its length is a multiple of 8 bytes."""
    models: tuple[Operand, ...]
    base: Operand | None
    tensor: str
    """Canonical output name; it keys the random words."""
    start: int
    """Flat row-major index of the first element within the whole tensor."""
    n: int
    """Number of elements."""
    shape: tuple[int, ...]
    """The shape in which a plain formula sees it: (n,), (rows, row length), or the shape of the whole tensor."""
    keys: RandomKeys
    fishers: tuple[Operand, ...] = ()
    """The models' Fisher diagonals for methods that use them; otherwise empty."""

    @property
    def row_length(self) -> int:
        """Number of elements in one row of the shape that a plain formula sees."""
        return self.shape[-1] if self.shape else 1


@dataclass(frozen=True)
class Applied:
    """The report of the merge of one block."""

    not_finite: int
    """Number of output elements that are NaN or infinite, and of negative Fisher values."""
    kept: tuple[int, ...]
    """Number of surviving entries of each model's task vector; empty for methods that remove none."""
    floored: int = 0
    """Number of elements in which a Fisher floor makes up more than half of the weight."""

    def plus(self, other: Applied) -> Applied:
        """Return the report of both blocks; one that has nothing to report is `Applied(0, ())`."""
        kept = tuple(a + b for a, b in zip(self.kept, other.kept, strict=True)) if self.kept else other.kept
        return Applied(self.not_finite + other.not_finite, kept, self.floored + other.floored)


class Call(NamedTuple):
    """A method of `BlockMath` that a statistic calls. It tells a backend which kernels to compile beforehand."""

    method: str
    """The method's name; `words_between` is not a method but a function of the random stream."""
    subject: object = None
    """The vector, score, selection or rule that it is called with, if the kernels depend on it."""


class BlockMath(Protocol):
    """The arithmetic on a loaded block that statistics and the engine use.

    No method keeps state, and only `apply` writes to the buffer. Task vectors are used after their drops and cuts
    ("surviving"), and in sums after their rescaling as well. Non-finite entries count as 0 in sums of task vectors, and
    rank above all others.
    """

    def count_keys(self, subject: Ranked, low: int, high: int, shift: int, bins: Bins) -> tuple[int, int]:
        """Count the fp32 bit patterns (sign bit cleared) of a task vector's magnitudes before its cut, or of scores.

        Patterns p from `low` to `high` are counted in `bins` (int32), at (p - low) >> shift. Returns the number of
        patterns above `high`, and the largest pattern in the block.
        """

    def abs_sums(self, vector: TaskVector) -> NDArray[np.float64]:
        """Return the sums of abs(surviving entry) per 4096 elements, (blocks,), without rescaling."""

    def squares(self, vectors: tuple[TaskVector, ...], selection: Selection | None) -> NDArray[np.float64]:
        """Return the sums of squares of each vector over the selected elements, per 4096, (blocks, vectors).

        Without a `selection`, all elements count.
        """

    def touches(self, vectors: tuple[TaskVector, ...], epsilon: float) -> Counts:
        """Count the elements at which a vector exceeds `epsilon` alone, and together with others, (2, vectors)."""

    def ties(self, subject: Ranked, key: int, size: int) -> Counts:
        """Return the number of elements with pattern `key` per run of `size` elements, (runs,)."""

    def dots(self, vectors: Sequence[TaskVector], length: int) -> NDArray[np.float64]:
        """Return the dot products of all pairs of vectors over every `length` elements, (groups, pairs).

        The vectors are the surviving, rescaled task vectors; without any, the base and the models. The pairs follow the
        upper triangle of a Gram matrix, row by row.
        """

    def add_column_dots(self, vectors: Sequence[TaskVector], sums: NDArray[np.float64]) -> None:
        """Add the dot products of all pairs over the rows of the block to `sums`, (pairs, columns)."""

    def own_squares(self) -> NDArray[np.float64]:
        """Return the sums of squares of the base, if any, and of the models per 4096 elements, (blocks, tensors).

        The sums are over weights, not task vectors.
        """

    def agreements(self, vectors: tuple[TaskVector, ...]) -> Counts:
        """Return the numbers of elements where two or more vectors are not zero: with one sign, and with both, (2,)."""

    def sign_total(self, merge: TaskVectorMerge) -> int:
        """Return the number of elements that elect + minus the number that elect -."""

    def fisher_squares(self, model: int) -> tuple[NDArray[np.float64], int]:
        """Return the sums of squares of a Fisher diagonal per 4096 elements, (blocks,), and the count of invalid values.

        A value is invalid if it is negative, NaN or infinite.
        """

    def apply(self, rule: Rule, out: Operand) -> Applied:
        """Write the merged block to `out`, rounded once to its dtype. `out` may overlay an input at least as wide."""


class Found(NamedTuple):
    """The pattern of a rank among magnitudes."""

    key: int
    """The fp32 pattern, sign bit cleared."""
    ties: int
    """Number of elements with this pattern."""
    needed: int
    """Number of these that belong to the elements up to the rank."""
    highest: int
    """The largest pattern of all."""


@runtime_checkable
class SearchingMath(Protocol):
    """The arithmetic of a block where thresholds are found without leaving the device."""

    def largest(self, vectors: Sequence[TaskVector], ranks: Sequence[int]) -> list[Found]:
        """Return the pattern of each vector's magnitude of a rank (from 1, descending), before its cut, in one wait.

        Elements that are not finite rank above all others.
        """


class ScalingMath(BlockMath, Protocol):
    """The arithmetic of a block by compiled kernels, which sum once for several outputs."""

    def apply_scaled(self, rules: Sequence[Rule], outs: Sequence[Operand]) -> list[Applied]:
        """Do what `apply` does for rules whose `unscaled` is the same; `outs` have one dtype, and overlay nothing."""


class SettlingMath(BlockMath, Protocol):
    """The arithmetic of a block by compiled kernels, which merge while thresholds are counted.

    The elements near a threshold are undecided until it is known (see `streammerge.algebra.brackets`).
    """

    def patterns(self, vector: TaskVector) -> NDArray[np.uint32]:
        """Return the fp32 patterns (sign bit cleared) of a task vector's magnitudes before its cut, (n,)."""

    def mark_undecided(
        self, vector: TaskVector, low: Cut, high: Cut, bins: Bins, marks: NDArray[np.uint8]
    ) -> tuple[int, int]:
        """Write 1 into `marks`, (n,), where the two cuts of a task vector differ; count patterns as `count_keys` does.

        The window is from the lower to the higher threshold, with a bin for each pattern.
        """

    def settle(
        self, trial: TaskVectorMerge, rule: TaskVectorMerge, elements: NDArray[np.int64], out: Operand
    ) -> Applied:
        """Merge elements from anywhere in a tensor: `elements` are their flat indices, (n,); all operands are fp32.

        The report has the survivors that `rule` keeps beyond those of `trial`. The models are overwritten.
        """


def operand_bytes(operand: Operand, n: int) -> int:
    """Return the size of `n` elements of an operand in bytes."""
    return n * itemsize(operand.dtype)
