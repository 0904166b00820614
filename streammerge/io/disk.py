"""How much room there is where an output is to lie, and how much it takes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from streammerge.io.durable import PARTIAL

Paths = Callable[[str], Iterable[Path]]
"""Returns the paths that a file of an output may have, by its name."""
_BLOCK = 512
"""Bytes; the unit of ``st_blocks``."""


@dataclass(frozen=True)
class Space:
    """The room for an output."""

    place: Path
    """The directory whose file system was looked at: OUT, or the nearest above it that exists."""
    needed: int
    """Bytes of the files that are yet to be allocated."""
    free: int
    """Bytes that this user may still write."""

    @property
    def fits(self) -> bool:
        """Whether the one is no more than the other."""
        return self.needed <= self.free


def space_for(out: Path, sizes: Mapping[str, int], paths: Paths | None = None) -> Space:
    """Look at the file system of an output; what an earlier run has allocated is not needed again.

    Parameters
    ----------
    sizes
        Bytes of each file of the output, by its name.
    paths
        Returns the paths that a file may have while the merge runs, by its name; default: those in a directory `out`.

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
