"""NVFP4 as in compressed-tensors and modelopt: FP4 codes, an FP8 scale per 16 inputs, and a scale per tensor."""

from __future__ import annotations

from streammerge.checkpoint.quantized.small import misfit
from streammerge.checkpoint.refs.codebooks import Nvfp4Ref
from streammerge.formats.parts import contiguous
from streammerge.formats.refs import SourceRef

_GROUP = 16


def nvfp4(
    name: str, codes: SourceRef, scale: SourceRef, whole: SourceRef, title: str, *, divides: bool
) -> Nvfp4Ref:
    """Return an FP4 weight with an FP8 scale per 16 inputs, and a scale for the tensor or per expert.

    Raises
    ------
    ModelError
        If dtypes or shapes do not fit.
    """
    if codes.dtype != "U8" or len(codes.shape) not in (2, 3):
        raise misfit(codes, f"is {codes.dtype} {list(codes.shape)}, where NVFP4 codes are U8 matrices")
    shape = (*codes.shape[:-1], 2 * codes.shape[-1])
    if scale.dtype != "F8_E4M3" or shape[-1] % _GROUP or scale.shape != (*shape[:-1], shape[-1] // _GROUP):
        what = f"is {scale.dtype} {list(scale.shape)}, which does not fit the {list(codes.shape)} of its NVFP4 codes"
        raise misfit(scale, what)
    experts = shape[0] if len(shape) == 3 else 1
    if whole.dtype != "F32" or whole.n_elements not in (1, experts):
        raise misfit(
            whole, f"is {whole.dtype} {list(whole.shape)}, where one F32 scale of the tensor is expected"
        )
    return Nvfp4Ref(
        name, shape, contiguous(codes), contiguous(scale), contiguous(whole), divides, _GROUP, title
    )
