"""Tensors with one row per token: rows gathered in another order, and rows that an adapter trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from streammerge.formats.refs import READ_BLOCK, ElementwiseRef, MadeRef, SourceRef, TensorRef, row_elements

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True, eq=False, slots=True)
class RowMap:
    """What each row of a vocabulary is made of: the mean of some rows of the models' tensors; of none, zero."""

    starts: NDArray[np.int32]
    """Where the sources of each row begin in the arrays below, and where the last ones end."""
    models: NDArray[np.int16]
    """Place in `GatheredRef.tensors`."""
    rows: NDArray[np.int32]
    padding: int = 0
    """Rows behind these, each the mean of all of them."""

    @property
    def n_rows(self) -> int:
        """All rows, padding included."""
        return len(self.starts) - 1 + self.padding

    @property
    def nbytes(self) -> int:
        """Of the arrays."""
        return self.starts.nbytes + self.models.nbytes + self.rows.nbytes


@dataclass(frozen=True, eq=False, slots=True)
class GatheredRef(MadeRef):
    """A tensor with one row per token, its rows put in the order of another vocabulary."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    tensors: tuple[SourceRef | None, ...]
    """The models' tensors by place in the map; None where a model lends no row."""
    map: RowMap
    source: SourceRef
    """The tensor of the model that it stands for."""

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
        """What reading it takes beside the elements: a row, sums of rows in fp64, and blocks of source rows."""
        inner = max(ref.scratch_bytes for ref in self.tensors if ref is not None)
        return 3 * max(1 << 20, 8 * self.columns) + 16 * self.columns + (1 << 12) + inner


@dataclass(frozen=True, eq=False, slots=True)
class PatchedRef(ElementwiseRef):
    """An embedding in which an adapter trained single tokens: their rows come from the adapter, all others as they were.

    Of the same dtype as the embedding once it is made, or of the wider one that the trained rows have.
    """

    source: SourceRef
    """The embedding, whatever it is made of."""
    rows: NDArray[np.int64]
    """Ascending, each once."""
    places: NDArray[np.int64]
    """The row of `values` for each of them."""
    values: TensorRef

    @property
    def is_patched(self) -> bool:
        """See `SourceRef`."""
        return True

    @property
    def dtype(self) -> str:
        """The one that both dtypes fit into."""
        dtypes = {self.source.dtype, self.values.dtype}
        return self.source.dtype if len(dtypes) == 1 else "F64" if "F64" in dtypes else "F32"

    @property
    def scratch_bytes(self) -> int:
        """What reading it takes beside the elements: a block of the embedding as it was."""
        return 8 * READ_BLOCK + (1 << 14) + self.source.scratch_bytes
