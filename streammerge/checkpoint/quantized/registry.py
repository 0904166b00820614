"""The registry of quantised formats: what a model declares leads to what finds its quantised weights.

A family of formats is one module in this folder with one function, decorated with `finds`: it is given the tensors of a
model that no other family took, and yields the weights it knows how to read.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache

from streammerge.checkpoint.quantized.declarations import Declaration
from streammerge.formats.refs import MadeRef, SourceRef


@dataclass(frozen=True)
class Weight:
    """One quantised weight of a model."""

    ref: MadeRef
    """Its values, decoded as they are read; its `stored_format` says how."""
    beside: tuple[str, ...] = ()
    """Stored tensors that belong to it and that its values do not need: a packed weight's shape."""


Find = Callable[[Mapping[str, SourceRef], Declaration], Iterator[Weight]]
"""Yields the quantised weights among tensors; raises ModelError where codes and scales do not fit."""


@dataclass(frozen=True)
class _Family:
    methods: tuple[str | None, ...]
    order: int
    find: Find


_FAMILIES: list[_Family] = []
_ACTIVATION = re.compile(
    r"(?:.*[._])?(?:(?:input|output|activation|act|[qkv]|kv|q_proj|k_proj|v_proj|prob)_(?:global_)?(?:scale|zero_point|scale_ub)"
    r"|\w+_activation_scale(?:_inv)?)",
    re.ASCII | re.DOTALL,
)
"""Names of what scales activations, not weights."""


@dataclass(frozen=True)
class Decoded:
    """A model's tensors as a merge sees them."""

    tensors: Mapping[str, SourceRef]
    """Quantised weights under their logical names, in the places of their codes; all others as they are stored."""
    activations: Mapping[str, SourceRef] = field(default_factory=dict)
    """What scales activations: no part of the weights."""
    formats: tuple[str, ...] = ()
    """How its quantised weights are stored, each kind once."""
    coded: Mapping[str, SourceRef] = field(default_factory=dict)
    """All stored tensors of quantised weights, as they lie in their files: codes, what decodes them, their shapes."""


def finds(*methods: str | None, order: int = 0) -> Callable[[Find], Find]:
    """Register what finds the weights of a family of formats.

    Parameters
    ----------
    methods
        The values of ``quant_method`` that it is asked for; None: models that declare nothing, too.
    order
        Families are asked in ascending order.
    """

    def register(find: Find) -> Find:
        _FAMILIES.append(_Family(methods, order, find))
        _FAMILIES.sort(key=lambda family: family.order)
        return find

    return register


def decoded(tensors: Mapping[str, SourceRef], declaration: Declaration) -> Decoded:
    """Return a model's tensors, those that are quantised in a known format to be decoded as they are read.

    Raises
    ------
    ModelError
        If codes and scales of a known format do not fit together; it names the tensor.
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


@cache
def _load() -> None:
    package = __name__.rpartition(".")[0]
    for name in sorted(
        module.name for module in pkgutil.iter_modules(importlib.import_module(package).__path__)
    ):
        importlib.import_module(f"{package}.{name}")
