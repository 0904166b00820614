"""bitsandbytes: NF4 and FP4 in blocks of elements, and the integers of LLM.int8.

Layouts are those of bitsandbytes 0.50. The first of two 4-bit elements is in the high nibble. A nested maximum is
computed in fp32, as in the library. An integer of LLM.int8 counts 127ths of its row's largest magnitude.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from streammerge.checkpoint.quantized.declarations import Declaration
from streammerge.checkpoint.quantized.gptq import needed
from streammerge.checkpoint.quantized.registry import Weight, finds
from streammerge.checkpoint.quantized.small import misfit, small_bytes, whole_numbers
from streammerge.checkpoint.refs.codebooks import BlocksOf4BitsRef, Nested
from streammerge.checkpoint.refs.integers import Groups, IntegersRef, Packed
from streammerge.formats.parts import contiguous
from streammerge.formats.refs import SourceRef, TensorRef
from streammerge.io.strict_json import parse_object

_STATE = ".quant_state.bitsandbytes__"
_KINDS = ("nf4", "fp4")
_STORAGE = frozenset({"U8", "I8", "BF16", "F16", "F32"})
"""Dtypes that codes are stored as: bytes, or floats whose bytes are codes, as sharded training needs them."""


@finds("bitsandbytes", None)
def find_bitsandbytes(tensors: Mapping[str, SourceRef], declaration: Declaration) -> Iterator[Weight]:
    """Yield the 4-bit and 8-bit weights of bitsandbytes.

    Raises
    ------
    ModelError
        If tensors do not fit together.
    """
    for name, state in tensors.items():
        head, found, kind = name.rpartition(_STATE)
        if found and head in tensors and kind in _KINDS:
            yield _in_4_bits(head, tensors, state, kind)
        elif declaration.method is not None and state.dtype == "I8" and name.endswith(".weight"):
            yield _in_8_bits(name, tensors)


def _in_4_bits(name: str, tensors: Mapping[str, SourceRef], state: SourceRef, kind: str) -> Weight:
    codes = contiguous(tensors[name])
    settings = parse_object(small_bytes(state), state.path, f"tensor {state.name!r:.120}", "finite")
    shape, blocksize = settings.get("shape"), settings.get("blocksize")
    if not isinstance(shape, list) or not shape or not all(type(n) is int and n > 0 for n in shape):
        raise misfit(state, "does not tell the shape of its weight")
    n = math.prod(shape)
    if codes.dtype not in _STORAGE or codes.nbytes != -(-n // 2):
        raise misfit(codes, f"is {codes.dtype} of {codes.nbytes} bytes, where {shape} takes {-(-n // 2)}")
    size = _size(state, blocksize)
    absmax, values = (needed(tensors, codes, f"{name}.{end}") for end in ("absmax", "quant_map"))
    _fits(absmax, "U8" if "nested_blocksize" in settings else "F32", -(-n // size))
    _fits(values, "F32", 16)
    nested = _nested(name, tensors, codes, settings, state, -(-n // size))
    ref = BlocksOf4BitsRef(
        name,
        tuple(shape),
        TensorRef(codes.name, "U8", (codes.nbytes,), codes.path, codes.offset, codes.nbytes),
        contiguous(absmax),
        contiguous(values),
        size,
        f"bitsandbytes {kind.upper()}",
        nested,
    )
    return Weight(ref, (state.name,))


def _size(state: SourceRef, value: Any) -> int:
    if type(value) is not int or value < 2 or value & (value - 1) or value > 1 << 16:
        raise misfit(state, f"has blocks of {str(value)[:40]} elements, where a power of two is expected")
    return value


def _nested(
    name: str,
    tensors: Mapping[str, SourceRef],
    codes: SourceRef,
    settings: Mapping[str, Any],
    state: SourceRef,
    n_blocks: int,
) -> Nested | None:
    if "nested_blocksize" not in settings:
        return None
    size, offset = _size(state, settings["nested_blocksize"]), settings.get("nested_offset")
    if type(offset) not in (int, float):
        raise misfit(state, "does not tell the offset of its nested scales")
    absmax, values = (needed(tensors, codes, f"{name}.nested_{end}") for end in ("absmax", "quant_map"))
    _fits(absmax, "F32", -(-n_blocks // size))
    _fits(values, "F32", 256)
    return Nested(contiguous(absmax), contiguous(values), size, float(offset or 0))


def _fits(ref: SourceRef, dtype: str, n: int) -> None:
    if ref.dtype != dtype or ref.n_elements != n:
        raise misfit(ref, f"is {ref.dtype} {list(ref.shape)}, where {n} entries of {dtype} are expected")


def _in_8_bits(name: str, tensors: Mapping[str, SourceRef]) -> Weight:
    codes, module = tensors[name], name.removesuffix(".weight")
    scale = needed(tensors, codes, f"{module}.SCB")
    if len(codes.shape) != 2 or scale.dtype not in ("F32", "F16", "BF16") or scale.shape != codes.shape[:1]:
        what = (
            f"is {scale.dtype} {list(scale.shape)}, which does not fit the {list(codes.shape)} of its codes"
        )
        raise misfit(scale, what)
    layout = tensors.get(f"{module}.weight_format")
    if layout is not None and any(whole_numbers(layout)):
        raise misfit(layout, "is not 0: its codes are not stored by rows", "save the model again on a CPU")
    rows, columns = codes.shape
    ref = IntegersRef(
        name,
        (rows, columns),
        Packed(contiguous(codes), 8, columns, signed=True),
        contiguous(scale),
        Groups(1, columns),
        "bitsandbytes LLM.int8",
        divisor=127,
    )
    return Weight(ref, () if layout is None else (layout.name,))
