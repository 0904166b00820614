"""Public names of a package (PEP 562), modules that few commands need and regular expressions wait for their first use,
so that a command starts fast."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, AnyStr, cast


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


def late_module(name: str) -> Any:
    """Return what stands for a module and imports it when it is first asked for a name.

    For a type checker and the law of layers the module is imported as usual, under ``if TYPE_CHECKING``.
    """
    return _LateModule(name)


class _LateModule:
    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module(self._name), name)


def late_pattern(expression: AnyStr, flags: int = 0) -> re.Pattern[AnyStr]:
    """Return a regular expression that is compiled when it is first used: most commands need few of those they import.

    >>> late_pattern(r"[a-z]+").fullmatch("word") is not None
    True
    """
    return cast("re.Pattern[AnyStr]", _LatePattern(expression, flags))


class _LatePattern:
    """Has the attributes of the compiled expression, and remembers those that were asked for."""

    def __init__(self, expression: Any, flags: int) -> None:
        self._given = expression, flags

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = getattr(re.compile(*self._given), name)
        setattr(self, name, value)
        return value
