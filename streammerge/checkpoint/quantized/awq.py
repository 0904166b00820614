"""AWQ in its GEMM layout: eight outputs per word in a special order; zero points are packed the same way.

The layout is that of AutoAWQ (0.2.9, ``utils/packing_utils.py``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from streammerge.checkpoint.quantized.declarations import Declaration
from streammerge.checkpoint.quantized.gptq import needed
from streammerge.checkpoint.quantized.registry import Weight, finds
from streammerge.checkpoint.quantized.small import misfit
from streammerge.checkpoint.refs.integers import Groups, IntegersRef, Packed
from streammerge.formats.parts import contiguous
from streammerge.formats.refs import SourceRef
from streammerge.io.files import bad, quoted

_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""The nibble of each of a word's columns, counted from the lowest."""
_CODES = ".qweight"


@finds("awq")
def find_awq(tensors: Mapping[str, SourceRef], declaration: Declaration) -> Iterator[Weight]:
    """Yield the weights packed by AWQ.

    Raises
    ------
    ModelError
        If the layout is not GEMM, or tensors do not fit together.
    """
    settings = declaration.settings
    for name, codes in tensors.items():
        if not name.endswith(_CODES):
            continue
        version = (
            settings.get("version") or settings.get("checkpoint_format") or settings.get("format") or "gemm"
        )
        bits = settings.get("bits", settings.get("w_bit", 4))
        if not isinstance(version, str) or version.lower() != "gemm" or bits != 4 or type(bits) is not int:
            what = f"its {declaration.where} says version {quoted(str(version), 40)} and {quoted(str(bits), 20)} bits"
            raise bad(
                codes.path,
                f"{what}, where AWQ is read as gemm of 4 bits: dequantise it with the library that wrote it",
            )
        yield _weight(name.removesuffix(_CODES), tensors, codes)


def _weight(module: str, tensors: Mapping[str, SourceRef], codes: SourceRef) -> Weight:
    zero, scale = (needed(tensors, codes, f"{module}.{end}") for end in ("qzeros", "scales"))
    if codes.dtype != "I32" or len(codes.shape) != 2:
        raise misfit(codes, f"is {codes.dtype} {list(codes.shape)}, where AWQ's codes are I32 matrices")
    inputs, outputs = codes.shape[0], 8 * codes.shape[1]
    if (
        scale.dtype not in ("F16", "BF16", "F32")
        or len(scale.shape) != 2
        or scale.shape[1] != outputs
        or not scale.shape[0]
        or inputs % scale.shape[0]
    ):
        what = (
            f"is {scale.dtype} {list(scale.shape)}, which does not fit the {list(codes.shape)} of its codes"
        )
        raise misfit(scale, what)
    if zero.dtype != "I32" or zero.shape != (scale.shape[0], codes.shape[1]):
        raise misfit(
            zero, f"is {zero.dtype} {list(zero.shape)}, which does not fit scales of {list(scale.shape)}"
        )
    ref = IntegersRef(
        f"{module}.weight",
        (outputs, inputs),
        Packed(contiguous(codes), 4, outputs, order=_ORDER),
        contiguous(scale),
        Groups(inputs // scale.shape[0], 1),
        "AWQ INT4",
        Packed(contiguous(zero), 4, outputs, order=_ORDER),
        transposed=True,
    )
    return Weight(ref)
