"""FP8 with a scale per block (DeepSeek), row, group, expert or tensor.

The scale of ``X.weight`` is ``X.weight_scale_inv`` (DeepSeek-V3, Qwen3-FP8; it multiplies, despite the name),
``X.weight_scale`` (FBGEMM, vLLM), or ``X.scale`` if FP8 is declared (DeepSeek-V4). Fused experts such as
``experts.gate_up_proj`` have ``experts.gate_up_proj_scale_inv`` (transformers 5). The file states the dtype of the
scales: F32, BF16, F16 or F8_E8M0.

Files of image models (ComfyUI) have a tensor ``scaled_fp8`` as their mark, and ``X.scale_weight`` next to ``X.weight``;
newer ones ``X.weight_scale`` and a JSON text ``X.comfy_quant``. What only marks a format is not part of the weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from streammerge.checkpoint.quantized.declarations import Declaration
from streammerge.checkpoint.quantized.grids import DEEPSEEK, scales_of
from streammerge.checkpoint.quantized.registry import Weight, finds
from streammerge.checkpoint.refs.quantized import Encoding, QuantizedRef, Scales
from streammerge.dtypes import FLOATS8
from streammerge.formats.parts import contiguous
from streammerge.formats.refs import SourceRef
from streammerge.io.files import bad, quoted

_SUFFIXES = ("_scale_inv", "_scale")
_MARK = "scaled_fp8"
_BESIDE = ("comfy_quant", "scale_input")
"""Names in the module that mark the format, or scale its activations."""


@finds("fp8", "fbgemm_fp8", None)
def find_fp8(tensors: Mapping[str, SourceRef], declaration: Declaration) -> Iterator[Weight]:
    """Yield the tensors of FP8 codes with a scale.

    Raises
    ------
    ModelError
        If a scale does not fit its codes, or a tensor has two.
    """
    encodings: dict[tuple[object, ...], Encoding] = {}
    marks = tuple(name for name in tensors if name.rpartition(".")[2] == _MARK)
    for name, codes in tensors.items():
        if codes.dtype not in FLOATS8:
            continue
        places = [name + end for end in _SUFFIXES]
        if declaration.method is not None and name.endswith(".weight"):
            places.append(f"{name.removesuffix('.weight')}.scale")
        if marks:
            places.append(f"{name.removesuffix('.weight')}.scale_weight")
        found = [tensors[place] for place in places if place in tensors]
        if not found:
            continue
        if len(found) > 1:
            what = " and ".join(quoted(scale.name) for scale in found)
            raise bad(codes.path, f"tensor {quoted(name)} has two scales, {what}: remove the wrong one")
        (scale,) = found
        block = declaration.block()
        if block is None and declaration.method is None and scale.name.endswith(_SUFFIXES[0]):
            block = DEEPSEEK
        is_e8m0 = declaration.settings.get("scale_fmt") == "ue8m0"
        scales = scales_of(codes, codes.shape, scale, block, bytes_are_e8m0=is_e8m0)
        key = codes.dtype, scales.dtype, scales.extent, scales.shape == (1, 1, 1)
        encoding = encodings.setdefault(key, Encoding(title_of(codes.dtype, scales), codes.dtype))
        own = [f"{name.removesuffix('.weight')}.{end}" for end in _BESIDE]
        beside = (*(place for place in own if place in tensors), *marks)
        yield Weight(QuantizedRef(name, codes.shape, contiguous(codes), scales, encoding), beside)


def title_of(element: str, scales: Scales) -> str:
    """Return the title of a format, such as ``F8_E4M3, F32 scales of 128 x 128``."""
    _, rows, columns = scales.extent
    size = "the tensor" if scales.shape == (1, 1, 1) else f"{rows} x {columns}"
    return f"{element}, {scales.dtype} scales of {size}"
