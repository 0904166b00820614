"""The change of a weight as the two factors of a LoRA adapter (Hu et al., 2021)."""

from __future__ import annotations

from streammerge.records import dataclass
from streammerge.tensors.encoders.base import Form, Stored

RANK, NORM, RESIDUAL = 0, 1, 2
"""Indices of a module's figures."""
_FIGURES = 3


@dataclass(frozen=True, slots=True)
class LowRank(Form):
    """Stores a matrix as B A, or as (B A)' if its rows are the inputs; the scale between the factors is 1.

    A module whose rank turns out to be lower takes the beginnings of the two tensors only, as (r, inputs) and
    (outputs, r). The figures are the rank, the norm of the change, the norm of what the factors miss, and the singular
    values that are kept; of several experts, those of all together, without singular values.
    """

    name: str
    """The name of the weight."""
    matrix: tuple[int, int]
    """The shape of the weight as a matrix."""
    rank: int
    """The most that is stored."""
    energy: float | None
    """The share of the squared norm that decides on the rank; None: it is `rank`, padded with zeros."""
    dtype: str
    """The dtype of the factors."""
    computed: int
    """Number of singular vectors that are computed."""
    turned: bool = False
    """Whether the rows of the weight are its inputs."""
    experts: int = 1
    """Number of matrices, one after the other in the tensor. The rows of A are then those of one expert after the other,
    the columns of B those of all experts for one singular vector after the other, as PEFT stacks them."""

    @property
    def label(self) -> str:
        """See `Form`."""
        return f"LoRA of rank {self.rank}" if self.energy is None else f"LoRA of rank {self.rank} at most"

    @property
    def inputs(self) -> int:
        """Number of columns of A."""
        return self.matrix[0 if self.turned else 1]

    @property
    def outputs(self) -> int:
        """Number of rows of B."""
        return self.matrix[1 if self.turned else 0]

    @property
    def parts(self) -> tuple[Stored, ...]:
        """See `Form`: A, B and the figures."""
        return (
            Stored(f"{self.name}.A", self.dtype, (self.experts * self.rank, self.inputs)),
            Stored(f"{self.name}.B", self.dtype, (self.outputs, self.experts * self.rank)),
            Stored(f"{self.name}.figures", "F64", (_FIGURES + (self.rank if self.experts == 1 else 0),)),
        )

    @property
    def unit(self) -> int:
        """See `Form`: all of it."""
        return max(1, self.experts * self.matrix[0] * self.matrix[1])

    @property
    def unit_nbytes(self) -> tuple[int, ...]:
        """See `Form`: all parts belong to the whole tensor."""
        return 0, 0, 0

    @property
    def kernels(self) -> frozenset[str]:
        """See `Form`: none."""
        return frozenset()
