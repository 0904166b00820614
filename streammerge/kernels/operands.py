"""The named tuples that kernels take: numba checks their fields and passes them as structs.

A kernel unpacks them before its loop over blocks: a field that is looked up there counts references, up to a tenth of the
time. So what it calls for each block takes the fields one by one.

In tables of arguments, ``k`` is the number of models (or vectors) and ``n`` the number of elements of the block. Offsets are
bytes from the start of the buffer; ``first`` and lengths are elements.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

BF16, F16, F32 = 0, 1, 2
CODES = {"BF16": BF16, "F16": F16, "F32": F32}
"""Codes of the dtypes that kernels read and write; torch formulas process fp64 tensors."""
NOTHING = -1
"""The code of an output that is not written."""


class Operand(NamedTuple):
    """One input, or the output, inside a block's buffer."""

    half: NDArray[np.uint16]
    """The whole buffer in words of 16 bits, (bytes / 2,)."""
    full: NDArray[np.uint32]
    """The whole buffer in words of 32 bits, (bytes / 4,)."""
    offset: int
    """Bytes from the start of the buffer; a multiple of 8."""
    code: int
    """Code of the dtype; see `CODES`."""


class Operands(NamedTuple):
    """One or several inputs in one buffer."""

    half: NDArray[np.uint16]
    """As in `Operand`."""
    full: NDArray[np.uint32]
    offsets: NDArray[np.int64]
    """Offsets from the start of the buffer in bytes, (k,)."""
    codes: NDArray[np.int64]
    """Codes of the dtypes, (k,)."""


class Span(NamedTuple):
    """The elements of a block."""

    element: int
    """Flat index of the first element in the whole tensor, which selects the random words."""
    n: int
    """Number of elements."""


class Masks(NamedTuple):
    """The drops and cuts of k task vectors."""

    drops: NDArray[np.int64]
    """(k, 2): elements with a word below the first number are dropped; so are those before the second with an equal word."""
    drop_keys: NDArray[np.uint32]
    """(k, 4): the Philox keys of the drops' words."""
    cuts: NDArray[np.int64]
    """(k, 6): tie policy (see `deltas`), magnitude pattern and limit of the cut; the same of the cut of outliers."""
    cut_keys: NDArray[np.uint32]
    """(k, 4): the Philox keys of the words that thin ties."""


class Terms(NamedTuple):
    """The terms of a sum: surviving, rescaled task vectors, or the operands themselves."""

    task_vectors: bool
    masks: Masks
    """The masks of the task vectors; without task vectors an unused mask of one vector."""
    rescales: NDArray[np.float64]
    """(k,): the factors of the task vectors."""


class RankDrops(NamedTuple):
    """The drops by rank of k task vectors, with probabilities from `low` to `low + spread`."""

    lows: NDArray[np.float64]
    """(k,)"""
    spreads: NDArray[np.float64]
    """(k,)"""
    unbiased: bool
    """Whether survivors are divided by their probabilities."""
    keys: NDArray[np.uint32]
    """(k, 4): the Philox keys of the drops' words."""


class Combination(NamedTuple):
    """The parameters of `TaskVectorMerge`."""

    coefficients: NDArray[np.float64]
    """(k,): factor of each task vector's entries."""
    weights: NDArray[np.float64]
    """(k,): weights whose sum divides the elected entries."""
    elect: bool
    zero_sign: int
    normalize: bool
    divisor: float
    scale: float


class Others(NamedTuple):
    """Further outputs of a merge of task vectors, in the same buffer and of the same dtype as the first."""

    scales: NDArray[np.float64]
    """(k,)"""
    offsets: NDArray[np.int64]
    """(k,): of each output, in bytes."""
    bad: NDArray[np.int64]
    """(k,): the numbers of non-finite results, added to."""


class Certainty(NamedTuple):
    """The parameters of `FisherMean`."""

    coefficients: NDArray[np.float64]
    """(k,)"""
    floors: NDArray[np.float64]
    """(k,)"""
    add: bool
    """Whether a floor is added; otherwise it is the smallest value."""
    average: NDArray[np.float64]
    """(k,): weights of the fallback average; (0,): the first model's value is the fallback."""


class Window(NamedTuple):
    """A range of bit patterns, counted in bins."""

    low: int
    high: int
    """The last pattern inside."""
    shift: int
    """A bin holds ``1 << shift`` patterns."""


class Bounds(NamedTuple):
    """Two cuts of one policy; the cut that will be made lies between them."""

    policy: int
    """What happens to magnitudes equal to the threshold; see `deltas`."""
    low: int
    """Pattern of the lower threshold."""
    low_limit: int
    """The limit of the lower cut: its ties with a smaller word (or index) may be kept."""
    high: int
    """Pattern of the higher threshold; the bins end there."""
    high_limit: int
    """The limit of the higher cut: its ties with a smaller word (or index) are kept."""


class Tally(NamedTuple):
    """Counters that a merge adds to."""

    kept: NDArray[np.int64]
    """(k,): surviving entries of each model."""
    signs: NDArray[np.int64]
    """(1,): number of elements that elected + minus the number that elected -."""
