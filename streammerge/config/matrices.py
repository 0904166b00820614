"""The keys `matrices` and `rest`: which tensors are merged as matrices, and what all others get."""

from __future__ import annotations

from typing import Literal, get_args

from streammerge.config.values import parse_exclude
from streammerge.config.wording import child, meant, refuse, shown
from streammerge.records import dataclass

Rest = Literal["mean", "base"]
"""`mean`: the mean of the models' task vectors; `base`: no change."""


@dataclass(frozen=True)
class Matrices:
    """The tensors that a method of whole matrices decomposes."""

    pattern: str | None = None
    """Regular expression that occurs in the names of matrices; None: the two-dimensional tensors of the layers."""
    rest: Rest = "mean"
    """What all other tensors get."""
    given: tuple[str, ...] = ()
    """The places of the keys in the config, for messages; empty: the config has neither."""


def parse_matrices(data: dict[str, object], path: str) -> Matrices:
    """Return the values of both keys.

    Raises
    ------
    ConfigError
        If `matrices` is not a regular expression, or `rest` none of its values.
    """
    given = tuple(child(path, key) for key in ("matrices", "rest") if data.get(key) is not None)
    pattern, value = data.get("matrices"), data.get("rest", "mean")
    if pattern is not None:
        if not isinstance(pattern, str):
            refuse(child(path, "matrices"), f"must be a regular expression, not {shown(pattern)}")
        (pattern,) = parse_exclude([pattern], child(path, "matrices"))
    rest: Rest | None = next((known for known in get_args(Rest) if known == value), None)
    if rest is None:
        hint = meant(value, get_args(Rest)) if isinstance(value, str) else ""
        refuse(child(path, "rest"), f"{shown(value)} is none of {', '.join(get_args(Rest))}{hint}")
    return Matrices(pattern, rest, given)
