"""Recipes as tables of 64-bit integers, which kernels read; fp64 numbers are in them as their bits.

The columns are those that `sources/deltas.py`, `fisher.py`, `sums.py`, `counts.py` and `ranks.py` name.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from streammerge.algebra.block import Block, Operand
from streammerge.algebra.task_vectors import Cut, RankDrop, TaskVector

Table = NDArray[np.int64]
CODES = {"BF16": 0, "F16": 1, "F32": 2}
"""Codes of the dtypes that kernels read and write, as in `streammerge.kernels.operands`."""
NOTHING = -1
"""The code of an input that holds zeros, and of an output that is not written."""
_NO_CUT = (-1, 0, 0)
_TIES = {"drop": 0, "all": 1, "thin": 2, "index": 3}
_NO_KEY = (0, 0, 0, 0)


def bits(value: float) -> int:
    """Return the bits of an fp64 number as a signed integer.

    >>> hex(bits(1.0))
    '0x3ff0000000000000'
    """
    found: int = struct.unpack("<q", struct.pack("<d", value))[0]
    return found


def table(rows: Iterable[Iterable[int]]) -> Table:
    """Return rows of integers as a table, (rows, columns)."""
    return np.array([list(row) for row in rows], np.int64)


def weighted_rows(terms: Iterable[tuple[int, str, float]]) -> Table:
    """Return the table of a weighted sum, given the address, dtype and weight of each term."""
    return table(
        _row(address, dtype, (0, 0), _NO_KEY, (_NO_CUT, _NO_CUT), _NO_KEY, (weight, 0.0, 0.0))
        for address, dtype, weight in terms
    )


def vector_rows(
    block: Block, vectors: Sequence[TaskVector], addresses: Sequence[int], *, cut: bool = True
) -> Table:
    """Return the table of task vectors, given the device address of each one's model.

    Parameters
    ----------
    cut
        False: only the drops remove entries.
    """
    return table(
        _row(
            address,
            block.models[v.model].dtype,
            (v.drop, v.drop_end),
            _drop_key(block, v),
            (_cut(v.cut), _cut(v.outliers)) if cut else (_NO_CUT, _NO_CUT),
            _tie_key(block, v) if cut else _NO_KEY,
            (v.coefficient, v.weight, v.rescale),
        )
        for v, address in zip(vectors, addresses, strict=True)
    )


def _row(
    address: int,
    dtype: str,
    drop: tuple[int, int],
    drop_key: Sequence[int],
    cuts: tuple[tuple[int, int, int], tuple[int, int, int]],
    cut_key: Sequence[int],
    factors: tuple[float, float, float],
) -> list[int]:
    plain = [address, CODES[dtype], *drop, *drop_key, *cuts[0], *cuts[1], *cut_key]
    return [int(value) for value in plain] + [bits(factor) for factor in factors]


def _cut(cut: Cut | None) -> tuple[int, int, int]:
    return _NO_CUT if cut is None else (_TIES[cut.ties], cut.key, cut.limit)


def _drop_key(block: Block, vector: TaskVector) -> Sequence[int]:
    """Return the Philox key of a vector's drop, at random or by rank; zeros if it has none."""
    if vector.rank_drop is not None:
        return block.keys.key("della", vector.stream, block.tensor)
    return block.keys.key("dare", vector.stream, block.tensor) if vector.drop or vector.drop_end else _NO_KEY


def _tie_key(block: Block, vector: TaskVector) -> Sequence[int]:
    thin = vector.cut is not None and vector.cut.ties == "thin"
    return block.keys.key("ties", vector.stream, block.tensor) if thin else _NO_KEY


def rank_rows(drops: Sequence[RankDrop | None], *, divided: bool) -> Table:
    """Return the table of drops by rank; a vector without one keeps everything.

    Parameters
    ----------
    divided
        False: survivors are never divided by their probabilities.
    """
    known = [drop or RankDrop(1.0, 0.0) for drop in drops]
    unbiased = divided and any(drop.unbiased for drop in known)
    return table((bits(drop.low), bits(drop.spread), int(unbiased)) for drop in known)


def certainty_rows(
    fishers: Iterable[tuple[int, Operand]],
    coefficients: Sequence[float],
    floors: Sequence[float],
    average: Sequence[float],
) -> Table:
    """Return the table of Fisher diagonals, given the device address of each."""
    shares = average or [0.0] * len(coefficients)
    return table(
        (address, CODES[one.dtype], bits(factor), bits(floor), bits(share))
        for (address, one), factor, floor, share in zip(fishers, coefficients, floors, shares, strict=True)
    )


def pair_rows(rows: Sequence[int], factors: Sequence[float], *, squares: bool = False) -> Table:
    """Return the table of all pairs of rows (addresses), as the upper triangle of a Gram matrix; or of their squares."""
    pairs = ((i, j) for i in range(len(rows)) for j in range(i, i + 1 if squares else len(rows)))
    return table((rows[i], bits(factors[i]), rows[j], bits(factors[j])) for i, j in pairs)


def search_rows(ranks: Sequence[int]) -> Table:
    """Return the table of searches for the pattern of a rank, from 1, in descending order."""
    return table((0, rank, 0, 0) for rank in ranks)
