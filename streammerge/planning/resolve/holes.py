"""Refuse a template model that lacks tensors in some of its layers: the output would lack them too, and not load."""

from __future__ import annotations

import re
from collections.abc import Sequence

from streammerge.checkpoint.index import TensorIndex
from streammerge.checkpoint.names import count_layers, place_of
from streammerge.errors import ModelError, printable


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
    counts = count_layers(template)
    places = (place_of(name, counts) for name in template)
    kinds = {(place[0], place[2]) for place in places if place is not None}

    def is_lost(name: str) -> bool:
        place = place_of(name, counts)
        return place is not None and place[1] < counts[place[0]] and (place[0], place[2]) in kinds

    lost = [n for n in extra if is_lost(n) and not any(pattern.search(n) for pattern in excluded)]
    if lost:
        more, them = ("is", "it") if len(lost) == 1 else (f"and {len(lost) - 1} more are", "them")
        raise ModelError(
            f"{printable(template.reference)}: tensor {printable(lost[0])} {more} missing, where other layers and "
            f"{printable(model.reference)} have {them}: download or copy the model again, or list {them} under `exclude:` "
            f"to leave {them} out"
        )
