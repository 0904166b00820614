"""The arguments of kernels for a block: operands, masks and keys, as named tuples of `streammerge.kernels.operands`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streammerge.algebra.block import Block, Counts, Operand
from streammerge.algebra.scores import Importance
from streammerge.algebra.task_vectors import RankDrop, TaskVector
from streammerge.kernels import operands
from streammerge.numerics.ready import Loops

_NO_CUT = (-1, 0, 0)
TIES = {"drop": 0, "all": 1, "thin": 2, "index": 3}
"""The tie policies, numbered as in `streammerge.kernels.deltas`."""


@cache
def kernels() -> Any:
    """Return the kernels' modules as attributes; their loops are called without numba if they can be."""
    names = (
        "blocks",
        "competition",
        "deltas",
        "fisher",
        "gram",
        "magnitudes",
        "merge",
        "ranks",
        "scores",
        "signs",
        "undecided",
        "votes",
    )
    return SimpleNamespace(operands=operands, **{name: Loops(f"kernels.{name}") for name in names})


class BlockMemory:
    """The arguments of kernels for a block, and its tiles.

    Parameters
    ----------
    block
        The same elements of every model.
    """

    def __init__(self, block: Block) -> None:
        self.block = block
        self.divergences: dict[Importance, NDArray[np.float64]] = {}
        """Values per row of the block, (rows,), computed so far, by score."""
        self._tuples = kernels().operands
        self._half, self._full = block.buffer.view(np.uint16), block.buffer.view(np.uint32)

    # --- operands

    def operand(self, one: Operand | None, *, written: bool = True) -> Any:
        """Return an input or the output; for None an arbitrary operand, for kernels that do not read it.

        Parameters
        ----------
        written
            False for an output that is not written, since only the counts are used.
        """
        offset, dtype = (0, "F32") if one is None else (one.offset, one.dtype)
        code = self._tuples.CODES[dtype] if written else self._tuples.NOTHING
        return self._tuples.Operand(self._half, self._full, offset, code)

    def operands(self, several: Sequence[Operand]) -> Any:
        """Return several inputs as one argument."""
        offsets = np.array([one.offset for one in several], np.int64)
        codes = np.array([self._tuples.CODES[one.dtype] for one in several], np.int64)
        return self._tuples.Operands(self._half, self._full, offsets, codes)

    def pair(self, vector: TaskVector) -> tuple[Any, Any]:
        """Return a task vector's model, as the only operand, and the base."""
        assert self.block.base is not None
        return self.operands([self.block.models[vector.model]]), self.operand(self.block.base)

    def span(self, first: int = 0, n: int | None = None) -> Any:
        """Return the span of `n` elements of the block from element `first`; default: all."""
        return self._tuples.Span(self.block.start + first, self.block.n if n is None else n)

    # --- drops, cuts and terms

    def masks(self, vectors: Sequence[TaskVector], *, cut: bool = True) -> Any:
        """Return the drops and cuts of task vectors; with ``cut=False`` the drops only."""
        return self._tuples.Masks(
            np.array([(v.drop, v.drop_end) for v in vectors], np.int64),
            self._keys("dare", vectors, [bool(v.drop or v.drop_end) for v in vectors]),
            np.array([self._cuts(v) if cut else 2 * _NO_CUT for v in vectors], np.int64),
            self._keys(
                "ties", vectors, [cut and v.cut is not None and v.cut.ties == "thin" for v in vectors]
            ),
        )

    @staticmethod
    def _cuts(vector: TaskVector) -> tuple[int, ...]:
        """Return (tie policy, magnitude pattern, limit) of the cut, and the same of the outliers' cut."""
        both = [
            (TIES[one.ties], one.key, one.limit) if one else _NO_CUT for one in (vector.cut, vector.outliers)
        ]
        return both[0] + both[1]

    def _keys(self, purpose: str, vectors: Sequence[TaskVector], used: Sequence[bool]) -> NDArray[np.uint32]:
        """Return the Philox keys of task vectors' random words, (vectors, 4); 0 if a vector uses none."""
        block = self.block
        return np.array(
            [
                block.keys.key(purpose, v.stream, block.tensor) if drawn else (0, 0, 0, 0)
                for v, drawn in zip(vectors, used, strict=True)
            ],
            np.uint32,
        )

    def terms(self, vectors: Sequence[TaskVector]) -> Any:
        """Return terms of surviving, rescaled task vectors; without task vectors, of the operands themselves."""
        rescales = np.array([v.rescale for v in vectors] or [1.0], np.float64)
        return self._tuples.Terms(bool(vectors), self.masks(vectors or (TaskVector(0),)), rescales)

    def vectors(self, vectors: Sequence[TaskVector]) -> tuple[Any, int]:
        """Return the models of the task vectors, and their number; without any, the base (if any) and the models."""
        block = self.block
        base = () if block.base is None else (block.base,)
        several = [block.models[v.model] for v in vectors] or [*base, *block.models]
        return self.operands(several), len(several)

    def rank_drops(self, vectors: Sequence[TaskVector], *, divided: bool = True) -> Any:
        """Return the drops by rank of task vectors; a vector without one keeps everything.

        Parameters
        ----------
        divided
            False: survivors are never divided by their probabilities.
        """
        drops = [v.rank_drop or RankDrop(1.0, 0.0) for v in vectors]
        return self._tuples.RankDrops(
            np.array([d.low for d in drops], np.float64),
            np.array([d.spread for d in drops], np.float64),
            divided and any(d.unbiased for d in drops),
            self._keys("della", vectors, [True] * len(vectors)),
        )

    # --- tiles

    def widened(self, operand: Operand, first: int, n: int) -> NDArray[np.float32]:
        """Return `n` elements of an input from element `first`, in fp32."""
        values = np.empty(n, np.float32)
        kernels().blocks.widen(self.operand(operand), first, n, values)
        return values

    def survivors(
        self,
        vectors: Sequence[TaskVector],
        first: int,
        base: NDArray[np.float32],
        deltas: NDArray[np.float32],
    ) -> Counts:
        """Write the base, (n,), and every surviving task vector, (vectors, n), from element `first`.

        Returns the number of surviving entries of each, (vectors,).
        """
        assert self.block.base is not None
        kept = np.zeros(len(vectors), np.int64)
        models = self.operands([self.block.models[v.model] for v in vectors])
        span = self.span(first, base.size)
        kernels().deltas.survivors(
            models, self.operand(self.block.base), first, span, self.masks(vectors), base, deltas, kept
        )
        return kept

    def write(self, values: NDArray[np.float64], out: Operand, first: int) -> int:
        """Round `values` into the output from element `first`; return the number of non-finite results."""
        return int(kernels().blocks.round_out(values, values.size, self.operand(out), first))
