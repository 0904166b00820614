"""Fills the registry: the methods that ship, those of installed packages, and those of a user's file.

Importing this module imports every paper in the folder `papers`, and each paper registers its methods.
"""

from __future__ import annotations

import copyreg
import importlib
import importlib.util
import pkgutil
import sys
from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from streammerge.errors import InputError, StreammergeError, printable
from streammerge.methods import papers
from streammerge.methods.registry import DISTRIBUTIONS, Method, all_methods, get_method
from streammerge.methods.sources import digest, imported_files, source_file

_FILES = "user_methods_"
"""Begins the module names of users' files."""
_IMPORTED: dict[str, tuple[Path, str]] = {}
"""The modules that users' files have imported, each with its file and what it held then."""

for _paper in sorted(found.name for found in pkgutil.iter_modules(papers.__path__, f"{papers.__name__}.")):
    importlib.import_module(_paper)


def load_builtin() -> None:
    """Register the methods that installed packages add to those that ship."""
    for point in entry_points(group="streammerge.methods"):
        try:
            point.load()
        except StreammergeError:
            raise
        except Exception as error:
            raise InputError(
                f"cannot import the installed methods {point.name!r} ({point.value}): {printable(error)}"
            ) from error
        DISTRIBUTIONS[point.module.partition(".")[0]] = _installed(point)


def _installed(point: EntryPoint) -> str:
    """Return what identifies the distribution that an entry point comes from: its version, and its list of files."""
    if point.dist is None:
        return ""
    files = point.dist.read_text("RECORD") or ""
    return f"{point.dist.name} {point.dist.version} {digest(files.encode())}"


def load_file(path: Path) -> None:
    """Run a user's Python file so that the methods it decorates are registered; it may import modules from beside it."""
    spec = importlib.util.spec_from_file_location(f"{_FILES}{path.stem}", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise InputError(f"{printable(path)}: not a Python file with merge methods")
    beside = str(path.resolve().parent)
    if beside not in sys.path:
        sys.path.append(beside)  # last, so that nothing is hidden by a module of the user's
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
    """Have modules that were edited since a user's file imported them imported anew: a method is what its files say."""
    held = list(_IMPORTED.values())
    if any(not file.is_file() or digest(file.read_bytes()) != before for file, before in held):
        for name in _IMPORTED:  # all: one may have taken names from another
            sys.modules.pop(name, None)
        _IMPORTED.clear()
    importlib.invalidate_caches()


def _reduce(method: Method) -> tuple[Any, ...]:
    """Pickle a method by name; a user's by its file or module too, and by what its code must be there."""
    if method.origin == "built in":
        return restore, (method.name, None, "", {})
    path = source_file(method.function)
    where = None if path is None else str(path)
    return restore, (method.name, where, method.function.__module__, method.identity)


def restore(name: str, path: str | None, module: str, identity: Mapping[str, str]) -> Method:
    """Return the method of a pickled plan, after loading where it comes from.

    Raises
    ------
    InputError
        If it cannot be had, or is not what it was.
    """
    if not identity:
        return get_method(name)
    if name not in all_methods() or get_method(name).identity != identity:
        if path is None:
            raise InputError(
                f"method {printable(name)!r} has no file to load it from: write it in one, and pass that file"
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
