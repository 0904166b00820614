"""A parameter as written in the config, and its value for a tensor.

A setting is a scalar, a gradient over the depth of the network (a list of points), or a list of clauses
``{filter, value}``, of which the first that matches the tensor's name applies::

    density: 0.5
    t: [0, 0.5, 1]
    weight:
      - {filter: self_attn, value: [0.2, 0.8]}
      - {value: 0.5}

Only the structure is checked here; types are checked later against the method's declaration.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from streammerge.config.wording import check_keys, child, refuse, shown
from streammerge.lazy import late_pattern
from streammerge.records import dataclass

Scalar = bool | int | float | str

_WHOLE = late_pattern(r"[-+]?\d+", re.ASCII)
_NUMBER = late_pattern(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", re.ASCII)
_FORMS = "a setting is a value, a list of values, or a list of {filter, value}"


@dataclass(frozen=True)
class Clause:
    """A value, or the points of a gradient, for the tensors that the filter matches."""

    filter: str | None
    """A part of the tensor's name; None and `*` match every tensor."""
    values: tuple[Scalar, ...]
    """One value, or the points of a gradient: all numbers, all bools or all strings."""

    def matches(self, tensor: str) -> bool:
        """Return whether the filter matches the tensor."""
        return self.filter is None or self.filter == "*" or self.filter in tensor


@dataclass(frozen=True)
class Setting:
    """A parameter's clauses in the order of the config."""

    path: str
    """Its place in the config, for messages: ``config.yml: models[1].parameters.weight``."""
    clauses: tuple[Clause, ...]


def parse_setting(value: object, path: str) -> Setting:
    """Return the setting that `value`, as YAML gives it, describes.

    Raises ConfigError for null, NaN, infinity, empty or nested lists, and lists of mixed types.
    """
    if isinstance(value, Mapping):
        return Setting(path, (_clause(value, path),))
    if isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        places = [(item, f"{path}[{i}]") for i, item in enumerate(value)]
        return Setting(path, tuple(_clause(item, place) for item, place in places))
    return Setting(path, (Clause(None, _values(value, path)),))


def value_for(setting: Setting, tensor: str, t: float) -> Scalar | None:
    """Return the value for the tensor at relative depth `t` in [0, 1], or None: no clause matches.

    Numbers are interpolated linearly between the points of a gradient; for bools and strings the last point at or
    before `t` is used.

    >>> value_for(parse_setting([0, 0.5, 2.0], "density"), "model.norm.weight", 0.75)
    1.25
    """
    assert 0 <= t <= 1, t
    for clause in setting.clauses:
        if clause.matches(tensor):
            return _at(clause.values, t)
    return None


def _clause(data: object, path: str) -> Clause:
    if not isinstance(data, Mapping):
        refuse(path, f"{shown(data)} among {{filter, value}} clauses (write {{value: …}})")
    check_keys(data, path, ("filter", "value"))
    if "value" not in data:
        refuse(path, "no 'value' (a clause is {filter, value})")
    text = data.get("filter")
    if not isinstance(text, str | None):
        refuse(child(path, "filter"), f"must be a string, not {shown(text)} (quote it)")
    return Clause(text, _values(data["value"], child(path, "value")))


def _values(value: object, path: str) -> tuple[Scalar, ...]:
    if not isinstance(value, list):
        return (_scalar(value, path),)
    if not value:
        refuse(path, "an empty list (a gradient has at least one point)")
    points = tuple(_scalar(item, f"{path}[{i}]") for i, item in enumerate(value))
    if len({_kind(point) for point in points}) > 1:
        refuse(path, "a gradient is all numbers, all bools or all strings, not a mixture")
    return points


def _kind(point: Scalar) -> type:
    return type(point) if isinstance(point, bool | str) else float


def _scalar(value: object, path: str) -> Scalar:
    if isinstance(value, str) and len(value) <= 64 and _NUMBER.fullmatch(value):
        # YAML 1.1 takes 1e-5, without a point, for a string; templates of configs put numbers in quotes.
        value = int(value) if _WHOLE.fullmatch(value) else float(value)
    if isinstance(value, bool | str):
        return value
    if not isinstance(value, int | float):
        refuse(path, f"{shown(value)} is not a value ({_FORMS})")
    try:
        finite = math.isfinite(value)
    except OverflowError:
        finite = False
    if not finite:
        refuse(path, f"{shown(value)} is not a finite number")
    return value


def _at(values: tuple[Scalar, ...], t: float) -> Scalar:
    """Return the value at `t`; on a point it is exactly that point, and an int stays an int."""
    if len(values) == 1:
        return values[0]
    position = t * (len(values) - 1)
    left = int(position)
    fraction = position - left
    if isinstance(values[0], bool | str) or fraction == 0:
        return values[left]
    return (1 - fraction) * float(values[left]) + fraction * float(values[left + 1])
