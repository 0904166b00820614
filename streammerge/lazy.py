"""Packages that import their public names on first access (PEP 562), so that a command's help is fast."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def importer(package: str, homes: Mapping[str, Sequence[str]]) -> Callable[[str], Any]:
    """Return the `__getattr__` of a package.

    Parameters
    ----------
    package
        Its name.
    homes
        The public names that each module has, by its name below ``streammerge``.
    """

    def import_it(name: str) -> Any:
        home = next((home for home, names in homes.items() if name in names), None)
        if home is None:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"streammerge.{home}"), name)
        setattr(sys.modules[package], name, value)
        return value

    return import_it
