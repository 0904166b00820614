"""Resolve a reference to a path, or to a snapshot in the Hugging Face cache."""

from __future__ import annotations

import os
from pathlib import Path

from streammerge.checkpoint.hub import cache_directory, find_snapshot, parse_name
from streammerge.errors import ModelError, NotDownloadedError
from streammerge.formats.registry import suffixes
from streammerge.io import volumes
from streammerge.io.files import bad, from_os, meant, place, quoted
from streammerge.io.volumes import as_path, is_url


def locate(reference: str) -> Path:
    """Return the existing path of a reference without an adapter: a local path, or a cached snapshot.

    Raises
    ------
    ModelError
        If there is no such path.
    """
    return locate_in(reference, cache_directory())


def locate_in(reference: str, cache: Path) -> Path:
    """Return the existing path of `reference`: a local path, or a cached snapshot."""
    if not reference:
        raise ModelError("the path of a model is empty")
    if is_url(reference):
        if not exists(reference):
            raise bad(reference, "nothing lies there: correct the URL")
        return as_path(reference)
    for text in (reference, os.path.expanduser(reference)):
        if exists(text):
            return Path(text)
    guess = meant(reference)
    if reference.endswith(suffixes()):
        raise bad(reference, f"no such file{guess}")
    name = parse_name(reference)
    snapshot = None if name is None else find_snapshot(name, cache)
    if snapshot is not None:
        return snapshot
    path, _, revision = reference.rpartition("@")
    if path and revision and any(exists(text) for text in (path, os.path.expanduser(path))):
        raise bad(path, f"a local directory has no revision {quoted(revision)}: leave the revision out")
    if name is None:
        raise bad(reference, f"no such directory{guess}")
    where = f"the Hugging Face cache {place(str(cache))}"
    what = f"no such directory{guess}, and no model of that name in {where}; if it is a hub name, {name.cure}"
    raise NotDownloadedError(str(bad(reference, what)), reference, where, name.command)


def exists(path: str) -> bool:
    """Return whether the path exists; a broken link or a forbidden directory is an error, not False."""
    if is_url(path):
        return volumes.exists(path)
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        if os.path.islink(path):
            raise from_os(path, error) from error
        return False
    except ValueError:  # A NUL or a lone surrogate, which no path can hold.
        return False
    except OSError as error:
        raise from_os(path, error) from error
    return True
