"""Weights to which a LoRA adapter is applied as they are read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from streammerge.dtypes import itemsize
from streammerge.formats.refs import READ_BLOCK, ElementwiseRef, SourceRef, TensorRef, row_elements
from streammerge.records import dataclass


@dataclass(frozen=True, slots=True)
class Factor:
    """One matrix of a low-rank change, or one per expert: evenly spaced elements of a stored tensor."""

    tensor: TensorRef
    row_step: int
    """Elements from one row to the next."""
    column_step: int
    """Elements from one column to the next; often one of the two steps is 1."""
    first: int = 0
    """Number of elements before the matrix."""
    block_step: int = 0
    """Elements from the matrix of one expert to that of the next."""


@dataclass(frozen=True, eq=False, slots=True)
class AdaptedRef(ElementwiseRef):
    """A weight with a LoRA adapter: ``W + s L R`` (Hu et al., 2021), or with DoRA its rows scaled to a magnitude.

    The result is fp32, or fp64 if the stored weight is fp64; it is not rounded to the weight's stored dtype.
    """

    source: SourceRef
    """The weight, stored or made."""
    left: Factor
    """[rows of the weight, rank]"""
    right: Factor | None
    """[rank, columns of the weight]; None stands for ones, as for a bias."""
    rank: int
    scale: float
    magnitude: TensorRef | None = None
    """The norm of each output feature in DoRA (Liu et al., 2024); None for LoRA."""
    by_column: bool = False
    """Whether the output features are the columns, as in weights stored as (in, out) and in embeddings."""
    blocks: int = 1
    """Number of experts, each with its own factors; if more than 1, the length of the weight's first axis."""

    @property
    def dtype(self) -> str:
        """The dtype of the computed elements."""
        return "F64" if self.source.dtype == "F64" else "F32"

    @property
    def kernels(self) -> frozenset[str]:
        """See `SourceRef`: the products of the factors."""
        return self.source.kernels | {"adapters"}

    @property
    def shown(self) -> Mapping[str, Any]:
        """See `SourceRef`."""
        return {"adapter_rank": self.rank}

    def delta_from(self, base: SourceRef) -> SourceRef | None:
        """See `SourceRef`: ``s L R`` in fp64, if the weight is the base's."""
        same = type(self.source) is type(base) and (
            self.source is base or _place(self.source) == _place(base)
        )
        return AdapterDelta(self) if same and self.magnitude is None else None

    @property
    def columns(self) -> int:
        """Elements of one row of a matrix that has its own factors."""
        return row_elements(self.shape if self.blocks == 1 else self.shape[1:])

    @property
    def block_rows(self) -> int:
        """Rows of a matrix that has its own factors."""
        return self.n_elements // max(1, self.blocks * self.columns)

    @property
    def scratch_bytes(self) -> int:
        """Bytes that reading takes in addition to the elements: right factor; blocks of left factor, weight, sum."""
        rows = READ_BLOCK // max(1, self.columns) + 1
        factors = self.rank * (self.columns + rows) * itemsize(self.dtype)
        # A factor is read before it is transposed; the weight is read as stored before it is widened.
        block = READ_BLOCK * (16 if self.magnitude is None else 36)
        return 2 * factors + block + 8 * rows + (1 << 16) + self.source.scratch_bytes


@dataclass(frozen=True, eq=False, slots=True)
class AdapterDelta(ElementwiseRef):
    """The difference that a LoRA adapter makes, ``s L R`` in fp64."""

    source: AdaptedRef

    @property
    def dtype(self) -> str:
        """The dtype of the computed elements."""
        return "F64"

    @property
    def kernels(self) -> frozenset[str]:
        """See `SourceRef`: the products of the factors."""
        return frozenset({"adapters"})

    @property
    def is_delta(self) -> bool:
        """See `SourceRef`."""
        return True

    @property
    def file_bytes(self) -> int:
        """See `SourceRef`: the bytes of the factors."""
        factors = (self.source.left, self.source.right)
        return sum(factor.tensor.nbytes for factor in factors if factor is not None)

    @property
    def scratch_bytes(self) -> int:
        """Bytes that reading takes in addition to the elements: both factors, twice since they may be transposed."""
        adapted = self.source
        rows = READ_BLOCK // max(1, adapted.columns) + 1
        return 16 * adapted.rank * (adapted.columns + rows) + READ_BLOCK * 8 + (1 << 16)

    def extents(self, start: int, stop: int) -> Iterator[tuple[TensorRef, int, int]]:
        """See `SourceRef`: the factors are small, and read through the page cache."""
        return iter(())


def _place(ref: SourceRef) -> tuple[str, int, tuple[int, ...]]:
    """Return the place of a tensor's main source in its file, and the tensor's shape."""
    return ref.stored.path, ref.stored.offset, ref.shape
