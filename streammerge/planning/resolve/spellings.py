"""Endings of names that versions of a library spell differently for the same tensors."""

from __future__ import annotations

from dataclasses import replace

from streammerge.checkpoint.index import TensorIndex
from streammerge.errors import printable

_SPELLINGS = (
    ("LayerNorm.gamma", "LayerNorm.weight"),
    ("LayerNorm.beta", "LayerNorm.bias"),
    (".weight_g", ".parametrizations.weight.original0"),
    (".weight_v", ".parametrizations.weight.original1"),
)
"""Equivalent endings: checkpoints converted from TensorFlow, and weight norms before torch 2.0."""


def spelt_alike(index: TensorIndex, template: TensorIndex, notes: list[str]) -> TensorIndex:
    """Return a model with endings spelt as in the template model; add a note if they were spelt differently."""
    pairs = [pair for both in _SPELLINGS for pair in (both, both[::-1]) if _differ(pair, index, template)]
    if not pairs:
        return index
    called = {
        name: renamed
        for own, other in pairs
        for name in index
        if name.endswith(own) and (renamed := name.removesuffix(own) + other) not in index
    }
    how = ", ".join(f"*{own} is *{other}" for own, other in pairs)
    notes.append(
        f"{printable(index.reference)}: names are matched with those of {printable(template.reference)}: {how}"
    )
    return replace(index, tensors={called.get(name, name): ref for name, ref in index.items()})


def _differ(pair: tuple[str, str], index: TensorIndex, template: TensorIndex) -> bool:
    own, other = pair
    return _ends(index, own) and not _ends(template, own) and _ends(template, other)


def _ends(index: TensorIndex, end: str) -> bool:
    return any(name.endswith(end) for name in index)
