"""The registry of quantised formats: a model's declaration selects the functions that find its quantised weights.

A family of formats is one module in this folder with one function, decorated with `finds`. The function gets the
tensors of a model that no previous family took, and yields the weights that it can read.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import field
from functools import cache

from streammerge.checkpoint.quantized.declarations import Declaration
from streammerge.formats.refs import MadeRef, SourceRef
from streammerge.lazy import late_pattern
from streammerge.records import dataclass


@dataclass(frozen=True)
class Weight:
    """One quantised weight of a model."""

    ref: MadeRef
    """The values, decoded as they are read; `stored_format` names the format."""
    beside: tuple[str, ...] = ()
    """Stored tensors that belong to the weight but are not needed to decode it: a packed weight's shape."""


Find = Callable[[Mapping[str, SourceRef], Declaration], Iterator[Weight]]
"""Function that yields the quantised weights among tensors; raises ModelError if codes and scales do not fit."""


@dataclass(frozen=True)
class _Family:
    methods: tuple[str | None, ...]
    order: int
    find: Find


_FAMILIES: list[_Family] = []
_ACTIVATION = late_pattern(
    r"(?:.*[._])?(?:(?:input|output|activation|act|[qkv]|kv|q_proj|k_proj|v_proj|prob)_(?:global_)?(?:scale|zero_point|scale_ub)"
    r"|\w+_activation_scale(?:_inv)?)",
    re.ASCII | re.DOTALL,
)
"""Names of scales of activations rather than weights."""


@dataclass(frozen=True)
class Decoded:
    """A model's tensors as a merge sees them."""

    tensors: Mapping[str, SourceRef]
    """Quantised weights under their logical names, in the positions of their codes; all others as stored."""
    activations: Mapping[str, SourceRef] = field(default_factory=dict)
    """Scales of activations, which are not part of the weights."""
    formats: tuple[str, ...] = ()
    """The formats of the quantised weights, each once."""
    coded: Mapping[str, SourceRef] = field(default_factory=dict)
    """All stored tensors of quantised weights, as in their files: codes, scales and zero points, shapes."""


def finds(*methods: str | None, order: int = 0) -> Callable[[Find], Find]:
    """Register the function that finds the weights of a family of formats.

    Parameters
    ----------
    methods
        The values of ``quant_method`` that it handles; None stands for models that declare nothing.
    order
        The position of the family; lower numbers come first.
    """

    def register(find: Find) -> Find:
        _FAMILIES.append(_Family(methods, order, find))
        _FAMILIES.sort(key=lambda family: family.order)
        return find

    return register


def decoded(tensors: Mapping[str, SourceRef], declaration: Declaration) -> Decoded:
    """Return a model's tensors; those quantised in a known format are decoded as they are read.

    Raises
    ------
    ModelError
        If codes and scales of a known format do not fit together; the message names the tensor.
    """
    _load()
    found: dict[str, MadeRef] = {}
    taken: set[str] = set()
    for family in _FAMILIES:
        if declaration.method not in family.methods:
            continue
        left = {name: ref for name, ref in tensors.items() if name not in taken} if taken else tensors
        for weight in family.find(left, declaration):
            ref = weight.ref
            found[ref.source.name] = ref
            taken.update((ref.source.name, *(part.name for part in ref.parts), *weight.beside))
    if not found:
        return Decoded(tensors)
    activations = {
        name: ref for name, ref in tensors.items() if name not in taken and _ACTIVATION.fullmatch(name)
    }
    kept: dict[str, SourceRef] = {}
    for name, stored in tensors.items():
        if name in found:
            kept[found[name].name] = found[name]
        elif name not in taken and name not in activations:
            kept[name] = stored
    formats = dict.fromkeys(ref.stored_format or "" for ref in found.values())
    return Decoded(
        kept, activations, tuple(formats), {name: tensors[name] for name in tensors if name in taken}
    )


def is_read(method: str | None) -> bool:
    """Return whether a family reads weights that are declared with this ``quant_method``.

    >>> is_read("gptq"), is_read("hqq")
    (True, False)
    """
    _load()
    return any(method in family.methods for family in _FAMILIES)


@cache
def _load() -> None:
    package = __name__.rpartition(".")[0]
    for name in sorted(
        module.name for module in pkgutil.iter_modules(importlib.import_module(package).__path__)
    ):
        importlib.import_module(f"{package}.{name}")
