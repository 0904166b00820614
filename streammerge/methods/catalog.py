"""Fills the register: the methods that ship, those of installed packages, and a user's file."""

from __future__ import annotations

import importlib.util
from importlib.metadata import entry_points
from pathlib import Path

import streammerge.methods.builtin  # noqa: F401  (registers every method that ships)
from streammerge.errors import InputError, printable


def load_builtin() -> None:
    """Register the methods that installed packages add to those that ship."""
    for point in entry_points(group="streammerge.methods"):
        try:
            point.load()
        except Exception as error:
            raise InputError(
                f"installed methods {point.name!r} ({point.value}) cannot be imported: {printable(error)}"
            ) from error


def load_file(path: Path) -> None:
    """Run a user's Python file so that the methods it decorates are registered."""
    spec = importlib.util.spec_from_file_location(f"user_methods_{path.stem}", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise InputError(f"{printable(path)}: not a Python file with merge methods")
    try:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
    except Exception as error:
        raise InputError(f"{printable(path)}: {type(error).__name__}: {printable(error)}") from error
