"""The dtypes of the safetensors format: widths, kinds, and the names people use for them."""

from __future__ import annotations

from collections.abc import Iterable

BITS: dict[str, int] = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}
"""Width of one element in bits. The order is that of the format's own enumeration, by which its
writer sorts tensors (descending)."""

RANK = {dtype: rank for rank, dtype in enumerate(BITS)}

FLOATS = frozenset({"F16", "BF16", "F32", "F64"})
"""Dtypes that are merged by arithmetic."""

FLOATS8 = frozenset({"F8_E4M3", "F8_E5M2"})
"""Dtypes that are merged by arithmetic too, widened as they are read and rounded as they are written."""

INTEGERS = frozenset({"BOOL", "U8", "I8", "I16", "U16", "I32", "U32", "I64", "U64"})
"""Dtypes whose tensors must be equal in all models; otherwise the base's are used."""

NAMES = {
    "float16": "F16",
    "bfloat16": "BF16",
    "float32": "F32",
    "float64": "F64",
}
"""Config spellings (an optional ``torch.`` prefix aside) of the dtypes an output may have."""

SHORT_NAMES = {
    "fp16": "float16",
    "f16": "float16",
    "half": "float16",
    "bf16": "bfloat16",
    "fp32": "float32",
    "f32": "float32",
    "float": "float32",
    "fp64": "float64",
    "f64": "float64",
    "double": "float64",
}
"""Other common names, including torch's."""

CONFIG_NAME = {code: name for name, code in NAMES.items()}
"""The same names by code; torch has its dtypes under them."""

NUMPY = {"F16": "<f2", "BF16": "<u2", "F32": "<f4", "F64": "<f8"}
"""What numpy reads the elements of a float dtype as: bf16, which it lacks, as patterns."""


def promoted(floats: Iterable[str]) -> str:
    """Return the dtype of what is computed from tensors of these float dtypes: `torch.promote_types`, the order aside.

    Of two that no rule of torch joins (FP8 of two kinds) it is F32; FP8 beside a wider float is that one.

    >>> promoted(["BF16", "F16"]), promoted(["BF16", "F32"]), promoted(["F8_E4M3", "BF16"]), promoted(["F16", "F16"])
    ('F32', 'F32', 'BF16', 'F16')
    """
    kinds = set(floats)
    widest = {kind for kind in kinds if BITS[kind] == max(BITS[other] for other in kinds)}
    return widest.pop() if len(widest) == 1 else "F32"


def itemsize(dtype: str) -> int:
    """Return the bytes of one element of a byte-wide dtype."""
    bits = BITS[dtype]
    assert bits % 8 == 0, dtype
    return bits // 8
