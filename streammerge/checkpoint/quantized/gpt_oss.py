"""gpt-oss' experts in MXFP4: ``X_blocks`` U8 [experts, rows, groups, 16] with ``X_scales`` U8 [experts, rows, groups].

The unquantised tensor in transformers is ``X`` with rows and columns exchanged: [experts, inputs, outputs]. The rows of
gate and up projection alternate in both. OpenAI's own files use the names ``X.blocks`` and ``X.scales``, and do not
exchange rows and columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from streammerge.checkpoint.quantized.declarations import Declaration
from streammerge.checkpoint.quantized.fp4 import exponents
from streammerge.checkpoint.quantized.registry import Weight, finds
from streammerge.checkpoint.refs.quantized import QuantizedRef
from streammerge.formats.parts import contiguous
from streammerge.formats.refs import SourceRef
from streammerge.io.files import bad, quoted

_ENDS = (("_blocks", "_scales", True), (".blocks", ".scales", False))
"""Name endings of codes and scales, and whether rows and columns are exchanged."""
_BYTES = 16
"""Bytes of one group."""


@finds("mxfp4", None)
def find_mxfp4(tensors: Mapping[str, SourceRef], declaration: Declaration) -> Iterator[Weight]:
    """Yield the experts of gpt-oss.

    Raises
    ------
    ModelError
        If codes and scales do not fit.
    """
    for name, codes in tensors.items():
        for end, of_scale, turned in _ENDS:
            stem = name.removesuffix(end)
            scale = tensors.get(stem + of_scale)
            if stem == name or codes.dtype != "U8" or scale is None:
                continue
            if len(codes.shape) != 4 or codes.shape[-1] != _BYTES:
                raise bad(
                    codes.path,
                    f"tensor {quoted(name)} has shape {list(codes.shape)}, where MXFP4 has [experts, rows, groups, {_BYTES}]: "
                    "download or convert the model again",
                )
            n, rows, groups, width = codes.shape
            stored = n, rows, 2 * width * groups
            scales, encoding = exponents(codes, stored, scale, turned=turned)
            shape = (n, stored[2], rows) if turned else stored
            yield Weight(QuantizedRef(stem, shape, contiguous(codes), scales, encoding))
