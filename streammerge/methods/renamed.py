"""Old names of modules, kept for one version: each name is looked up at its new place, with a DeprecationWarning."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any


def finder(module: str, homes: Sequence[ModuleType], new: Mapping[str, str]) -> Callable[[str], Any]:
    """Return the ``__getattr__`` of a module whose names have moved to `homes`; `new` maps old names to changed ones."""

    def find(name: str) -> Any:
        now = new.get(name, name)
        home = next((home for home in homes if hasattr(home, now)), None)
        if home is None or name.startswith("_"):
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        warnings.warn(f"{module}.{name} is now {home.__name__}.{now}", DeprecationWarning, stacklevel=2)
        return getattr(home, now)

    return find
