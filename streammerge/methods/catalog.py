"""Fill the registry: methods of installed packages, and methods of a user's file. The built-in ones are imported on demand."""

from __future__ import annotations

import copyreg
import importlib
import importlib.util
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streammerge.errors import InputError, StreammergeError, printable
from streammerge.installed import entry_points
from streammerge.methods.declaration import DISTRIBUTIONS
from streammerge.methods.registry import Method, all_methods, get_method
from streammerge.methods.sources import digest, imported_files, source_file

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

_FILES = "user_methods_"
"""Prefix of the module names that users' files are imported under."""
_IMPORTED: dict[str, tuple[Path, str]] = {}
"""Modules imported by users' files, each with its file and the file's content at import."""


def load_builtin() -> None:
    """Register the methods that installed packages provide through the entry point `streammerge.methods`."""
    for point in _entry_points():
        try:
            point.load()
        except StreammergeError:
            raise
        except Exception as error:
            raise InputError(
                f"cannot import the installed methods {point.name!r} ({point.value}): {printable(error)}"
            ) from error
        DISTRIBUTIONS[point.module.partition(".")[0]] = _installed(point)


@cache
def _entry_points() -> tuple[EntryPoint, ...]:
    """Return the entry points, found once in a process: the search reads the metadata of every installed package."""
    return entry_points("streammerge.methods")


def _installed(point: EntryPoint) -> str:
    """Return the name, the version and a digest of the file list of the distribution that provides an entry point."""
    if point.dist is None:
        return ""
    files = point.dist.read_text("RECORD") or ""
    return f"{point.dist.name} {point.dist.version} {digest(files.encode())}"


def load_file(path: Path) -> None:
    """Run a user's Python file, which registers the methods it decorates. It may import modules from its own directory."""
    spec = importlib.util.spec_from_file_location(f"{_FILES}{path.stem}", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise InputError(f"{printable(path)}: not a Python file with merge methods")
    beside = str(path.resolve().parent)
    if beside not in sys.path:
        sys.path.append(beside)  # last, so that the user's modules shadow no installed one
    _forget_changed()
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except StreammergeError:
        raise
    except Exception as error:
        raise InputError(f"{printable(path)}: {type(error).__name__}: {printable(error)}") from error
    for method in all_methods().values():
        if method.function.__module__ == module.__name__:
            files = imported_files(method.function)
            _IMPORTED.update({name: (file, digest(file.read_bytes())) for name, file in files.items()})


def _forget_changed() -> None:
    """Drop edited modules of users' files from `sys.modules`, so that the next import runs the code on disk."""
    held = list(_IMPORTED.values())
    if any(not file.is_file() or digest(file.read_bytes()) != before for file, before in held):
        for name in _IMPORTED:  # all: they may import names from each other
            sys.modules.pop(name, None)
        _IMPORTED.clear()
    importlib.invalidate_caches()


def _reduce(method: Method) -> tuple[Any, ...]:
    """Pickle a built-in method by name; a user's by name, file or module, and the digests of its code."""
    if method.origin == "built in":
        return restore, (method.name, None, "", {})
    path = source_file(method.function)
    where = None if path is None else str(path)
    return restore, (method.name, where, method.function.__module__, method.identity)


def restore(name: str, path: str | None, module: str, identity: Mapping[str, str]) -> Method:
    """Return the method of a pickled plan; load its file or module first.

    Raises
    ------
    InputError
        If it cannot be loaded, or its code has changed.
    """
    if not identity:
        return get_method(name)
    if name not in all_methods() or get_method(name).identity != identity:
        if path is None:
            raise InputError(
                f"method {printable(name)!r} is not defined in a file: define it in a Python file and load that file"
            )
        if module.startswith(_FILES):
            load_file(Path(path))
        else:
            importlib.import_module(module)
    method = get_method(name)
    now = method.identity
    if changed := sorted(key for key in {*now, *identity} if now.get(key) != identity.get(key)):
        raise InputError(
            f"method {printable(name)!r} has changed since the plan was made ({printable(', '.join(changed))}): plan again"
        )
    return method


copyreg.pickle(Method, _reduce)
