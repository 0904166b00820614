"""Find the files that a user's method consists of: its own, and every local module it imports, directly or not.

A module is local if it belongs neither to Python nor to an installed package; for a method of an installed package, the
package itself is local too. The digests of these files are recorded, since a merge may only be resumed by the code that
began it.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

_INSTALLED = frozenset({"site-packages", "dist-packages"})


def digest(data: bytes) -> str:
    """Return the digest of a file's content."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def own_digest(function: Callable[..., Any]) -> str:
    """Return the digest of a function's file; without a file, as in a notebook, that of its source text or bytecode."""
    source = source_file(function)
    if source is not None:
        return digest(source.read_bytes())
    try:
        return digest(inspect.getsource(function).encode())
    except (OSError, TypeError):
        code = function.__code__
        return digest(repr((code.co_code, code.co_names, code.co_consts)).encode())


def source_file(function: Callable[..., Any]) -> Path | None:
    """Return the file that defines a function, or None."""
    try:
        found = inspect.getsourcefile(function)
    except TypeError:
        return None
    path = None if found is None else Path(found)
    return path if path is not None and path.is_file() else None


def imported_files(function: Callable[..., Any]) -> dict[str, Path]:
    """Return the local modules that a function's file imports, directly or not, each with its file."""
    source = source_file(function)
    if source is None:
        return {}
    top = function.__module__.partition(".")[0]
    found: dict[str, Path] = {}
    waiting = [(function.__module__, source)]
    while waiting:
        module, path = waiting.pop()
        for name in _imports(path, module):
            file = _file_of(name)
            if file is None or name in found or file == source or not _is_local(name, file, top):
                continue
            found[name] = file
            if file.suffix == ".py":
                waiting.append((name, file))
    return dict(sorted(found.items()))


def _imports(path: Path, module: str) -> Iterator[str]:
    """Yield the names of all modules that a file may import, also inside functions, and of their parent packages."""
    try:
        tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            names = [source, *(f"{source}.{alias.name}" for alias in node.names)]
        else:
            continue
        for name in names:
            parts = name.split(".")
            yield from (".".join(parts[: n + 1]) for n in range(len(parts)))


def _file_of(name: str) -> Path | None:
    """Return the file of a module without importing it."""
    known = sys.modules.get(name)
    origin = getattr(known, "__file__", None)
    parent = name.rpartition(".")[0]
    if known is None and name and (not parent or parent in sys.modules):
        try:
            spec = importlib.util.find_spec(name)
        except (ImportError, ValueError, AttributeError):
            return None
        origin = None if spec is None or not spec.has_location else spec.origin
    return Path(origin) if origin and Path(origin).is_file() else None


def _is_local(name: str, file: Path, top: str) -> bool:
    first = name.partition(".")[0]
    if first in sys.stdlib_module_names or first == "streammerge":
        return False
    return first == top or not _INSTALLED & set(file.parts)
