"""The key `lines`: a scale of the task vectors that grows with the depth of the layer (LiNeS, https://arxiv.org/abs/2410.17146)."""

from __future__ import annotations

import math
from typing import NoReturn

from streammerge.config.wording import check_keys, child, refuse, shown
from streammerge.records import dataclass

_KEYS = ("alpha", "beta")


@dataclass(frozen=True)
class Lines:
    """A scale of the task vectors by layer: alpha + beta * l / (L - 1) in layer l of L, alpha outside the layers."""

    alpha: float
    beta: float
    path: str = "lines"
    """Its place in the config, for messages."""

    def factor(self, depth: float | None) -> float:
        """Return the scale at a relative depth l / (L - 1) from 0 to 1; None: outside the layers.

        >>> Lines(0.25, 0.5).factor(1.0), Lines(0.25, 0.5).factor(None)
        (0.75, 0.25)
        """
        return self.alpha if depth is None else self.alpha + self.beta * depth


def parse_lines(value: object, path: str) -> Lines | None:
    """Return the value of the key; None if the config has none.

    Raises
    ------
    ConfigError
        If it is not a map of two numbers.
    """
    if value is None:
        return None
    if not isinstance(value, dict):
        _refuse(path, value)
    check_keys(value, path, _KEYS)
    alpha, beta = (_number(value, key, path) for key in _KEYS)
    return Lines(alpha, beta, path)


def _number(data: dict[str, object], key: str, path: str) -> float:
    if key not in data:
        refuse(path, f"'{key}' is missing (lines: {{alpha: 0.2, beta: 0.8}})")
    value = data[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < math.inf:
        refuse(child(path, key), f"{shown(value)} is not a finite number")
    return float(value)


def _refuse(path: str, value: object) -> NoReturn:
    refuse(path, f"must be a map of two numbers (lines: {{alpha: 0.2, beta: 0.8}}), not {shown(value)}")
