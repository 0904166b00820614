"""Where the compiled kernels are kept, which of them are there, and whether they can be used at all.

Nothing here imports numba's compiler: a plan asks, and only a merge that needs a kernel pays for it.
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
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_PACKAGE = Path(__file__).parent.parent
_SOURCES = (
    "kernels/*.py",
    "numerics/bits.py",
    "numerics/decoding.py",
    "numerics/elementary.py",
    "numerics/encoding_loops.py",
    "numerics/finite.py",
    "numerics/jit.py",
    "numerics/products.py",
)
"""The kernels, and the files whose constants are compiled into them."""
_MARK = ".compiled"
_PROBE = b"\0" * (1 << 16)
"""Written where kernels are to be kept: a disk that is full takes a file, but no content."""


NOWHERE = "there is no place to keep them ({}); set XDG_CACHE_HOME to a folder that can be written"


@dataclass(frozen=True)
class Cache:
    """Where kernels are kept."""

    directory: Path | None
    """None: nowhere that can be written."""
    refused: tuple[str, ...] = ()
    """The places before it in order of preference, each with the reason why it does not serve."""


@cache
def missing_kernels() -> str | None:
    """Return why the kernels cannot be used, in one line; None if they can.

    numba may be missing, or refuse a numpy newer than it knows. Everything works without it, through torch.
    """
    try:
        import numba  # noqa: F401
    except ImportError as error:
        return (str(error) or "numba cannot be imported").splitlines()[0]
    return None


@cache
def kernel_cache() -> Cache:
    """Return the first place that can be written, of those the environment names, the home and the temporary directory.

    Kernels are code: a place that others may write to is none.
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
    """Copy what was compiled ahead, in an image say, where it can be read but not written; numba does not read there."""
    for place in places:
        with suppress(OSError):
            owner = place.stat()
            if owner.st_uid not in (0, os.geteuid()) or owner.st_mode & 0o022 or any(directory.iterdir()):
                continue
            with tempfile.TemporaryDirectory(dir=directory.parent) as scratch:
                shutil.copytree(place, Path(scratch) / "kernels")
                os.rename(Path(scratch) / "kernels", directory)  # at once, unless another process was faster


def _roots() -> Iterator[tuple[Path, bool]]:
    """Yield where kernels may be kept, and whether nobody else may even read there."""
    if given := os.environ.get("NUMBA_CACHE_DIR"):
        yield Path(given) / "streammerge", False
    xdg = Path(os.environ.get("XDG_CACHE_HOME") or "")
    with suppress(RuntimeError):  # a user without a home
        yield (xdg if xdg.is_absolute() else Path.home() / ".cache") / "streammerge", False
    with suppress(OSError):  # no temporary directory
        yield Path(tempfile.gettempdir()) / f"streammerge-{os.geteuid()}", True


def _prepare(directory: Path, private: bool) -> None:
    """Make a directory for kernels, or see that the one there is ours alone to write to; raise OSError if it is not."""
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
    """Return what names compiled kernels: their sources, what compiled them, and the CPU.

    numba renews a cached loop when its own file changes, not when a loop it calls does, which lies in another file
    here: an upgrade in place could run half-old code. Of another CPU in a home that machines share it knows, but
    only when it compiles again, in the middle of a merge.
    """
    digest = hashlib.blake2b(digest_size=8)
    for path in _sources(_PACKAGE):
        digest.update(path.read_bytes())
    for package in ("numba", "llvmlite", "numpy"):
        with suppress(PackageNotFoundError):
            digest.update(version(package).encode())
    digest.update(f"{sys.implementation.cache_tag} {_cpu()}".encode())
    return digest.hexdigest()


def _sources(package: Path) -> list[Path]:
    return sorted(path for pattern in _SOURCES for path in package.glob(pattern))


def _cpu() -> str:
    """Return what tells kinds of CPUs apart: model and instruction sets."""
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
    """Return the file that says that a group is compiled, for the package where it lies.

    numba keeps a loop under the path of its source: another installation of the same version finds none of it.
    """
    place = hashlib.blake2b(os.fsencode(_PACKAGE), digest_size=4).hexdigest()
    return directory / f"{name}-{place}{_MARK}"


def lacking(names: Iterable[str]) -> list[str]:
    """Return those groups of kernels that are not compiled yet, in alphabetical order."""
    return sorted(name for name in set(names) if not _is_marked(name))


def mark_compiled(name: str) -> None:
    """Take down that a group of kernels lies in the cache, if there is one."""
    directory = kernel_cache().directory
    if directory is not None:
        with suppress(OSError):
            _mark(directory, name).touch()
    look_again()


def look_again() -> None:
    """Forget which kernels are compiled: another process may have compiled more."""
    _is_marked.cache_clear()


def is_compiled(name: str) -> bool:
    """Return whether a group of kernels can be used at once: where it cannot, plain numpy or torch serves as well."""
    return _is_marked(name) and missing_kernels() is None
