"""Tensors that no file holds as they are read: rows gathered by token, views in another order, weights
with a LoRA adapter applied.

They stand where a `TensorRef` stands, and may be made of one another; `streammerge.tensors.read` reads them all. Nothing
of them is ever written but the merge's own output.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from streammerge.dtypes import itemsize
from streammerge.formats.safetensors import TensorRef
from streammerge.io.files import bad, quoted

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

READ_BLOCK = 1 << 20
"""Elements computed at a time."""
STRIDED_BLOCK = 1 << 20
"""Bytes of a file that are read together, of which some elements are taken."""


class MadeRef:
    """A tensor that is made as it is read: what every kind of them answers.

    A new kind derives from this and registers its reader (`streammerge.tensors.made.reads`); nothing else knows the kinds.
    """

    __slots__ = ()
    if TYPE_CHECKING:

        @property
        def name(self) -> str:
            """As its model calls it."""

        @property
        def shape(self) -> tuple[int, ...]:
            """Of the tensor as a merge sees it."""

        @property
        def dtype(self) -> str:
            """Of the elements once they are made."""

        @property
        def path(self) -> str:
            """For messages: the file of the tensor that it is mainly made of."""

        @property
        def source(self) -> SourceRef:
            """The tensor that it is mainly made of: its dtype is the one that the model is stored in."""

        @property
        def scratch_bytes(self) -> int:
            """Room that reading it takes beside the elements."""

    @property
    def stored_dtype(self) -> str:
        """Of the elements in their file, whatever they are computed in."""
        return stored_dtype(self.source)

    @property
    def n_elements(self) -> int:
        """How many elements the shape has."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Of the elements once they are made."""
        return self.n_elements * itemsize(self.dtype)


SourceRef = TensorRef | MadeRef
"""A model's tensor, as a merge reads it."""


@dataclass(frozen=True, slots=True)
class StridedRef(MadeRef):
    """A view of a storage whose elements do not lie one after the other: transposed, channels last, expanded."""

    source: TensorRef
    """The stretch of its file from its first element to its last, as one row."""
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    """Elements from one index to the next, axis by axis; not negative, 0 where all are the same."""

    @property
    def name(self) -> str:
        """As its model calls it."""
        return self.source.name

    @property
    def dtype(self) -> str:
        """As stored."""
        return self.source.dtype

    @property
    def path(self) -> str:
        """The file of its storage."""
        return self.source.path

    @property
    def scratch_bytes(self) -> int:
        """What reading it takes beside the elements: a block of the file."""
        return STRIDED_BLOCK + 64


def contiguous(ref: SourceRef) -> TensorRef:
    """Return a tensor that a file holds as it is.

    Raises
    ------
    ModelError
        If it does not.
    """
    if isinstance(ref, TensorRef):
        return ref
    what = "is not contiguous" if isinstance(ref, StridedRef) else "lies in no file as it is read"
    raise bad(ref.path, f"tensor {quoted(ref.name)} {what}: save it so, or convert it to safetensors")


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
class AdaptedRef(MadeRef):
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
    def name(self) -> str:
        """As the base model calls it."""
        return self.source.name

    @property
    def shape(self) -> tuple[int, ...]:
        """As stored."""
        return self.source.shape

    @property
    def dtype(self) -> str:
        """Of the elements once they are computed."""
        return "F64" if self.source.dtype == "F64" else "F32"

    @property
    def path(self) -> str:
        """For messages: the file of the weight."""
        return self.source.path

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
        return 2 * factors + block + 8 * rows + (1 << 16) + scratch_bytes(self.source)


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
    def path(self) -> str:
        """For messages: the file of the model's own tensor."""
        return self.source.path

    @property
    def columns(self) -> int:
        """Elements of one row."""
        return row_elements(self.shape)

    @property
    def scratch_bytes(self) -> int:
        """What reading it takes beside the elements: a row, sums of rows in fp64, and blocks of source rows."""
        inner = max(scratch_bytes(ref) for ref in self.tensors if ref is not None)
        return 3 * max(1 << 20, 8 * self.columns) + 16 * self.columns + (1 << 12) + inner


@dataclass(frozen=True, eq=False, slots=True)
class PatchedRef(MadeRef):
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
    def name(self) -> str:
        """As the base model calls it."""
        return self.source.name

    @property
    def shape(self) -> tuple[int, ...]:
        """As stored."""
        return self.source.shape

    @property
    def dtype(self) -> str:
        """The one that both dtypes fit into."""
        dtypes = {self.source.dtype, self.values.dtype}
        return self.source.dtype if len(dtypes) == 1 else "F64" if "F64" in dtypes else "F32"

    @property
    def path(self) -> str:
        """For messages: the file of the embedding."""
        return self.source.path

    @property
    def scratch_bytes(self) -> int:
        """What reading it takes beside the elements: a block of the embedding as it was."""
        return 8 * READ_BLOCK + (1 << 14) + scratch_bytes(self.source)


@dataclass(frozen=True, eq=False, slots=True)
class RenamedRef(MadeRef):
    """A tensor that is read as another one is, under a name of its own: a head that was its embedding."""

    source: SourceRef
    name: str

    @property
    def shape(self) -> tuple[int, ...]:
        """As the other's."""
        return self.source.shape

    @property
    def dtype(self) -> str:
        """As the other's."""
        return self.source.dtype

    @property
    def path(self) -> str:
        """As the other's."""
        return self.source.path

    @property
    def scratch_bytes(self) -> int:
        """As the other's."""
        return scratch_bytes(self.source)


def row_elements(shape: Sequence[int]) -> int:
    """Return the elements of one row: of all axes but the first."""
    return math.prod(shape[1:])


def stored(ref: SourceRef) -> TensorRef:
    """Return the tensor in a file that another is mainly made of; a stored one itself."""
    while not isinstance(ref, TensorRef):
        ref = ref.source
    return ref


def stored_dtype(ref: SourceRef) -> str:
    """Return the dtype that the tensor has in its file, whatever it is computed in."""
    return ref.stored_dtype if isinstance(ref, MadeRef) else ref.dtype


def scratch_bytes(ref: object) -> int:
    """Return what reading a tensor takes beside its elements; nothing for one that lies in a file."""
    return ref.scratch_bytes if isinstance(ref, MadeRef) else 0
