"""The registry of checkpoint formats: the ending of a file's name selects the function that opens it.

A new format is one module in this folder, or in an installed package (entry points ``streammerge.formats``). It has a
function that opens a file, decorated with `opens`, and a class of references (`streammerge.formats.refs`) if elements
are not read as stored.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import field
from functools import cache
from typing import TypeVar

from streammerge.errors import InputError, StreammergeError, printable
from streammerge.formats.refs import SourceRef
from streammerge.installed import entry_points
from streammerge.io.stamp import FileStamp
from streammerge.records import dataclass


@dataclass(frozen=True)
class Contents:
    """The content of one file of a model, found without reading tensors."""

    refs: Mapping[str, SourceRef]
    """The tensors by name, in the order of their bytes."""
    stamp: FileStamp
    left_out: tuple[str, ...] = field(default=())
    """Names of entries that are not weights: the state of an optimizer, numbers, settings."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    """Metadata strings in the file."""
    more_stamps: tuple[FileStamp, ...] = ()
    """Stamps of the other files that hold its tensors."""


Open = Callable[["str | os.PathLike[str]"], Contents]
"""Function that opens a file; raises ModelError with the file's name if it is malformed."""
_OPENERS: dict[str, Open] = {}
_STORES = "zarr_"
"""Prefix of modules that read companions of a model rather than models; they need numpy."""
_Function = TypeVar("_Function", bound=Open)


def opens(*suffixes: str) -> Callable[[_Function], _Function]:
    """Register the function that opens files whose names end in one of these suffixes (``.safetensors``)."""

    def register(function: _Function) -> _Function:
        _OPENERS.update(dict.fromkeys(suffixes, function))
        return function

    return register


def suffixes() -> tuple[str, ...]:
    """Return the name endings of all files that can be opened."""
    _load()
    return tuple(_OPENERS)


def open_file(path: str | os.PathLike[str]) -> Contents:
    """Open one file of a model; its name ends in one of `suffixes()`.

    Raises
    ------
    ModelError
        If it is malformed.
    WorldError
        If the machine cannot read it.
    """
    _load()
    name = os.path.basename(os.fspath(path))
    suffix = max((suffix for suffix in _OPENERS if name.endswith(suffix)), key=len)
    return _OPENERS[suffix](path)


@cache
def _load() -> None:
    """Import the modules of this folder except those of stores, and the formats of installed packages."""
    package = __name__.rpartition(".")[0]
    folder = importlib.import_module(package).__path__
    for name in sorted(module.name for module in pkgutil.iter_modules(folder)):
        if not name.startswith(_STORES):
            importlib.import_module(f"{package}.{name}")
    for point in entry_points("streammerge.formats"):
        try:
            point.load()
        except StreammergeError:
            raise
        except Exception as error:
            raise InputError(
                f"installed format {point.name!r} ({point.value}) cannot be imported: {printable(error)}"
            ) from error
