"""Tensors with one row per token: rows gathered in a different order, and rows that an adapter trained."""

from __future__ import annotations

from typing import TYPE_CHECKING

from streammerge.formats.refs import READ_BLOCK, ElementwiseRef, MadeRef, SourceRef, TensorRef, row_elements
from streammerge.records import dataclass

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True, eq=False, slots=True)
class RowMap:
    """The sources of each row of a vocabulary; a row is the mean of its source rows, or zero without any."""

    starts: NDArray[np.int32]
    """The index in the arrays below at which the sources of each row begin, and the end of the last."""
    models: NDArray[np.int16]
    """The index in `GatheredRef.tensors` of each source."""
    rows: NDArray[np.int32]
    padding: int = 0
    """Number of rows after these; each is the mean of all rows before the padding."""

    @property
    def n_rows(self) -> int:
        """Number of rows, including padding."""
        return len(self.starts) - 1 + self.padding

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        return self.starts.nbytes + self.models.nbytes + self.rows.nbytes


@dataclass(frozen=True, eq=False, slots=True)
class GatheredRef(MadeRef):
    """A tensor with one row per token, with its rows in the order of a different vocabulary."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    tensors: tuple[SourceRef | None, ...]
    """The models' tensors, indexed as in `RowMap.models`; None for a model that contributes no row."""
    map: RowMap
    source: SourceRef
    """The tensor that this one replaces."""

    @property
    def parts(self) -> tuple[SourceRef, ...]:
        """See `SourceRef`."""
        return (*(ref for ref in self.tensors if ref is not None), self.source)

    @property
    def is_gathered(self) -> bool:
        """See `SourceRef`."""
        return True

    @property
    def columns(self) -> int:
        """Elements of one row."""
        return row_elements(self.shape)

    @property
    def scratch_bytes(self) -> int:
        """Bytes that reading takes in addition to the elements: a row, row sums in fp64, and blocks of source rows."""
        inner = max(ref.scratch_bytes for ref in self.tensors if ref is not None)
        return 3 * max(1 << 20, 8 * self.columns) + 16 * self.columns + (1 << 12) + inner


@dataclass(frozen=True, eq=False, slots=True)
class PatchedRef(ElementwiseRef):
    """An embedding in which an adapter trained single tokens: their rows come from the adapter, all others stay.

    The dtype is that of the embedding as read, or that of the trained rows if it is wider.
    """

    source: SourceRef
    """The embedding, stored or made."""
    rows: NDArray[np.int64]
    """The trained rows, ascending, each once."""
    places: NDArray[np.int64]
    """The row of `values` for each entry of `rows`."""
    values: TensorRef

    @property
    def is_patched(self) -> bool:
        """See `SourceRef`."""
        return True

    @property
    def dtype(self) -> str:
        """The dtype that holds both the embedding's and the trained rows' values."""
        dtypes = {self.source.dtype, self.values.dtype}
        return self.source.dtype if len(dtypes) == 1 else "F64" if "F64" in dtypes else "F32"

    @property
    def scratch_bytes(self) -> int:
        """Bytes that reading takes in addition to the elements: a block of the unchanged embedding."""
        return 8 * READ_BLOCK + (1 << 14) + self.source.scratch_bytes
