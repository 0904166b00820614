"""The value of a parameter for one tensor: a scalar, a gradient over the layers, or filtered values.

The language is mergekit's: a list of numbers is a gradient, interpolated over the layers; a list of
``{filter, value}`` chooses by the first filter that is a substring of the tensor's name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from streammerge.errors import ConfigError, printable

Scalar = bool | int | float | str
_LAYER = re.compile(r"^(.*?)\.(\d+)\.")


@dataclass(frozen=True)
class Clause:
    """One value (or the points of a gradient) and the tensors it is for."""

    filter: str | None
    """Substring of the tensor's name; None matches all."""
    values: tuple[Scalar, ...]


@dataclass(frozen=True)
class Setting:
    """What the config says of one parameter, in one place."""

    path: str
    """Where it stands, such as ``config.yml: models[1].parameters.weight``."""
    clauses: tuple[Clause, ...]


def parse_setting(value: Any, path: str) -> Setting:
    """Turn a YAML value into a setting.

    Raises
    ------
    ConfigError
        If it is none of the forms above.
    """
    conditional = isinstance(value, list) and value and isinstance(value[0], dict)
    entries = value if conditional else [value]
    return Setting(path, tuple(_clause(entry, path) for entry in entries))


def _clause(entry: Any, path: str) -> Clause:
    name = None
    if isinstance(entry, dict):
        if not set(entry) <= {"filter", "value"} or "value" not in entry:
            raise ConfigError(f"{path}: a conditional value has the keys `filter` and `value` only")
        name, entry = entry.get("filter"), entry["value"]
        if name is not None and not isinstance(name, str):
            raise ConfigError(f"{path}: `filter` is not a string")
    values = entry if isinstance(entry, list) else [entry]
    if not values:
        raise ConfigError(f"{path}: an empty list")
    for value in values:
        if not isinstance(value, bool | int | float | str):
            raise ConfigError(f"{path}: {printable(value, 60)} is not a number, a string, true or false")
    kinds = {"number" if type(v) in (int, float) else type(v).__name__ for v in values}
    if len(kinds) > 1:
        raise ConfigError(f"{path}: a gradient mixes {' and '.join(sorted(kinds))}")
    return Clause(None if name == "*" else name, tuple(values))


def value_for(setting: Setting, tensor: str, t: float) -> Scalar | None:
    """Return the value for one tensor at depth `t` in [0, 1], or None where no filter matches.

    >>> value_for(parse_setting([0.0, 1.0], "t"), "model.layers.1.mlp", 0.25)
    0.25
    """
    for clause in setting.clauses:
        if clause.filter is None or clause.filter in tensor:
            return _interpolate(clause.values, t)
    return None


def _interpolate(values: tuple[Scalar, ...], t: float) -> Scalar:
    if len(values) == 1:
        return values[0]
    place = t * (len(values) - 1)
    left = min(int(place), len(values) - 1)
    first = values[left]
    if isinstance(first, bool | str) or left == len(values) - 1:
        return first
    second = values[left + 1]
    assert not isinstance(second, str)
    part = place - left
    return first if part == 0 else (1 - part) * first + part * second


def count_layers(names: Iterable[str]) -> Mapping[str, int]:
    """Return the number of layers under each prefix: the text before a name's first number.

    >>> dict(count_layers(["model.layers.0.q", "model.layers.1.q", "lm_head"]))
    {'model.layers': 2}
    """
    counts: dict[str, int] = {}
    for name in names:
        if match := _LAYER.match(name):
            counts[match[1]] = max(counts.get(match[1], 0), int(match[2]) + 1)
    return counts


def layer_fraction(tensor: str, n_layers: Mapping[str, int]) -> float:
    """Return how deep a tensor lies: layer / (layers - 1); 1 for an only layer; 0 outside all layers."""
    match = _LAYER.match(tensor)
    if match is None:
        return 0.0
    last = n_layers.get(match[1], 1) - 1
    return int(match[2]) / last if last else 1.0
