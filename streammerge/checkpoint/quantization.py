"""Find the tensors of a model that are quantisation codes, and their companions: scales, zero points, maps.

Codes of one model are meaningless with the scales of a different model. Codes are recognised by the model's
declarations (config.json, ``hf_quant_config.json``) and by the names of their companions, whatever their dtype: packed
integers, bytes, FP8.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from streammerge.checkpoint.names import LANGUAGE_PARTS
from streammerge.checkpoint.quantized.declarations import DECLARATIONS
from streammerge.checkpoint.quantized.registry import is_read
from streammerge.records import dataclass

DECLARED_BESIDE = "hf_quant_config.json"
"""The file in which NVIDIA's modelopt declares a quantisation."""
_METHODS = {
    "gptq": "GPTQ",
    "awq": "AWQ",
    "bitsandbytes": "bitsandbytes",
    "fp8": "FP8 with scales",
    "fbgemm_fp8": "FBGEMM FP8",
    "mxfp4": "MXFP4",
    "modelopt": "NVIDIA modelopt",
    "hqq": "HQQ",
    "eetq": "EETQ",
    "quanto": "Quanto",
    "aqlm": "AQLM",
    "torchao": "torchao",
    "vptq": "VPTQ",
    "auto-round": "AutoRound",
    "bitnet": "BitNet",
}
"""Names of the formats, by ``quant_method``."""

