"""Weights with a LoRA adapter, which is applied as they are read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from streammerge.dtypes import itemsize
from streammerge.formats.refs import READ_BLOCK, ElementwiseRef, SourceRef, TensorRef, row_elements


@dataclass(frozen=True, slots=True)
class Factor:
    """One matrix of a low-rank change, or one for each expert: elements of a stored tensor at even distances."""

    tensor: TensorRef
    row_step: int
    """Elements from a row to the next."""
    column_step: int
    """Elements from a column to the next; one of the two steps is often 1."""
    first: int = 0
    """Elements before the matrix."""
    block_step: int = 0
    """Elements from the matrix of an expert to that of the next."""


@dataclass(frozen=True, eq=False, slots=True)
class AdaptedRef(ElementwiseRef):
    """A weight with a LoRA adapter: ``W + s L R`` (Hu et al., 2021), or with DoRA its rows scaled to a magnitude.

    It is not rounded to the dtype in which the weight is stored: it is fp32, or fp64 where that is.
    """

    source: SourceRef
    """The weight, whatever it is made of."""
    left: Factor
    """[rows of the weight, rank]"""
    right: Factor | None
    """[rank, columns of the weight]; None: ones, as for a bias."""
    rank: int
    scale: float
    magnitude: TensorRef | None = None
    """Of DoRA (Liu et al., 2024): the norm that each output feature gets."""
    by_column: bool = False
    """The output features are the columns, as where a weight is stored as (in, out), and of embeddings."""
    blocks: int = 1
    """Experts, each with factors of its own: the weight's first axis where it is more than 1."""

    @property
    def dtype(self) -> str:
        """Of the elements once they are computed."""
        return "F64" if self.source.dtype == "F64" else "F32"

    @property
    def kernels(self) -> frozenset[str]:
        """See `SourceRef`: the products of the factors."""
        return self.source.kernels | {"adapters"}

    @property
    def shown(self) -> Mapping[str, Any]:
        """See `SourceRef`."""
        return {"adapter_rank": self.rank}

    @property
    def columns(self) -> int:
        """Elements of one row of a matrix that has its own factors."""
        return row_elements(self.shape if self.blocks == 1 else self.shape[1:])

    @property
    def block_rows(self) -> int:
        """Rows of that matrix."""
        return self.n_elements // max(1, self.blocks * self.columns)

    @property
    def scratch_bytes(self) -> int:
        """What reading it takes beside the elements: the right factor, and blocks of the left, the weight and the sum."""
        rows = READ_BLOCK // max(1, self.columns) + 1
        factors = self.rank * (self.columns + rows) * itemsize(self.dtype)
        # A factor is read before it is transposed; the weight as it is stored, before it is widened.
        block = READ_BLOCK * (16 if self.magnitude is None else 36)
        return 2 * factors + block + 8 * rows + (1 << 16) + self.source.scratch_bytes
