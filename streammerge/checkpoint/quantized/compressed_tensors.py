"""compressed-tensors, the format of llm-compressor, vLLM and Kimi; groups of layers share a declared layout.

Layouts are those of the library's own compressors (compressed-tensors 0.20). A group's format overrides the model's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from streammerge.checkpoint.quantized.declarations import Declaration
from streammerge.checkpoint.quantized.fp4 import exponents
from streammerge.checkpoint.quantized.grids import scales_of
from streammerge.checkpoint.quantized.nvfp4 import nvfp4
from streammerge.checkpoint.quantized.patterns import matches
from streammerge.checkpoint.quantized.registry import Weight, finds
from streammerge.checkpoint.quantized.small import AGAIN, misfit, whole_numbers
from streammerge.checkpoint.refs.integers import Groups, IntegersRef, Packed
from streammerge.checkpoint.refs.quantized import Encoding, QuantizedRef
from streammerge.dtypes import FLOATS8
from streammerge.errors import ModelError
from streammerge.formats.parts import contiguous
from streammerge.formats.refs import SourceRef, TensorRef
from streammerge.io.files import bad, quoted
from streammerge.records import dataclass

_SCALES = ("F32", "BF16", "F16")
_PLAIN = ".weight"
_PACKED = ".weight_packed"


@dataclass(frozen=True)
class Group:
    """A declared group of layers with the same layout."""

    format: str
    targets: tuple[str, ...]
    bits: int
    symmetric: bool
    size: int | None
    """Number of inputs that share a scale; None if not declared."""
    block: tuple[int, int] | None
    """Rows and columns that share a scale; None if not declared."""


@dataclass(frozen=True)
class Stored:
    """The tensors of one quantised layer."""

    module: str
    codes: SourceRef
    tensors: Mapping[str, SourceRef]
    """All tensors of the model."""
    group: Group

    @property
    def name(self) -> str:
        """The name of the weight in a model that is not quantised."""
        return f"{self.module}.weight"

    def find(self, end: str) -> SourceRef | None:
        """Return the companion of the codes with this name ending; None if there is none."""
        return self.tensors.get(f"{self.module}.weight_{end}")

    def need(self, end: str) -> SourceRef:
        """Return the companion of the codes with this name ending.

        Raises
        ------
        ModelError
            If it is missing.
        """
        found = self.find(end)
        if found is None:
            raise misfit(
                self.codes, f"is quantised, and its {quoted(f'{self.module}.weight_{end}')} is missing"
            )
        return found


Read = Callable[[Stored], Weight]
_READ: dict[str, Read] = {}


def _reads(*formats: str) -> Callable[[Read], Read]:
    def register(read: Read) -> Read:
        _READ.update(dict.fromkeys(formats, read))
        return read

    return register


@finds("compressed-tensors")
def find_compressed(tensors: Mapping[str, SourceRef], declaration: Declaration) -> Iterator[Weight]:
    """Yield the weights stored by compressed-tensors.

    Raises
    ------
    ModelError
        If the declaration is malformed, a format is unknown, or tensors do not fit together.
    """
    groups: tuple[Group, ...] | None = None
    for name, codes in tensors.items():
        end = next((end for end in (_PACKED, _PLAIN) if name.endswith(end)), None)
        if end is None or (end == _PLAIN and f"{name}_scale" not in tensors):
            continue
        if groups is None:
            groups = _groups(declaration, codes.path)
        module = name.removesuffix(end)
        group = _group_of(module, groups, codes)
        yield _READ[group.format](Stored(module, codes, tensors, group))


def _groups(declaration: Declaration, path: str) -> tuple[Group, ...]:
    settings = declaration.settings
    sparsity = settings.get("sparsity_config")
    if isinstance(sparsity, Mapping) and sparsity.get("format", "dense") != "dense":
        raise _bad(
            declaration, path, f"sparsity format {_said(sparsity.get('format'))} is not read", _ELSEWHERE
        )
    entries = settings.get("config_groups")
    if not isinstance(entries, Mapping) or not entries:
        raise _bad(declaration, path, "`config_groups` is missing or empty")
    return tuple(
        _group(declaration, path, str(name), entry, settings.get("format")) for name, entry in entries.items()
    )


_ELSEWHERE = "decompress it with compressed-tensors, or use the weights that it was quantised from"


def _group(declaration: Declaration, path: str, name: str, entry: Any, whole: Any) -> Group:
    where = f"group {quoted(name, 40)}"
    weights = entry.get("weights") if isinstance(entry, Mapping) else None
    if not isinstance(weights, Mapping):
        raise _bad(declaration, path, f"{where} does not say how weights are stored")
    targets = entry.get("targets")
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise _bad(declaration, path, f"{where}: `targets` is not a list of names")
    kind = entry.get("format") or whole
    if not isinstance(kind, str) or kind not in _READ:
        raise _bad(declaration, path, f"format {_said(kind)} is not read", _ELSEWHERE)
    bits, size, block = weights.get("num_bits", 8), weights.get("group_size"), weights.get("block_structure")
    if type(bits) is not int or not 1 <= bits <= 8:
        raise _bad(declaration, path, f"{where}: `num_bits` is {_said(bits)}, not 1 to 8")
    if size is not None and (type(size) is not int or not (size == -1 or size > 0)):
        raise _bad(declaration, path, f"{where}: `group_size` is {_said(size)}")
    if block is not None and not (
        isinstance(block, list) and len(block) == 2 and all(type(n) is int and n > 0 for n in block)
    ):
        raise _bad(declaration, path, f"{where}: `block_structure` is {_said(block)}, not two sizes")
    return Group(
        kind,
        tuple(targets),
        bits,
        weights.get("symmetric", True) is not False,
        size if size and size > 0 else None,
        None if block is None else (block[0], block[1]),
    )


def _said(value: Any) -> str:
    return quoted(value if isinstance(value, str) else repr(value)[:60], 60)


def _bad(declaration: Declaration, path: str, what: str, cure: str = AGAIN) -> ModelError:
    return bad(path, f"its {declaration.where} (compressed-tensors): {what}: {cure}")


def _group_of(module: str, groups: tuple[Group, ...], codes: SourceRef) -> Group:
    """Return the group of a layer, found by name, then by pattern, then by class, which is not known here."""
    if len(groups) == 1:
        return groups[0]
    for is_meant in (_by_name, _by_pattern, _by_class):
        found = [
            group for group in groups if any(is_meant(module, target, codes) for target in group.targets)
        ]
        if found:
            return found[0]
    raise misfit(codes, "is quantised, and no `targets` of config.json's `config_groups` match its layer")


def _by_name(module: str, target: str, codes: SourceRef) -> bool:
    return module == target


def _by_pattern(module: str, target: str, codes: SourceRef) -> bool:
    if not target.startswith("re:"):
        return False
    try:
        return matches(target.removeprefix("re:"), module)
    except ValueError:
        what = f"is quantised, and `targets` of config.json's `config_groups` hold {quoted(target, 80)}"
        cure = "write it without quantifiers other than `.*` between its parts"
        raise misfit(codes, f"{what}, which is no expression or too free a one", cure) from None


def _by_class(module: str, target: str, codes: SourceRef) -> bool:
    is_embedding = module.rpartition(".")[2] in ("embed_tokens", "wte", "embeddings")
    return target == ("Embedding" if is_embedding else "Linear")


@_reads("float-quantized", "int-quantized", "naive-quantized", "mxfp8-quantized")
def _in_bytes(stored: Stored) -> Weight:
    """Return a weight with one element per byte: FP8, or integers."""
    scale, codes, zero = stored.need("scale"), stored.codes, stored.find("zero_point")
    if codes.dtype == "I8":
        return _integers(
            stored, Packed(contiguous(codes), 8, codes.shape[-1] if codes.shape else 1, signed=True)
        )
    if codes.dtype not in FLOATS8:
        raise misfit(codes, f"is {codes.dtype}, where {stored.group.format} stores F8_E4M3 or I8")
    if zero is not None and zero.dtype not in FLOATS8:
        raise misfit(zero, f"is a zero point of {codes.dtype} codes, which have none")
    group = stored.group
    block = group.block or (None if group.size is None else (1, group.size))
    is_mx = group.format == "mxfp8-quantized"
    scales = scales_of(codes, codes.shape, scale, block, bytes_are_e8m0=is_mx)
    title = f"compressed-tensors {group.format}"
    ref = QuantizedRef(stored.name, codes.shape, contiguous(codes), scales, Encoding(title, codes.dtype))
    return Weight(ref, _names(zero, stored.find("shape")))


@_reads("pack-quantized")
def _in_words(stored: Stored) -> Weight:
    """Return a weight whose integers are packed densely along the inputs."""
    bits, codes = stored.group.bits, stored.codes
    if codes.dtype != "I32" or len(codes.shape) < 2:
        raise misfit(codes, f"is {codes.dtype} {list(codes.shape)}, where packed codes are I32 matrices")
    said = stored.need("shape")
    shape = whole_numbers(said)
    if len(shape) != len(codes.shape) or shape[:-1] != codes.shape[:-1] or shape[-1] < 1:
        raise misfit(said, f"says {list(shape)}, which does not fit the {list(codes.shape)} of its codes")
    if -(-shape[-1] * bits // 32) != codes.shape[-1]:
        what = f"says {shape[-1]} columns of {bits} bits, which do not fill the {codes.shape[-1]} words of its codes"
        raise misfit(said, what)
    packed = Packed(contiguous(codes), bits, shape[-1], offset=-(1 << (bits - 1)))
    return _integers(stored, packed, shape, (said.name,))


def _integers(
    stored: Stored, codes: Packed, shape: tuple[int, ...] | None = None, beside: tuple[str, ...] = ()
) -> Weight:
    shape = stored.codes.shape if shape is None else shape
    if len(shape) < 2:
        raise misfit(stored.codes, f"has shape {list(shape)}, which is no matrix")
    scale, index = stored.need("scale"), stored.find("g_idx")
    if scale.dtype not in _SCALES:
        raise misfit(scale, f"is {scale.dtype}, where scales of integers are one of {', '.join(_SCALES)}")
    groups, n = _shared(stored, shape, scale, index)
    zeros = _zero_points(stored, scale, n)
    title = f"compressed-tensors {stored.group.format}, INT{stored.group.bits}"
    ref = IntegersRef(stored.name, shape, codes, contiguous(scale), groups, title, zeros)
    return Weight(ref, beside)


def _shared(
    stored: Stored, shape: tuple[int, ...], scale: SourceRef, index: SourceRef | None
) -> tuple[Groups, tuple[int, int]]:
    """Return the groups of elements that share a scale, and the rows and columns of the scales.

    Raises
    ------
    ModelError
        If the shape of the scales fits neither the codes nor the declaration.
    """
    rows, columns = shape[-2:]
    lead = shape[:-2]
    block, size = stored.group.block, stored.group.size
    misses = misfit(
        scale, f"has shape {list(scale.shape)}, which does not fit the {list(shape)} of its codes"
    )
    if scale.n_elements == 1:
        return Groups(rows, columns), (1, 1)
    if len(scale.shape) == 1 and not lead:
        high, wide = scale.shape[0], 1
    elif len(scale.shape) == len(shape) and scale.shape[:-2] == lead:
        high, wide = scale.shape[-2:]
    else:
        raise misses
    if block is not None:
        if (high, wide) != (-(-rows // block[0]), -(-columns // block[1])):
            raise misses
        return Groups(*block), (high, wide)
    if high != rows:
        raise misses
    if index is not None:
        if index.dtype != "I32" or index.shape != (columns,):
            raise misfit(index, f"is {index.dtype} {list(index.shape)}, where I32 [{columns}] is expected")
        return Groups(1, size or -(-columns // wide), contiguous(index)), (high, wide)
    if wide == 1 and size is None:
        return Groups(1, columns), (high, wide)
    if size is not None and wide != -(-columns // size):
        raise misses
    if size is None and (not wide or columns % wide):
        raise misses
    return Groups(1, size or columns // wide), (high, wide)


def _zero_points(stored: Stored, scale: SourceRef, n: tuple[int, int]) -> Packed | None:
    """Return the zero points, one per scale: packed like codes but along the outputs, or one per byte."""
    zero, bits = stored.find("zero_point"), stored.group.bits
    if zero is None:
        if not stored.group.symmetric:
            stored.need("zero_point")
        return None
    high, wide = n
    lead = scale.shape[:-2] if len(scale.shape) > 2 else ()
    if zero.dtype == "I8" and zero.n_elements == scale.n_elements:
        return Packed(_seen_as(zero, "I8", (*lead, high, wide)), 8, wide, signed=True)
    if zero.dtype == "I32" and zero.shape == (*lead, -(-high * bits // 32), wide):
        return Packed(contiguous(zero), bits, high, axis=0, offset=-(1 << (bits - 1)))
    what = f"is {zero.dtype} {list(zero.shape)}, which does not fit the {list(scale.shape)} of its scales"
    raise misfit(zero, what)


def _seen_as(ref: SourceRef, dtype: str, shape: tuple[int, ...]) -> TensorRef:
    tensor = contiguous(ref)
    return TensorRef(tensor.name, dtype, shape, tensor.path, tensor.offset, tensor.nbytes)


@_reads("nvfp4-pack-quantized")
def _nvfp4(stored: Stored) -> Weight:
    whole = stored.need("global_scale")
    ref = nvfp4(
        stored.name,
        stored.codes,
        stored.need("scale"),
        whole,
        "compressed-tensors nvfp4-pack-quantized",
        divides=True,
    )
    return Weight(ref, _names(stored.find("shape")))


@_reads("mxfp4-pack-quantized")
def _mxfp4(stored: Stored) -> Weight:
    codes = stored.codes
    if codes.dtype != "U8" or len(codes.shape) not in (2, 3):
        raise misfit(codes, f"is {codes.dtype} {list(codes.shape)}, where MXFP4 codes are U8 matrices")
    shape = (*codes.shape[:-1], 2 * codes.shape[-1])
    scales, encoding = exponents(codes, shape, stored.need("scale"))
    encoding = replace(encoding, title=f"compressed-tensors {stored.group.format}")
    ref = QuantizedRef(stored.name, shape, contiguous(codes), scales, encoding)
    return Weight(ref, _names(stored.find("shape")))


def _names(*refs: SourceRef | None) -> tuple[str, ...]:
    return tuple(ref.name for ref in refs if ref is not None)
