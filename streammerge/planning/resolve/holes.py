"""Refuse a template model that lacks tensors in some of its layers: the output would lack them too, and not load."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from streammerge.checkpoint.index import TensorIndex
from streammerge.checkpoint.names import count_layers, place_of
from streammerge.errors import ModelError, printable
from streammerge.planning.resolve.assemble import OutputTensor


def check_holes(
    template: TensorIndex, model: TensorIndex, extra: Sequence[str], excluded: Sequence[re.Pattern[str]]
) -> None:
    """Refuse a template model without a tensor that its other layers have, and that a different model has in this one.

    Parameters
    ----------
    extra
        The names in `model` that the template model lacks.
    excluded
        Patterns of names that need not be in the output.

    Raises
    ------
    ModelError
        If there is such a tensor; the message names the first.
    """
    if not extra:
        return
    layers = _Layers.of(template)

    def is_lost(name: str) -> bool:
        place = place_of(name, layers.counts)
        if place is None:
            return False
        stack, number, rest = place
        return number < layers.counts[stack] and (stack, rest) in layers.kinds

    _refuse(template, model, [name for name in extra if is_lost(name)], excluded)


def check_holes_of_slices(
    outputs: Sequence[OutputTensor],
    indexes: Mapping[str, TensorIndex],
    excluded: Sequence[re.Pattern[str]],
) -> None:
    """Refuse slices whose first source lacks a tensor that its other layers, and a different source, have there.

    Raises
    ------
    ModelError
        As `check_holes`.
    """
    parts: dict[int, list[OutputTensor]] = {}
    for output in outputs:
        if len(output.part.sources) > 1 and output.part.sources[0].layer_range is not None:
            parts.setdefault(id(output.part), []).append(output)
    layers: dict[str, _Layers] = {}
    for merged in parts.values():
        sources = merged[0].part.sources
        for reference in (merged[0].template[0], *(spec.reference for spec in sources)):
            if reference not in layers:
                layers[reference] = _Layers.of(indexes[reference])
        lender = merged[0].template[0]
        for i, spec in enumerate(sources):
            used = {output.sources[i] for output in merged}
            lost = [
                name
                for number in range(*(spec.layer_range or (0, 0)))
                for name, kind in layers[spec.reference].by_number.get(number, ())
                if name not in used and kind in layers[lender].kinds
            ]
            _refuse(indexes[lender], indexes[spec.reference], lost, excluded)


class _Layers(NamedTuple):
    """The tensors of a model's layers."""

    counts: Mapping[str, int]
    """Number of layers of each stack; see `count_layers`."""
    kinds: frozenset[tuple[str, str]]
    """Stack and name within the layer of each."""
    by_number: Mapping[int, Sequence[tuple[str, tuple[str, str]]]]
    """Name and kind of the tensors of each layer."""

    @classmethod
    def of(cls, index: TensorIndex) -> _Layers:
        counts = count_layers(index)
        by_number: dict[int, list[tuple[str, tuple[str, str]]]] = {}
        for name in index:
            if (place := place_of(name, counts)) is not None:
                by_number.setdefault(place[1], []).append((name, (place[0], place[2])))
        return cls(counts, frozenset(kind for found in by_number.values() for _, kind in found), by_number)


def _refuse(
    holed: TensorIndex, whole: TensorIndex, names: Sequence[str], excluded: Sequence[re.Pattern[str]]
) -> None:
    lost = [name for name in names if not any(pattern.search(name) for pattern in excluded)]
    if lost:
        more, them = ("is", "it") if len(lost) == 1 else (f"and {len(lost) - 1} more are", "them")
        raise ModelError(
            f"{printable(holed.reference)}: tensor {printable(lost[0])} {more} missing, where other layers and "
            f"{printable(whole.reference)} have {them}: download or copy the model again, or list {them} under `exclude:` "
            f"to leave {them} out"
        )
