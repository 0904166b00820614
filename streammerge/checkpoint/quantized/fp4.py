"""MXFP4: FP4 codes, two per byte, with a power-of-two scale for each group of a row.

DeepSeek-V4 stores experts as ``w1.weight`` I8 with ``w1.scale``. Transformers 5 stores fused experts as
``experts.gate_up_proj`` I8 with ``experts.gate_up_proj_scale_inv``. Both are read only if the model declares them,
since I8 alone does not identify the format.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from streammerge.checkpoint.quantized.declarations import Declaration
from streammerge.checkpoint.quantized.registry import Weight, finds
from streammerge.checkpoint.refs.quantized import Encoding, QuantizedRef, Scales
from streammerge.errors import ModelError
from streammerge.formats.parts import contiguous
from streammerge.formats.refs import SourceRef
from streammerge.io.files import bad, quoted

ELEMENT = "F4_E2M1"
GROUP = 32
"""Number of elements of a row that share a scale."""
_EXPONENTS = ("F8_E8M0", "U8")
_DECLARED = ("fp4", "mxfp4")
"""Values of ``expert_dtype`` that mean FP4."""


@finds("fp8")
def find_fp4_experts(tensors: Mapping[str, SourceRef], declaration: Declaration) -> Iterator[Weight]:
    """Yield the experts stored as FP4 codes in I8 or U8 tensors, if the model declares them.

    Raises
    ------
    ModelError
        If a scale does not fit its codes.
    """
    for name, codes in tensors.items():
        if codes.dtype not in ("I8", "U8") or ".experts." not in name or len(codes.shape) < 2:
            continue
        stem = name.removesuffix(".weight")
        places = (f"{stem}.scale", f"{name}_scale_inv", f"{name}_scale")
        scale = next((tensors[place] for place in places if place in tensors), None)
        if scale is None:
            continue
        # Fused experts have no declaration of their own; their E8M0 scales identify them.
        if declaration.expert_dtype not in _DECLARED and scale.dtype != "F8_E8M0":
            continue
        shape = (*codes.shape[:-1], 2 * codes.shape[-1])
        yield Weight(QuantizedRef(name, shape, contiguous(codes), *exponents(codes, shape, scale)))


def exponents(
    codes: SourceRef, shape: tuple[int, ...], scale: SourceRef, *, turned: bool = False
) -> tuple[Scales, Encoding]:
    """Return the scales of FP4 codes, one per `GROUP` of a row, and how they are stored.

    Parameters
    ----------
    shape
        The shape of the unpacked codes, as stored.

    Raises
    ------
    ModelError
        If dtype or shape of the scales does not fit.
    """
    if scale.dtype not in _EXPONENTS:
        raise _refused(codes, scale, f"is {scale.dtype}, where scales of FP4 are {' or '.join(_EXPONENTS)}")
    if shape[-1] % GROUP or scale.shape != (*shape[:-1], shape[-1] // GROUP):
        what = f"has shape {list(scale.shape)}, which does not fit the {list(shape)} of its codes"
        raise _refused(codes, scale, f"{what} by groups of {GROUP}")
    n, rows = (1, shape[0]) if len(shape) == 2 else (shape[0], shape[1])
    found = Scales(contiguous(scale), "F8_E8M0", (n, rows, shape[-1] // GROUP), (1, 1, GROUP))
    title = f"{ELEMENT}, F8_E8M0 scales of 1 x {GROUP}"
    return found, Encoding(title, ELEMENT, turned)


def _refused(codes: SourceRef, scale: SourceRef, what: str) -> ModelError:
    return bad(
        scale.path,
        f"tensor {quoted(codes.name)} is quantised, and its scale {quoted(scale.name)} {what}: "
        "download or convert the model again",
    )
