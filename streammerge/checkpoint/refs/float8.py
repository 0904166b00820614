"""Plain FP8 tensors without scales, widened as they are read."""

from __future__ import annotations

from collections.abc import Mapping

from streammerge.checkpoint.quantization import Quantization
from streammerge.dtypes import FLOATS8
from streammerge.formats.refs import ElementwiseRef, SourceRef
from streammerge.records import dataclass

WIDENED = "BF16"
"""The dtype that represents every FP8 number exactly."""
WIDENED_BLOCK = 1 << 20
"""Number of elements that are read and widened together."""


@dataclass(frozen=True, slots=True)
class WidenedRef(ElementwiseRef):
    """A tensor stored in F8_E4M3 or F8_E5M2 and read as bf16, which holds every value of both."""

    source: SourceRef

    @property
    def dtype(self) -> str:
        """The dtype of the widened elements."""
        return WIDENED

    @property
    def scratch_bytes(self) -> int:
        """Bytes that reading takes in addition to the elements: a block of codes."""
        return WIDENED_BLOCK + 64 + self.source.scratch_bytes

    def as_stored(self, dtype: str) -> SourceRef:
        """See `SourceRef`."""
        return self.source if self.source.dtype == dtype else self


def with_floats(tensors: Mapping[str, SourceRef], quantization: Quantization | None) -> dict[str, SourceRef]:
    """Return a model's tensors; plain FP8 tensors are replaced by references that widen them as they are read."""
    codes = frozenset() if quantization is None else quantization.codes | quantization.companions
    return {
        name: WidenedRef(ref) if ref.dtype in FLOATS8 and name not in codes else ref
        for name, ref in tensors.items()
    }
