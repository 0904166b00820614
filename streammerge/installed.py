"""Entry points and versions of installed packages, by the names of files alone where these suffice.

`importlib.metadata` takes as long to import as fifty modules of ours, and reads a file of every installed package for each
question.
"""

from __future__ import annotations

import os
import sys
from functools import cache
from importlib.machinery import PathFinder
from typing import TYPE_CHECKING

from streammerge.lazy import late_pattern

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

_INFO = late_pattern(r"(.+?)-(\d[^-]*)\.dist-info")
_ENDINGS = (".dist-info", ".egg-info")


def entry_points(group: str) -> tuple[EntryPoint, ...]:
    """Return the entry points of a group, as `importlib.metadata.entry_points` does."""
    if f"[{group}]".encode() not in _entry_point_files(tuple(sys.path)) and _only_folders():
        return ()
    from importlib import metadata

    return tuple(metadata.entry_points(group=group))


def version(package: str) -> str | None:
    """Return the version of an installed package, None if it is not installed."""
    known = _versions(tuple(sys.path))
    if package in known:
        return known[package]
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _only_folders() -> bool:
    """Return whether packages are found in folders alone: no archives, no eggs, no finders of others."""
    finders = [one for one in sys.meta_path if hasattr(one, "find_distributions")]
    return finders in ([PathFinder], []) and not any(
        place.endswith(".egg") or os.path.isfile(place) for place in sys.path
    )


@cache
def _infos(places: tuple[str, ...]) -> list[str]:
    """Return the paths of what tells of the packages in some folders, in the order of the folders."""
    found = []
    for place in places:
        try:
            names = os.listdir(place or ".")
        except OSError:
            continue
        found += [os.path.join(place, name) for name in names if name.endswith(_ENDINGS)]
    return found


@cache
def _entry_point_files(places: tuple[str, ...]) -> bytes:
    """Return the files of entry points of all packages, one behind the other."""
    found = []
    for info in _infos(places):
        try:
            with open(os.path.join(info, "entry_points.txt"), "rb") as file:
                found.append(file.read())
        except OSError:
            continue
    return b"\n".join(found)


@cache
def _versions(places: tuple[str, ...]) -> dict[str, str]:
    """Return the versions of the packages whose folders are named after them, each by its first folder."""
    named: dict[str, str] = {}
    for info in _infos(places):
        match = _INFO.fullmatch(os.path.basename(info))
        if match is not None:
            named.setdefault(match[1].lower(), match[2])
    return named
