"""GPTQ: integers packed along the inputs, zero points packed along the outputs, and a listed group for each input.

Layouts are those of GPTQModel (7.7) and AutoGPTQ. Format ``gptq`` stores zero points minus 1, ``gptq_v2`` stores them
unchanged.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from streammerge.checkpoint.quantized.declarations import Declaration
from streammerge.checkpoint.quantized.registry import Weight, finds
from streammerge.checkpoint.quantized.small import misfit
from streammerge.checkpoint.refs.integers import Groups, IntegersRef, Packed
from streammerge.formats.parts import contiguous
from streammerge.formats.refs import SourceRef
from streammerge.io.files import bad, quoted

_BITS = (2, 3, 4, 8)
_STORED_LESS = {"gptq": 1, "gptq_v2": 0}
"""The number subtracted from a zero point before it is stored, by format."""
_CODES = ".qweight"


@finds("gptq")
def find_gptq(tensors: Mapping[str, SourceRef], declaration: Declaration) -> Iterator[Weight]:
    """Yield the weights packed by GPTQ.

    Raises
    ------
    ModelError
        If the format is unknown, or tensors do not fit together.
    """
    for name, codes in tensors.items():
        if not name.endswith(_CODES):
            continue
        kind = declaration.settings.get("checkpoint_format") or declaration.settings.get("format") or "gptq"
        if not isinstance(kind, str) or kind not in _STORED_LESS:
            what = (
                f"its {declaration.where} says checkpoint_format {quoted(str(kind), 40)}, which is not read"
            )
            raise bad(
                codes.path, f"{what}: save it as gptq_v2, or dequantise it with the library that wrote it"
            )
        yield _weight(name.removesuffix(_CODES), tensors, declaration, codes, kind)


def _weight(
    module: str, tensors: Mapping[str, SourceRef], declaration: Declaration, codes: SourceRef, kind: str
) -> Weight:
    zero, scale = (needed(tensors, codes, f"{module}.{end}") for end in ("qzeros", "scales"))
    index = tensors.get(f"{module}.g_idx")
    if scale.dtype not in ("F16", "BF16", "F32") or len(scale.shape) != 2:
        raise misfit(scale, f"is {scale.dtype} {list(scale.shape)}, where scales are a matrix of floats")
    n_groups, outputs = scale.shape
    if codes.dtype != "I32" or len(codes.shape) != 2 or codes.shape[1] != outputs:
        raise misfit(
            codes, f"is {codes.dtype} {list(codes.shape)}, which does not fit scales of {outputs} outputs"
        )
    bits = _bits(declaration, codes, zero, outputs)
    if zero.dtype != "I32" or zero.shape != (n_groups, outputs * bits // 32):
        raise misfit(
            zero, f"is {zero.dtype} {list(zero.shape)}, which does not fit scales of {list(scale.shape)}"
        )
    inputs = codes.shape[0] * 32 // bits
    if index is not None:
        if index.dtype != "I32" or len(index.shape) != 1 or -(-index.shape[0] * bits // 32) != codes.shape[0]:
            what = f"is {index.dtype} {list(index.shape)}, which does not fit the {list(codes.shape)} of its codes"
            raise misfit(index, what)
        inputs = index.shape[0]
    size = declaration.settings.get("group_size")
    size = size if type(size) is int and size > 0 else inputs
    if index is None and -(-inputs // size) != n_groups:
        raise misfit(
            scale, f"has {n_groups} groups, where {inputs} inputs make {-(-inputs // size)} of {size}"
        )
    less = _STORED_LESS[kind]
    ref = IntegersRef(
        f"{module}.weight",
        (outputs, inputs),
        Packed(contiguous(codes), bits, inputs, axis=0),
        contiguous(scale),
        Groups(size, 1, None if index is None else contiguous(index)),
        f"GPTQ INT{bits}",
        Packed(contiguous(zero), bits, outputs, offset=less),
        transposed=True,
        largest_zero=(1 << bits) - 1 if _may_have_wrapped(declaration) else None,
    )
    return Weight(ref)


def _may_have_wrapped(declaration: Declaration) -> bool:
    """Return whether subtracting 1 from a zero point of 0 may have wrapped: GPTQModel subtracts from whole words.

    The borrow corrupts the next zero point, and the value read depends on how a loader adds 1. Files of AutoGPTQ are
    read as its kernels read them: the stored number plus 1.
    """
    meta = declaration.settings.get("meta")
    writer = str(meta.get("quantizer") if isinstance(meta, Mapping) else None)
    return declaration.settings.get("sym") is False and "gptqmodel" in writer.lower()


def _bits(declaration: Declaration, codes: SourceRef, zero: SourceRef, outputs: int) -> int:
    """Return the bits of this layer's codes, which may differ from the model's."""
    declared = declaration.settings.get("bits")
    found = 32 * zero.shape[1] // outputs if len(zero.shape) == 2 and outputs else 0
    if found not in _BITS or (found != declared and not declaration.settings.get("dynamic")):
        what = f"has {found} bits an element by its zero points, where config.json declares {quoted(str(declared), 20)}"
        raise misfit(codes, f"{what}, and {', '.join(map(str, _BITS))} are read")
    return found


def needed(tensors: Mapping[str, SourceRef], codes: SourceRef, name: str) -> SourceRef:
    """Return a tensor that is needed to decode the codes.

    Raises
    ------
    ModelError
        If it is missing.
    """
    found = tensors.get(name)
    if found is None:
        raise misfit(codes, f"is quantised, and its {quoted(name)} is missing")
    return found
