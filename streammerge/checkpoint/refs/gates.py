"""The tensors of a mixture of experts that no model has: gates, biases of zeros, and experts that are changed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field, replace
from typing import TYPE_CHECKING, Literal

from streammerge.config.moe import ExpertSpec
from streammerge.dtypes import itemsize
from streammerge.formats.refs import AlignedRef, MadeRef, SourceRef
from streammerge.numerics.philox import Key
from streammerge.records import dataclass

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

DRAWN_BLOCK = 1 << 14
"""Number of elements that are drawn or changed together."""
_DRAWN_BYTES = 8 * 24 * DRAWN_BLOCK
"""Bytes of the temporaries of a block: up to 24 arrays of 8 bytes per element."""
Distribution = Literal["normal", "uniform", "zero"]


@dataclass(eq=False)
class Gates:
    """The gates of all layers, which are computed before the merge begins."""

    experts: tuple[ExpertSpec, ...]
    """The experts that have a gate, the shared one last."""
    layers: int
    """Number of layers."""
    identity: Mapping[str, str] = field(default_factory=dict)
    """Everything that the values depend on, in addition to the config, the seed and the base model."""
    values: NDArray[np.float32] | None = None
    """[layers, experts, hidden]; None until they are computed."""

    def rows(self, layer: int, first: int, end: int) -> NDArray[np.float32]:
        """Return the gates of some experts of a layer, [experts, hidden]."""
        assert self.values is not None, "the gates are computed before they are read"
        return self.values[layer, first:end]


class InventedRef(MadeRef):
    """A tensor that no file contains. Its source only gives messages a file to name."""

    __slots__ = ()

    @property
    def stored_dtype(self) -> str:
        """See `SourceRef`."""
        return self.dtype

    @property
    def stored_format(self) -> None:
        """See `SourceRef`."""
        return

    @property
    def parts(self) -> tuple[SourceRef, ...]:
        """See `SourceRef`."""
        return ()

    @property
    def file_bytes(self) -> int:
        """See `SourceRef`: nothing is read."""
        return 0


@dataclass(frozen=True, eq=False, slots=True)
class GateRef(InventedRef):
    """The gates of a layer, fp32 [experts, hidden]."""

    source: SourceRef
    name: str
    shape: tuple[int, ...]
    gates: Gates
    layer: int
    first: int
    """Index of its first expert."""

    @property
    def dtype(self) -> str:
        """Always fp32."""
        return "F32"

    def renamed(self, name: str) -> GateRef:
        """See `SourceRef`."""
        return replace(self, name=name)


@dataclass(frozen=True, eq=False, slots=True)
class DrawnRef(InventedRef):
    """A tensor of random numbers that depend only on a key and on the element, in fp32."""

    source: SourceRef
    name: str
    shape: tuple[int, ...]
    distribution: Distribution
    """``normal``: standard normal numbers. ``uniform``: from ``-limit`` to ``limit``. ``zero``: only zeros."""
    key: Key = (0, 0, 0, 0)
    limit: float = 1.0

    @property
    def dtype(self) -> str:
        """Always fp32."""
        return "F32"

    def renamed(self, name: str) -> DrawnRef:
        """See `SourceRef`."""
        return replace(self, name=name)

    @property
    def scratch_bytes(self) -> int:
        """See `Ref`."""
        return _DRAWN_BYTES


@dataclass(frozen=True, eq=False, slots=True)
class ChangedRef(AlignedRef):
    """A weight with normal noise added, then multiplied: ``(w + noise * n) * scale``, each step rounded to its dtype."""

    source: SourceRef
    name: str
    noise: float
    """Standard deviation of the noise."""
    scale: float
    key: Key
    """Key of the random numbers n."""

    @property
    def dtype(self) -> str:
        """The dtype of the arithmetic: fp64 for an fp64 weight, else fp32."""
        return "F64" if self.source.dtype == "F64" else "F32"

    @property
    def scratch_bytes(self) -> int:
        """See `Ref`."""
        return _DRAWN_BYTES + itemsize(self.source.dtype) * DRAWN_BLOCK + self.source.scratch_bytes + 64
