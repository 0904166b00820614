"""The key `sweep`: parameters of the method, each with several values."""

from __future__ import annotations

import math
from collections.abc import Mapping

from streammerge.config.settings import Scalar, parse_setting
from streammerge.config.wording import child, refuse, shown
from streammerge.records import dataclass

MOST_POINTS = 1024
"""Most points of a grid."""
_FORM = "a sweep is a map of parameters, each with a list of values (lambda: [0.3, 0.5])"


@dataclass(frozen=True)
class Swept:
    """A parameter and the values that it takes, in the order of the config."""

    name: str
    values: tuple[Scalar, ...]
    path: str
    """Its place in the config, for messages: ``config.yml: sweep.lambda``."""


def parse_sweep(data: object, path: str) -> tuple[Swept, ...]:
    """Return the swept parameters; none without the key.

    Raises
    ------
    ConfigError
        If a parameter has no list of scalars, has a value twice, or there are too many points.
    """
    if data is None:
        return ()
    if not isinstance(data, dict) or not data:
        refuse(path, f"{_FORM}, not {shown(data)}")
    swept = tuple(_swept(name, values, child(path, name)) for name, values in data.items())
    count = math.prod(len(one.values) for one in swept)
    if count > MOST_POINTS:
        refuse(path, f"{count} points, at most {MOST_POINTS}: sweep fewer values at a time")
    return swept


def _swept(name: str, values: object, path: str) -> Swept:
    if not isinstance(values, list):
        refuse(path, f"must be a list of values, not {shown(values)} (write [{_text(values)}])")
    if not values:
        refuse(path, "an empty list (give at least one value)")
    found: dict[Scalar, int] = {}
    for i, value in enumerate(values):
        scalar = _scalar(value, f"{path}[{i}]")
        if scalar in found:
            refuse(
                f"{path}[{i}]", f"{shown(value)} is given already, as {path}[{found[scalar]}] (remove one)"
            )
        found[scalar] = i
    return Swept(name, tuple(found), path)


def _scalar(value: object, path: str) -> Scalar:
    if value is None or isinstance(value, Mapping | list):
        refuse(path, f"{shown(value)} is not a single value (gradients and filters cannot be swept)")
    return parse_setting(value, path).clauses[0].values[0]


def _text(value: object) -> str:
    return "…" if value is None or isinstance(value, Mapping | str) else shown(value)
