"""NVIDIA modelopt: NVFP4 whose second scale multiplies, and FP8 with a scale per tensor or row.

Layouts are those of modelopt's own exporter (modelopt 0.47, ``export/unified_export_hf.py``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from streammerge.checkpoint.quantized.declarations import Declaration
from streammerge.checkpoint.quantized.fp8 import find_fp8
from streammerge.checkpoint.quantized.nvfp4 import nvfp4
from streammerge.checkpoint.quantized.registry import Weight, finds
from streammerge.formats.refs import SourceRef


@finds("modelopt", "modelopt_fp4", "modelopt_mixed")
def find_modelopt(tensors: Mapping[str, SourceRef], declaration: Declaration) -> Iterator[Weight]:
    """Yield the weights in NVFP4 (two codes per byte, two levels of scales) and in FP8.

    Raises
    ------
    ModelError
        If dtypes or shapes do not fit.
    """
    for name, codes in tensors.items():
        scale, whole = tensors.get(f"{name}_scale"), tensors.get(f"{name}_scale_2")
        if codes.dtype == "U8" and scale is not None and whole is not None:
            yield Weight(nvfp4(name, codes, scale, whole, "modelopt NVFP4", divides=False))
    yield from find_fp8(tensors, declaration)
