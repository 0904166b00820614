"""FP8 E4M3 with one scale per block, row, group of columns or tensor: DeepSeek's layout and similar ones."""

from __future__ import annotations

from typing import Literal

from streammerge.checkpoint.quantized.declarations import Declaration
from streammerge.checkpoint.refs.quantized import QuantizedRef
from streammerge.io.buffer_pool import Bytes
from streammerge.numerics.encoding import F8_GROUP, Values, scales_of_f8, scales_of_mx, to_f8
from streammerge.records import dataclass
from streammerge.tensors.encoders.base import Named, NotWrittenError, Stored, encodes
from streammerge.tensors.encoders.grid import Gridded

Rule = Literal["448", "powers", "mx"]
"""The rule for a scale: largest magnitude / 448, the least power of two that is not below that, or MXFP8's rule."""


@dataclass(frozen=True, slots=True)
class Fp8(Gridded):
    """Encodes a tensor as FP8 E4M3 codes of the same shape."""

    rule: Rule = "448"

    @property
    def label(self) -> str:
        """See `Encoder`."""
        if self.needs_peak:
            return "FP8 E4M3, one scale"
        return (
            f"{'MXFP8' if self.rule == 'mx' else 'FP8 E4M3'} in blocks of {self.block[0]} x {self.block[1]}"
        )

    @property
    def codes(self) -> Stored:
        """See `Gridded`."""
        return Stored(self.name, "F8_E4M3", self.shape)

    @property
    def row_nbytes(self) -> int:
        """See `Gridded`."""
        return self.columns

    @property
    def kernels(self) -> frozenset[str]:
        """See `Encoder`."""
        return frozenset({F8_GROUP})

    def scales_of(self, peaks: Values) -> Values:
        """See `Gridded`."""
        if self.rule == "mx":
            return scales_of_mx(peaks, 8)
        return scales_of_f8(peaks, self.scales.dtype, powers=self.rule == "powers")

    def write(self, rows: Values, scales: Values, block: tuple[int, int], out: Bytes) -> None:
        """See `Gridded`."""
        to_f8(rows, scales, block, out)


def in_blocks(name: str, shape: tuple[int, ...], block: tuple[int, int]) -> Fp8:
    """Return the encoder for a tensor of whole blocks in DeepSeek's format; F32 scales are named ``NAME_scale_inv``."""
    grid = tuple(side // size for side, size in zip(shape[-2:], block, strict=True))
    return Fp8(name, shape, Stored(f"{name}_scale_inv", "F32", (*shape[:-2], *grid)), block)


@encodes(QuantizedRef, "F8_E4M3")
def _of(ref: QuantizedRef, named: Named, declared: Declaration) -> Fp8:
    """Return the encoder that stores a tensor in the format of `ref`."""
    n, *size = ref.matrices
    matrices, height, width = ref.scales.extent
    whole = ref.scales.shape == (1, 1, 1)
    if not whole and (matrices > 1 or (n > 1 and [height, width] == size)):
        raise NotWrittenError("one scale for each matrix of several")
    tensor = ref.scales.tensor
    rule: Rule = "powers" if declared.settings.get("scale_fmt") == "ue8m0" else "448"
    if ref.scales.dtype == "F8_E8M0":
        rule = "mx" if (height, width) == (1, 32) else "powers"
    scales = Stored(named(tensor.name), tensor.dtype, tensor.shape)
    return Fp8(named(ref.source.name), ref.shape, scales, (height, width), whole, rule)
