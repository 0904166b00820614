"""The free space for an output, and the space that it needs; and how much of the inputs is in memory already."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from streammerge.io.direct import cached_share
from streammerge.io.durable import PARTIAL
from streammerge.records import dataclass

Paths = Callable[[str], Iterable[Path]]
"""Function that returns the possible paths of an output's file, given its name."""
_BLOCK = 512
"""Bytes; the unit of ``st_blocks``."""


@dataclass(frozen=True)
class Space:
    """The free and the needed space of an output."""

    place: Path
    """The directory whose file system was checked: OUT, or its closest existing parent."""
    needed: int
    """Bytes of the files that are not allocated yet."""
    free: int
    """Bytes that this user can still write."""

    @property
    def fits(self) -> bool:
        """Whether the needed space is free."""
        return self.needed <= self.free


def space_for(out: Path, sizes: Mapping[str, int], paths: Paths | None = None) -> Space:
    """Return the free and the needed space of an output; files allocated by an earlier run need none.

    Parameters
    ----------
    sizes
        Bytes of each file of the output, by its name.
    paths
        Function that returns the possible paths of a file during the merge; default: those in a directory `out`.

    Raises
    ------
    OSError
        If the file system does not answer.
    """
    place = out.absolute()
    while not place.is_dir() and place != place.parent:
        place = place.parent
    status = os.statvfs(place)
    held = 0
    for name, nbytes in sizes.items():
        found = paths(name) if paths is not None else (out / name, out / f"{name}{PARTIAL}")
        held += max(min(_allocated(path), nbytes) for path in found)
    return Space(place, sum(sizes.values()) - held, status.f_bavail * status.f_frsize)


def _allocated(path: Path) -> int:
    try:
        return path.stat().st_blocks * _BLOCK
    except OSError:
        return 0


_SAMPLED, _WINDOWS, _FILES = 16 << 20, 4, 32
"""Bytes of a window that is looked at, windows of a file, and files."""


def cached_share_of(paths: Sequence[str]) -> float:
    """Return the fraction of some files that is in the page cache, from a sample; nothing is read.

    A file that cannot be opened counts as not cached; its reader will say why.
    """
    shares = [_cached_share(path) for path in paths[:: -(-len(paths) // _FILES) or 1]]
    total = sum(size for size, _ in shares)
    return sum(size * share for size, share in shares) / total if total else 0.0


def _cached_share(path: str) -> tuple[int, float]:
    """Return the size of a file in bytes, and the fraction of it that is cached."""
    try:
        with open(path, "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            if not size:
                return 0, 0.0
            window = min(size, _SAMPLED)
            starts = sorted({(size - window) * i // (_WINDOWS - 1) for i in range(_WINDOWS)})
            found = [cached_share(file.fileno(), start, window) for start in starts]
            return size, sum(found) / len(found)
    except OSError:
        return 0, 0.0
