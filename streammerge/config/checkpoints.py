"""The key `checkpoints`: the checkpoints to average, and the schedule."""

from __future__ import annotations

from dataclasses import field

from streammerge.config.references import parse_text
from streammerge.config.schedules import Schedule, parse_schedule
from streammerge.config.wording import check_keys, child, refuse, shown
from streammerge.records import dataclass

_KEYS = ("directory", "pattern", "last", "schedule", "strip")
_METHOD = "linear"


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of a training run, to be averaged. They are found when the merge is planned."""

    places: tuple[str, ...]
    """A directory of checkpoints; or several of these, and of models."""
    pattern: str | None = None
    """A shell pattern of the checkpoints' names; None: all checkpoints."""
    last: int | None = None
    """Number of newest checkpoints to use; None: all."""
    schedule: Schedule = field(default=Schedule())
    strip: str = ""
    """The prefix that is taken off the names of the tensors of each."""
    path: str = ""
    """Its place in the config, for messages."""


@dataclass(frozen=True)
class Averaged:
    """One checkpoint and its coefficient in the average."""

    reference: str
    coefficient: float
    """The coefficient; a checkpoint with 0 is not read."""


def parse_checkpoints(data: dict[str, object], top: str) -> Checkpoints | None:
    """Return the value of the key; None without it.

    Raises
    ------
    ConfigError
        If it is malformed, or the config has keys that an average cannot have.
    """
    value = data.get("checkpoints")
    if value is None:
        return None
    path = child(top, "checkpoints")
    if data.get("merge_method") != _METHOD:
        refuse(path, f"checkpoints are averaged: merge_method: {_METHOD}, and the schedule gives the weights")
    for key in ("base_model", "parameters"):
        if data.get(key) is not None:
            refuse(child(top, key), "an average of `checkpoints` has none: the schedule gives the weights")
    if not isinstance(value, dict):
        refuse(path, f"must be a map (directory: …), not {shown(value)}")
    check_keys(value, path, _KEYS)
    pattern, last = value.get("pattern"), value.get("last")
    if last is not None and (type(last) is not int or last < 1):
        refuse(child(path, "last"), f"must be a whole number of at least 1, not {shown(last)}")
    return Checkpoints(
        places=_places(value.get("directory"), child(path, "directory")),
        pattern=None if pattern is None else parse_text(pattern, child(path, "pattern")),
        last=last,
        schedule=parse_schedule(value.get("schedule", "sma"), child(path, "schedule")),
        strip=parse_text(value["strip"], child(path, "strip")) if "strip" in value else "",
        path=path,
    )


def _places(value: object, path: str) -> tuple[str, ...]:
    if value is None:
        refuse(path, "is missing (the directory of the checkpoints)")
    if not isinstance(value, list):
        return (parse_text(value, path),)
    if not value:
        refuse(path, "is an empty list")
    return tuple(parse_text(item, f"{path}[{i}]") for i, item in enumerate(value))
