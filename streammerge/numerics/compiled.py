"""The cache of compiled kernels: its directory, its content, and whether kernels can be used at all.

This module does not import numba's compiler, so a plan stays fast; only a merge that needs a kernel imports it.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from streammerge.installed import version
from streammerge.records import dataclass

_PACKAGE = Path(__file__).parent.parent
_SOURCES = (
    "kernels/*.py",
    "numerics/bits.py",
    "numerics/decoding.py",
    "numerics/elementary.py",
    "numerics/encoding_loops.py",
    "numerics/exporting.py",
    "numerics/finite.py",
    "numerics/jit.py",
    "numerics/products.py",
    "numerics/ready.py",
    "numerics/unpacking.py",
    "numerics/wide.py",
)
"""The kernels' files, those whose constants are compiled into the kernels, and those that write and load their code."""
_MARK = ".compiled"
_PROBE = b"\0" * (1 << 16)
"""Content of the probe file: a full disk accepts an empty file, but no content."""


NOWHERE = "no cache directory is writable ({}); set XDG_CACHE_HOME to a writable directory"


@dataclass(frozen=True)
class Cache:
    """The directory of the compiled kernels."""

    directory: Path | None
    """None: no directory is writable."""
    refused: tuple[str, ...] = ()
    """The preferred directories that were refused, each with the reason."""


@cache
def missing_kernels() -> str | None:
    """Return why the kernels cannot be used, in one line; None if they can.

    numba may be missing, or may reject a newer numpy. Everything works without it, through torch.
    """
    try:
        import numba  # noqa: F401
    except ImportError as error:
        return (str(error) or "numba cannot be imported").splitlines()[0]
    return None


def unusable_kernels(names: Iterable[str]) -> str | None:
    """Return why some groups of kernels cannot be used, in one line; None if they can.

    numba takes longer to import than a plan takes, so it is imported only for groups that are not compiled yet: the others
    were compiled by the same versions of numba and numpy, which therefore suit each other.
    """
    if not _has_numba():
        return "No module named 'numba'"
    return missing_kernels() if lacking(names) else None


@cache
def _has_numba() -> bool:
    return find_spec("numba") is not None


@cache
def kernel_cache() -> Cache:
    """Return the first writable directory among those the environment names, the home and the temporary directory.

    Kernels are code, so a directory that other users may write to is refused.
    """
    refused: list[str] = []
    passed: list[Path] = []
    name = f"kernels-{_digest()}"
    for root, private in _roots():
        directory = root / name
        try:
            _prepare(directory, private)
        except OSError as error:
            refused.append(f"{root}: {error.strerror or error}")
            passed.append(directory)
        else:
            _adopt(passed, directory)
            return Cache(directory, tuple(refused))
    return Cache(None, tuple(refused))


def _adopt(places: Sequence[Path], directory: Path) -> None:
    """Copy kernels compiled in advance (in a container image, say) from read-only places, which numba does not read."""
    for place in places:
        with suppress(OSError):
            owner = place.stat()
            if owner.st_uid not in (0, os.geteuid()) or owner.st_mode & 0o022 or any(directory.iterdir()):
                continue
            with tempfile.TemporaryDirectory(dir=directory.parent) as scratch:
                shutil.copytree(place, Path(scratch) / "kernels")
                os.rename(
                    Path(scratch) / "kernels", directory
                )  # atomic; fails if a different process was faster


def _roots() -> Iterator[tuple[Path, bool]]:
    """Yield the candidate directories, and for each whether other users must not even read it."""
    if given := os.environ.get("NUMBA_CACHE_DIR"):
        yield Path(given) / "streammerge", False
    xdg = Path(os.environ.get("XDG_CACHE_HOME") or "")
    with suppress(RuntimeError):  # a user without a home
        yield (xdg if xdg.is_absolute() else Path.home() / ".cache") / "streammerge", False
    with suppress(OSError):  # no temporary directory
        yield Path(tempfile.gettempdir()) / f"streammerge-{os.geteuid()}", True


def _prepare(directory: Path, private: bool) -> None:
    """Create a directory for kernels, or check that only this user can write to it; raise OSError otherwise."""
    directory.parent.parent.mkdir(parents=True, exist_ok=True)
    directory.parent.mkdir(mode=0o700, exist_ok=True)
    directory.mkdir(mode=0o700, exist_ok=True)
    for place in (directory.parent, directory):
        found = place.lstat()
        if not stat.S_ISDIR(found.st_mode) and private:
            raise PermissionError(0, "not a directory of its own")
        owner = place.stat()
        if owner.st_uid != os.geteuid():
            raise PermissionError(0, "belongs to another user")
        if owner.st_mode & (0o077 if private and place == directory.parent else 0o002):
            raise PermissionError(0, "others may write to it")
    with tempfile.TemporaryFile(dir=directory) as probe:
        probe.write(_PROBE)
        probe.flush()


def _digest() -> str:
    """Return the digest that names the cache: of the kernels' sources, the compiler's versions, and the CPU.

    numba recompiles a cached loop when its own file changes, but not when a loop that it calls, in a different file,
    changes: after an upgrade in place it could run a mixture of old and new code. numba also detects a different CPU
    (in a home directory that machines share), but only when it recompiles, in the middle of a merge.
    """
    digest = hashlib.blake2b(digest_size=8)
    for path in _sources(_PACKAGE):
        digest.update(path.read_bytes())
    for package in ("numba", "llvmlite", "numpy"):
        digest.update((version(package) or "").encode())
    digest.update(f"{sys.implementation.cache_tag} {_cpu()}".encode())
    return digest.hexdigest()


def _sources(package: Path) -> list[Path]:
    return sorted(path for pattern in _SOURCES for path in package.glob(pattern))


def _cpu() -> str:
    """Return the CPU's model and instruction sets."""
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n", 1)[0].splitlines()
    except OSError:
        first = []
    kinds = ("model name", "flags", "Features", "CPU part")
    return platform.machine() + "".join(line for line in first if line.startswith(kinds))


@cache
def _is_marked(name: str) -> bool:
    directory = kernel_cache().directory
    return directory is not None and _mark(directory, name).exists()


def _mark(directory: Path, name: str) -> Path:
    """Return the marker file of a compiled group of kernels, for this installation of the package.

    numba files a compiled loop under the path of its source, so a second installation does not find it.
    """
    place = hashlib.blake2b(os.fsencode(_PACKAGE), digest_size=4).hexdigest()
    return directory / f"{name}-{place}{_MARK}"


def lacking(names: Iterable[str]) -> list[str]:
    """Return those groups of kernels that are not compiled yet, in alphabetical order."""
    return sorted(name for name in set(names) if not _is_marked(name))


def mark_compiled(name: str) -> None:
    """Record that a group of kernels is in the cache, if there is a cache."""
    directory = kernel_cache().directory
    if directory is not None:
        with suppress(OSError):
            _mark(directory, name).touch()
    look_again()


def look_again() -> None:
    """Forget which kernels are compiled, since a different process may have compiled more."""
    _is_marked.cache_clear()


def is_compiled(name: str) -> bool:
    """Return whether a group of kernels is usable without compiling; callers fall back to numpy or torch."""
    return _is_marked(name) and unusable_kernels((name,)) is None
