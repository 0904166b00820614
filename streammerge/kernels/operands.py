"""The named tuples that kernels take: numba checks their fields, and passes them as structs.

In tables of arguments, ``k`` is the number of models (or vectors) and ``n`` the number of elements of the block. Offsets are
bytes from the start of the buffer; ``first`` and lengths are elements.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from streammerge.kernels import njit

BF16, F16, F32 = 0, 1, 2
CODES = {"BF16": BF16, "F16": F16, "F32": F32}
"""Dtypes that kernels read and write; an fp64 tensor goes through the torch formula."""
NOTHING = -1
"""The code of an output that is not written."""


class Operand(NamedTuple):
    """One input, or the output, inside a block's buffer."""

    half: NDArray[np.uint16]
    """The whole buffer in words of 16 bits, (bytes / 2,)."""
    full: NDArray[np.uint32]
    """The same in words of 32 bits, (bytes / 4,)."""
    offset: int
    """Bytes from the start of the buffer; a multiple of 8."""
    code: int
    """The dtype, see `CODES`."""


class Operands(NamedTuple):
    """One input or several in one buffer.

    A loop over blocks unpacks it first: a field that is looked up there counts references, a tenth of the time.
    """

    half: NDArray[np.uint16]
    """As for `Operand`."""
    full: NDArray[np.uint32]
    offsets: NDArray[np.int64]
    """Bytes from the start of the buffer, (k,)."""
    codes: NDArray[np.int64]
    """The dtypes, (k,)."""


class Span(NamedTuple):
    """The elements of a block."""

    element: int
    """Flat index of the first in the whole tensor; it counts random words."""
    n: int
    """Number of elements."""


class Masks(NamedTuple):
    """The drops and the cuts of some task vectors, k of them."""

    drops: NDArray[np.int64]
    """(k, 2): the word below which an element is dropped; the element before which a word equal to it drops too."""
    drop_keys: NDArray[np.uint32]
    """(k, 4): the Philox keys of the drops' words."""
    cuts: NDArray[np.int64]
    """(k, 6): tie policy (see `deltas`), magnitude pattern, limit; the same of the cut that removes the largest."""
    cut_keys: NDArray[np.uint32]
    """(k, 4): the Philox keys of the words that thin out ties."""


class Mask(NamedTuple):
    """The drop and the cuts of one task vector: a row of each field of `Masks`."""

    drop: NDArray[np.int64]
    drop_key: NDArray[np.uint32]
    cut: NDArray[np.int64]
    cut_key: NDArray[np.uint32]


class Terms(NamedTuple):
    """What is summed: surviving, rescaled task vectors, or the operands as they are."""

    task_vectors: bool
    masks: Masks
    """With `task_vectors`; otherwise that of one vector, unused."""
    rescales: NDArray[np.float64]
    """(k,); with `task_vectors`."""


class RankDrops(NamedTuple):
    """The drops by rank of some task vectors, k of them: with probabilities from `low` to `low + spread`."""

    lows: NDArray[np.float64]
    """(k,)"""
    spreads: NDArray[np.float64]
    """(k,)"""
    unbiased: bool
    """Whether survivors are divided by their probabilities."""
    keys: NDArray[np.uint32]
    """(k, 4): the Philox keys of the drops' words."""


class Combination(NamedTuple):
    """How task vectors become one; see `TaskVectorMerge`."""

    coefficients: NDArray[np.float64]
    """(k,): factor of each entry."""
    weights: NDArray[np.float64]
    """(k,): what a mean of elected entries is divided by."""
    elect: bool
    zero_sign: int
    normalize: bool
    divisor: float
    scale: float


class Certainty(NamedTuple):
    """How Fisher diagonals weigh models; see `FisherMean`."""

    coefficients: NDArray[np.float64]
    """(k,)"""
    floors: NDArray[np.float64]
    """(k,)"""
    add: bool
    """Whether a floor is added, not the least value."""
    average: NDArray[np.float64]
    """(k,) weights where nothing is known; (0,): the first model's value stands there."""


class Window(NamedTuple):
    """A range of bit patterns, counted in bins."""

    low: int
    high: int
    """The last pattern inside."""
    shift: int
    """A bin holds ``1 << shift`` patterns."""


class Tally(NamedTuple):
    """Counts that a merge adds to."""

    kept: NDArray[np.int64]
    """(k,): surviving entries of each model."""
    signs: NDArray[np.int64]
    """(1,): elements that elected + minus elements that elected -."""


@njit(nogil=True)
def width_of(code):
    """Return the bytes of an element."""
    return 4 if code == F32 else 2
