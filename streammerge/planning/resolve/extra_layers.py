"""Layers behind the last that predict further tokens (multi-token prediction): stored like layers, and none of them.

DeepSeek-V3 and GLM-4.5 number them on behind the last layer, Qwen3-Next and MiMo store them under names of their own
(``mtp.layers.0``, ``model.mtp_layers.0``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from streammerge.checkpoint.names import LANGUAGE_PARTS, count_layers, layer_fraction

DECLARED = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "mtp_num_layers")
"""Keys of config.json that count them."""
_MARKS = frozenset({"eh_proj", "enorm", "hnorm", "shared_head"})
"""Parts of names that only such a layer has."""
_STACKS = frozenset({"mtp", "mtp_layers", "mtp_block", "mtp_blocks", "mtp_module", "mtp_modules", "nextn"})
"""Parts of names under which they lie apart."""
_OTHER_STACKS = ("vis", "vit", "audio", "encoder")
"""Parts of the names of stacks that predict nothing."""


def lies_apart(name: str) -> bool:
    """Return whether a tensor belongs to such layers by the name that they have for themselves.

    >>> lies_apart("mtp.layers.0.mlp.gate.weight"), lies_apart("model.layers.0.mlp.gate.weight")
    (True, False)
    """
    return not _STACKS.isdisjoint(name.lower().split("."))


def count_real(
    names: Iterable[str], config: Mapping[str, Any]
) -> tuple[Mapping[str, int], Mapping[str, int]]:
    """Return the layers of each stack, as `count_layers` does, and how many more lie behind its last.

    They are known by their names, or else by a config that declares them and counts fewer layers than are stored.

    >>> names = [f"model.layers.{i}.up.weight" for i in range(3)] + ["model.layers.2.eh_proj.weight"]
    >>> count_real(names, {})
    ({'model.layers': 2}, {'model.layers': 1})
    """
    names = [name for name in names if not lies_apart(name)]
    stored = count_layers(names)
    marked = _marked(names, stored)
    extra = {prefix: _trailing(count, marked.get(prefix, set())) for prefix, count in stored.items()}
    declared = _declared(config)
    for prefix, count in stored.items():
        if declared and not extra[prefix] and not any(word in prefix.lower() for word in _OTHER_STACKS):
            extra[prefix] = next((more for real, more in declared if real + more == count), 0)
    return {prefix: count - extra[prefix] for prefix, count in stored.items()}, extra


def depth_of(name: str, counts: Mapping[str, int]) -> float:
    """Return a tensor's depth as `layer_fraction` does; an extra layer lies as deep as the last."""
    return 1.0 if lies_apart(name) else layer_fraction(name, counts)


def _declared(config: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Return what a config says of the language model: its layers, and those behind the last."""
    parts = [config, *(config.get(name) for name in LANGUAGE_PARTS)]
    pairs = [
        (part.get("num_hidden_layers"), part.get(key))
        for part in parts
        if isinstance(part, Mapping)
        for key in DECLARED
    ]
    return [
        (real, more)
        for real, more in pairs
        if type(real) is int and type(more) is int and real > 0 and more > 0
    ]


def _marked(names: Iterable[str], stored: Mapping[str, int]) -> dict[str, set[int]]:
    """Return the numbers of each stack's layers that have a name only an extra layer has."""
    found: dict[str, set[int]] = {}
    for parts in (name.split(".") for name in names):
        if _MARKS.isdisjoint(parts):
            continue
        for place, part in enumerate(parts):
            prefix = ".".join(parts[:place])
            if part.isascii() and part.isdigit() and prefix in stored:
                found.setdefault(prefix, set()).add(int(part[:9]))
                break
    return found


def _trailing(count: int, marked: set[int]) -> int:
    """Return how many layers from the last on are marked; not all, or it is another kind of model."""
    n = next((n for n in range(count) if count - 1 - n not in marked), count)
    return n if n < count else 0
