"""Renumber the settings of config.json that refer to layers by number, after layers are restacked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from streammerge.checkpoint.names import DECLARED
from streammerge.planning.resolve.assemble import Stack

Own = Callable[[str], Mapping[str, Any]]
"""Each model's settings of the part that describes the stack, by the model's reference."""

NUMBERS = (
    "mlp_only_layers",
    "moe_layers",
    "cross_attention_layers",
    "full_attention_layers",
    "full_attn_idxs",
    "global_attention_layers",
    "attn_layer_indices",
)
"""Settings that list the numbers of the layers of some kind."""
_THRESHOLDS = ("first_k_dense_replace", "num_dense_layers", "max_window_layers", "moe_layer_start_index")
"""Settings that are a threshold: layers below this number are of a different kind from the rest."""
_PERIODS = (
    "full_attention_interval",
    "sliding_window_pattern",
    "decoder_sparse_step",
    "moe_layer_freq",
    "moe_layer_interval",
    "interleave_moe_layer_step",
    "no_rope_layer_interval",
    "attn_layer_period",
    "expert_layer_period",
    "cross_attention_freq",
    "global_attn_every_n_layers",
)
"""Settings that are a period n: one layer in every n is of a different kind."""


def follow_layers(part: dict[str, Any], stack: Stack, own: Own) -> list[str]:
    """Update the settings in `part` that refer to layers by number; return warnings on those that cannot be expressed."""
    notes = []
    for key in NUMBERS:
        value = part.get(key)
        if isinstance(value, list) and all(type(item) is int for item in value):
            part[key] = [
                place
                for place, (reference, number) in enumerate(stack.layers)
                if number in _either(own(reference).get(key), value)
            ]
    for key in _THRESHOLDS:
        if type(part.get(key)) is int and part[key] > 0:
            notes += _follow_threshold(part, key, stack, own)
    moved = any(place != number for place, (_, number) in enumerate(stack.layers))
    for key in _PERIODS:
        period = part.get(key)
        if type(period) is not int or period < 2 or "layer_types" in part or not moved:
            continue
        if any((place - number) % period for place, (_, number) in enumerate(stack.layers)):
            notes.append(
                f"config.json: {key}: {period} determines the kind of a layer by its number, and some layers now have a number "
                f"of the wrong kind: stack whole groups of {period} layers, or set it by hand"
            )
    for key in DECLARED:
        if stack.extra_before != stack.extra and type(part.get(key)) is int:
            part[key] = stack.extra
    return notes


def tail_of(value: Sequence[Any], stack: Stack) -> list[Any]:
    """Return a list's entries for the layers that are kept after the last."""
    return list(value[stack.before :])[: stack.extra]


def _either(value: object, other: list[int]) -> list[int]:
    return value if isinstance(value, list) else other


def _follow_threshold(part: dict[str, Any], key: str, stack: Stack, own: Own) -> list[str]:
    below = []
    for reference, number in stack.layers:
        value = own(reference).get(key, part[key])
        below.append(type(value) is int and number < value)
    first = next((place for place, is_below in enumerate(below) if not is_below), len(below))
    if first < len(below) or part[key] < len(below):
        part[key] = first
    if not any(below[first:]):
        return []
    return [
        f"config.json: {key} is {first}, but some layers of that kind come later (the first: {below.index(True, first)}): "
        "loaders will treat them as the other kind"
    ]
