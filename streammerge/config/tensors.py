"""The key `tensors`: which tensors are merged if the models do not all have the same ones."""

from __future__ import annotations

from typing import Literal, get_args

from streammerge.config.wording import meant, refuse, shown

Tensors = Literal["same", "common", "any"]
"""`same`: all models must have the same tensors; `common`: those that all have; `any`: each over the models with it."""


def parse_tensors(value: object, path: str, *, whole: bool) -> Tensors:
    """Return the value of the key.

    Parameters
    ----------
    whole
        Whether whole models are merged, not slices or modules.

    Raises
    ------
    ConfigError
        If it is not one of the values, or cannot be used for slices or modules.
    """
    found: Tensors | None = next((known for known in get_args(Tensors) if known == value), None)
    if found is None:
        hint = meant(value, get_args(Tensors)) if isinstance(value, str) else ""
        refuse(path, f"{shown(value)} is none of {', '.join(get_args(Tensors))}{hint}")
    if found != "same" and not whole:
        refuse(
            path,
            f"{shown(value)} goes with whole models: list them under 'models', without slices and modules",
        )
    return found