_PACKED = (
    (".qweight", ("qzeros", "scales", "g_idx"), "GPTQ or AWQ"),
    (".qweight", ("wscales", "wtscale", "tables"), "Nunchaku or HIGGS"),
    (".q_weight", ("q_scale", "q_scale_max", "q_groups"), "EXL2"),
    (".trellis", ("suh", "svh", "su", "sv"), "EXL3"),
    (".indices", ("centroids.weight", "centroids"), "VPTQ"),
    (".dense_weights", ("second_order_data", "in_perm"), "SpQR"),
    (".sign_mantissa", ("encoded_exponent",), "DFloat11"),
    (".encoded_exponent", ("sign_mantissa",), "DFloat11"),
    (".B", ("s",), "Marlin"),
    (".weight_packed", ("weight_scale", "weight_shape", "weight_global_scale"), "compressed-tensors"),
    ("_blocks", (), "MXFP4"),
    (".blocks", ("scales",), "MXFP4"),
    (".Qidxs", (), "QuIP#"),
    (".W_q", (), "HQQ"),
    (".codes", ("codebooks",), "AQLM"),
    ("._data", ("_scale",), "Quanto or torchao"),
    ("qdata", (), "torchao"),
)
"""Name endings of codes, the companions of which one must exist (if any are listed), and the format."""
_READ = ("GPTQ or AWQ", "compressed-tensors", "MXFP4")
"""Formats in that list that are decoded: of these, codes without companions are incomplete."""
_BEHIND = (
    "_scale",
    "_scale_inv",
    "_scales",
    "_scale_2",
    "_global_scale",
    "_zero_point",
    "_zeros",
    "_shape",
    "_g_idx",
    "_format",
    "_activation_scale",
)
"""Suffixes that turn the name of the codes into that of a companion."""
_BESIDE = (
    "scales",
    "scale",
    "qzeros",
    "g_idx",
    "SCB",
    "weight_scale",
    "weight_scale_inv",
    "weight_scale_2",
    "weight_scales",
    "weight_global_scale",
    "weight_zero_point",
    "weight_shape",
    "weight_g_idx",
    "weight_format",
    "scale_weight",
    "scale_input",
    "qscale_weight",
    "qscale_act",
    "input_scale",
    "input_global_scale",
    "activation_scale",
    "k_scale",
    "v_scale",
    "codebooks",
    "zeros",
    "zero",
    "_scale",
    "absmax",
    "quant_map",
    "wscales",
    "wtscale",
    "q_scale",
    "q_scale_max",
    "q_groups",
    "q_group_map",
    "q_perm",
    "q_invperm",
    "centroids.weight",
    "weight_bias",
    "comfy_quant",
)
"""Names of companions in the same module."""
_WITHIN = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", "quant_state", "_data", "_scale")
"""Names of companions below the name of the codes, after a dot."""
_BYTES = frozenset(
    {"I8", "U8", "F4", "F6_E2M3", "F6_E3M2", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"}
)
_WORDS = frozenset({"I16", "U16", "I32", "U32"})


@dataclass(frozen=True)
class Quantization:
    """The quantised part of a model."""

    format: str
    """The format's name, for messages."""
    codes: frozenset[str]
    """Tensors that are meaningless without their companions."""
    companions: frozenset[str]
    stems: frozenset[str]
    """Names of the weights in a model that is not quantised, without a final ``.weight``."""
    bare: frozenset[str] = frozenset()
    """Codes of a format that is read, but without companions: meaningless without a scale."""

    def covers(self, name: str) -> bool:
        """Return whether a tensor belongs to the quantised part, or has the name of one of its unquantised weights."""
        return name in self.codes or name in self.companions or name.removesuffix(".weight") in self.stems


def quantization_of(
    tensors: Mapping[str, Any], config: Mapping[str, Any], declared_beside: bool = False
) -> Quantization | None:
    """Return the quantised part of a model; None if none of its tensors are codes.

    Parameters
    ----------
    tensors
        The tensors by name; only their dtype, shape and number of elements are used.
    config
        The content of config.json.
    declared_beside
        Whether something other than config.json declares a quantisation: a file next to it, or the scales of other
        FP8 weights.
    """
    declared = next(_declarations(config), {"quant_method": None} if declared_beside else None)
    codes: dict[str, str] = {}
    companions: set[str] = set()
    formats: dict[str, None] = {}
    unread: set[str] = set()
    for name, ref in tensors.items():
        if ref.dtype not in _BYTES | _WORDS or ref.n_elements < 2:
            continue
        packed = _packed(name, tensors)
        found = packed or _beside(name, ref, tensors, declared)
        if found is None:
            continue
        if packed is not None and packed[1] not in _READ:
            unread.add(name)
        stem, kind = found
        codes[name] = stem
        formats.setdefault(kind)
    within = _by_module(tensors) if codes else {}
    bare: set[str] = set()
    for name, stem in codes.items():
        own = set(_companions(name, stem, tensors, within))
        companions |= own
        if not own and name not in unread:
            bare.add(name)
    if not codes:
        return None
    method = None if declared is None else declared.get("quant_method")
    if isinstance(method, str) and not is_read(method.lower()):
        bare.clear()
    kind = next(iter(formats)) if declared is None else _declared_format(declared)
    return Quantization(
        kind,
        frozenset(codes),
        frozenset(companions) - codes.keys(),
        frozenset(codes.values()),
        frozenset(bare),
    )


def _declarations(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    parts = [config, *(config.get(key) for key in LANGUAGE_PARTS)]
    for part in parts:
        for key in DECLARATIONS:
            if isinstance(part, Mapping) and isinstance(part.get(key), Mapping):
                yield part[key]
    if isinstance(config.get("expert_dtype"), str):
        yield {"quant_method": "fp8"}


def _declared_format(declared: Mapping[str, Any]) -> str:
    method, detail = declared.get("quant_method"), declared.get("format")
    name = _METHODS.get(method, method) if isinstance(method, str) else "quantised"
    return f"{name} ({detail})"[:60] if isinstance(detail, str) else str(name)[:60]


def _packed(name: str, tensors: Mapping[str, Any]) -> tuple[str, str] | None:
    """Return stem and format of codes that have a special name."""
    for end, beside, kind in _PACKED:
        if name.endswith(end):
            stem = name.removesuffix(end)
            scaled = f"{stem}_scales" in tensors if end == "_blocks" else not beside
            if scaled or any(f"{stem}.{other}" in tensors for other in beside):
                return stem, kind
    return None


def _beside(
    name: str, ref: Any, tensors: Mapping[str, Any], declared: Mapping[str, Any] | None
) -> tuple[str, str] | None:
    """Return stem and format of codes that have the weight's name, recognised by their companions."""
    stem = name.removesuffix(".weight")
    is_weight = stem != name
    if any(f"{name}{end}" in tensors for end in _BEHIND) or f"{name}.absmax" in tensors:
        kind = "bitsandbytes" if f"{name}.absmax" in tensors else "quantised"
        return stem, f"{kind} {ref.dtype}"
    if is_weight and any(f"{stem}.{other}" in tensors for other in _BESIDE):
        return stem, f"quantised {ref.dtype}"
    matrix = is_weight and len(ref.shape) >= 2
    if matrix and (declared is not None or ref.dtype in ("I8", "U8", "F4")):
        return stem, f"{ref.dtype} without a scale"
    return None


def _by_module(tensors: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return the names below each name: ``x.weight.absmax`` is below ``x.weight``."""
    below: dict[str, list[str]] = {}
    for name in tensors:
        for end in _WITHIN:
            head, found, _ = name.rpartition(f".{end}")
            if found:
                below.setdefault(head, []).append(name)
    return below


def _companions(
    name: str, stem: str, tensors: Mapping[str, Any], below: Mapping[str, list[str]]
) -> Iterator[str]:
    candidates = [
        *(f"{name}{end}" for end in _BEHIND),
        *(f"{stem}{end}" for end in _BEHIND),
        *(f"{stem}.{other}" for other in _BESIDE),
        *below.get(name, ()),
    ]
    yield from (candidate for candidate in candidates if candidate in tensors and candidate != name)
