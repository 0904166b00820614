"""Tensors that no file holds as they are read: rows gathered by token, and weights with a LoRA adapter applied.

They stand where a `TensorRef` stands; `streammerge.engine.sources` reads all three. Nothing of them is ever written
but the merge's own output.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from streammerge.dtypes import itemsize
from streammerge.index.header import TensorRef

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

READ_BLOCK = 1 << 20
"""Elements computed at a time."""


class _Made:
    """What tensors that are made as they are read have in common."""

    __slots__ = ()
    if TYPE_CHECKING:

        @property
        def shape(self) -> tuple[int, ...]: ...

        @property
        def dtype(self) -> str: ...

    @property
    def n_elements(self) -> int:
        """How many elements the shape has."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Of the elements once they are made."""
        return self.n_elements * itemsize(self.dtype)

    @property
    def columns(self) -> int:
        """Elements of one row: of all axes but the first."""
        return row_elements(self.shape)


@dataclass(frozen=True, eq=False, slots=True)
class AdaptedRef(_Made):
    """A weight with a LoRA adapter: ``W + s L R`` (Hu et al., 2021), or with DoRA its rows scaled to a magnitude.

    It is not rounded to the dtype in which the weight is stored: it is fp32, or fp64 where that is.
    """

    weight: TensorRef
    left: TensorRef
    """``lora_B``, of as many rows as the weight; `transposed`: ``lora_A``, of as many columns as that has rows."""
    right: TensorRef | None
    """``lora_A``, or `transposed` ``lora_B``; None: ones, as for a bias."""
    rank: int
    scale: float
    transposed: bool = False
    """The weight is stored as (in, out), as by `Conv1D` and by embeddings."""
    magnitude: TensorRef | None = None
    """Of DoRA (Liu et al., 2024): the norm that each output feature gets."""

    @property
    def name(self) -> str:
        """As the base model calls it."""
        return self.weight.name

    @property
    def shape(self) -> tuple[int, ...]:
        """As stored."""
        return self.weight.shape

    @property
    def dtype(self) -> str:
        """Of the elements once they are computed."""
        return "F64" if self.weight.dtype == "F64" else "F32"

    @property
    def path(self) -> str:
        """For messages: the file of the weight."""
        return self.weight.path

    @property
    def scratch_bytes(self) -> int:
        """What reading it takes beside the elements: the right factor, and blocks of the left, the weight and the sum."""
        rows = READ_BLOCK // max(1, self.columns) + 1
        factors = self.rank * (self.columns + rows) * itemsize(self.dtype)
        # A factor is read before it is transposed; the weight as it is stored, before it is widened.
        block = READ_BLOCK * (16 if self.magnitude is None else 36)
        return 2 * factors + block + 8 * rows + (1 << 16)


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
class GatheredRef(_Made):
    """A tensor with one row per token, its rows put in the order of another vocabulary."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    tensors: tuple[TensorRef | AdaptedRef | None, ...]
    """The models' tensors by place in the map; None where a model lends no row."""
    map: RowMap
    own: TensorRef | AdaptedRef
    """The tensor of the model that it stands for."""

    @property
    def path(self) -> str:
        """For messages: the file of the model's own tensor."""
        return self.own.path

    @property
    def scratch_bytes(self) -> int:
        """What reading it takes beside the elements: a row, sums of rows in fp64, and blocks of source rows."""
        inner = max(scratch_bytes(ref) for ref in self.tensors if ref is not None)
        return 3 * max(1 << 20, 8 * self.columns) + 16 * self.columns + (1 << 12) + inner


SourceRef = TensorRef | AdaptedRef | GatheredRef
"""A model's tensor, as a merge reads it."""


def row_elements(shape: Sequence[int]) -> int:
    """Return the elements of one row: of all axes but the first."""
    return math.prod(shape[1:])


def stored_dtype(ref: SourceRef) -> str:
    """Return the dtype that the tensor has in its file, whatever it is computed in."""
    if isinstance(ref, AdaptedRef):
        return ref.weight.dtype
    return stored_dtype(ref.own) if isinstance(ref, GatheredRef) else ref.dtype


def scratch_bytes(ref: object) -> int:
    """Return what reading a tensor takes beside its elements; nothing for one that lies in a file."""
    return ref.scratch_bytes if isinstance(ref, AdaptedRef | GatheredRef) else 0
