"""The small files beside a model's weights: which there are, and which of them an output gets.

Nothing is read but small settings that name other files. Links are followed to where the model's own files lie: inside
of its folder, or among the blobs of a Hugging Face cache. A stranger's link to anything else would carry a file of this
machine into an output that is made to be published.
"""

from __future__ import annotations

import errno
import json
import os
import re
import stat
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from streammerge.checkpoint.sidecar_names import (
    DEEPEST,
    is_left_behind,
    is_left_folder,
    is_replaced,
    is_sound_name,
    is_sound_path,
    is_tokenizer_file,
    is_weights,
)
from streammerge.errors import ModelError, StreammergeError, WorldError, printable
from streammerge.io.files import read_exactly, reading
from streammerge.io.stamp import FileStamp
from streammerge.units import format_size

MODULES = "modules.json"
LARGEST = 1 << 28
"""Most bytes of a file that is copied."""
MOST_BYTES = 1 << 30
"""Of all files that are copied, together."""
MOST_FILES = 1000
_MOST_SETTINGS = 1 << 20
"""Most bytes of a file of settings that is looked into."""
_BLOB = re.compile(r"[0-9a-f]{40,64}", re.ASCII)
_NAMED_BY = re.compile(r"tokenizer_config\.json|.*processor_config\.json", re.ASCII)
"""Settings that name files."""


@dataclass
class Beside:
    """What lies beside the weights of a model."""

    files: dict[str, FileStamp] = field(default_factory=dict)
    """What an output gets, by its path in the folder, sorted."""
    left: list[str] = field(default_factory=list)
    """What it does not get: names, with the reason where that is not plain."""
    modules: list[str] = field(default_factory=list)
    """Folders of the model's own modules whose weights are among the files."""


def survey(directory: Path, own: Collection[str], *, whole: bool, merged: Collection[str] = ()) -> Beside:
    """Look through a model's folder.

    Parameters
    ----------
    own
        Names of the files that the model itself is read from.
    whole
        Whether the folder is that of the model; False: the model is one file of many, and only tokenizer and
        settings that lie beside it are taken to be its own.
    merged
        Folders whose weights are merged: of them all other files are taken.

    Raises
    ------
    WorldError
        If the machine cannot look.
    """
    found = Beside()
    named = _named_files(directory)
    modules = module_folders(directory) if whole else ()
    for name in sorted(_names(directory)):
        if name in own or is_replaced(name):
            continue
        if not whole and not (is_tokenizer_file(name) or _is_json(name)):
            continue
        if not is_sound_name(name):
            found.left.append(f"{printable(name, 60)} (its name)")
        elif os.path.isdir(directory / name):
            if whole:
                _take_folder(found, directory, name, is_module=name in (*modules, *merged), merged=merged)
        elif is_left_behind(name) and name not in named:
            if whole and not _is_index_of(name, own):
                found.left.append(name)
        else:
            _take(found, directory, name)
    return found


def module_folders(directory: Path) -> tuple[str, ...]:
    """Return the folders that a model's ``modules.json`` (of sentence-transformers) names, but for its own."""
    entries = _settings(directory / MODULES)
    paths = (
        [entry.get("path") for entry in entries if isinstance(entry, dict)]
        if isinstance(entries, list)
        else []
    )
    return tuple(
        dict.fromkeys(path for path in paths if isinstance(path, str) and path and is_sound_path(path))
    )


def read_small(directory: Path, name: str, most: int = _MOST_SETTINGS) -> bytes:
    """Return the beginning of a small file in a model's folder; nothing where there is none that may be read."""
    try:
        if not leads_inside(directory, directory / name):
            return b""
        with reading(str(directory / name)) as (descriptor, status):
            return read_exactly(descriptor, min(status.st_size, most), 0, name)
    except (OSError, ModelError, WorldError):
        return b""


def leads_inside(directory: Path, path: Path) -> bool:
    """Return whether a path, links followed, ends in the model's folder or among the blobs of a hub's cache.

    Raises
    ------
    OSError
        If it cannot be followed.
    """
    target, home = path.resolve(strict=True), directory.resolve()
    if target.is_relative_to(home):
        return True
    repository = target.parent.parent.name
    return (
        target.parent.name == "blobs"
        and repository.startswith("models--")
        and _BLOB.fullmatch(target.name) is not None
    )


def _names(directory: Path) -> list[str]:
    try:
        return os.listdir(directory)
    except OSError as error:
        raise unreadable(directory, error) from error


def _is_json(name: str) -> bool:
    return name.endswith("config.json")


def _is_index_of(name: str, own: Collection[str]) -> bool:
    """Return whether a file is the index of the very files that the model is read from."""
    stem = name.partition(".")[0]
    return name.endswith(".index.json") and any(one.startswith(stem) for one in own)


def _named_files(directory: Path) -> frozenset[str]:
    """Return the names of files that the settings of tokenizer and processors speak of, whatever they look like."""
    found = set()
    for name in _names(directory):
        if _NAMED_BY.fullmatch(name):
            settings = _settings(directory / name)
            items: Mapping[str, Any] = settings if isinstance(settings, dict) else {}
            found |= {
                value for key, value in items.items() if key.endswith("_file") and isinstance(value, str)
            }
    return frozenset(found)


def _settings(path: Path) -> Any:
    """Return what a small JSON file says; None where it says nothing that can be read."""
    try:
        return json.loads(read_small(path.parent, path.name))
    except StreammergeError:
        raise
    except (ValueError, RecursionError):
        return None


def _take_folder(
    found: Beside, directory: Path, name: str, *, is_module: bool, merged: Collection[str]
) -> None:
    """Take all of a folder but weights that are merged; nothing where it holds others or cannot be what a loader needs."""
    if is_left_folder(name) and not is_module:
        found.left.append(f"{name}/")
        return
    paths = [path for path in _walk(directory, name) if not _is_merged(path, merged)]
    if len(paths) > MOST_FILES:
        found.left.append(f"{name}/ (more than {MOST_FILES} files)")
    elif not is_module and any(is_weights(os.path.basename(path)) for path in paths):
        found.left.append(f"{name}/ (weights)")
    else:
        for path in paths:
            _take(found, directory, path)
        found.modules += [name] if any(map(is_weights, paths)) else []


def _is_merged(path: str, merged: Collection[str]) -> bool:
    """Return whether a file holds weights of a folder whose weights are merged, or is their index."""
    folder, _, name = path.rpartition("/")
    return folder in merged and is_weights(name)


def _walk(directory: Path, name: str) -> Iterator[str]:
    """Yield the paths of a folder's files, hidden ones aside, no deeper and no more than is bearable."""
    waiting, count = [name], 0
    while waiting and count <= MOST_FILES:
        folder = waiting.pop()
        for entry in sorted(_names(directory / folder)):
            path = f"{folder}/{entry}"
            count += 1
            if entry.startswith(".") or count > MOST_FILES + 1:
                continue
            if os.path.isdir(directory / path) and not os.path.islink(directory / path):
                waiting += [path] if path.count("/") < DEEPEST - 1 else []
            else:
                yield path


def _take(found: Beside, directory: Path, name: str) -> None:
    """Add a file, unless it is none, is too large, or lies elsewhere."""
    path = directory / name
    try:
        status = os.stat(path)
        inside = leads_inside(directory, path)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            raise unreadable(path, error) from error
        found.left.append(f"{printable(name, 60)} (a link that leads nowhere)")
        return
    total = sum(stamp.nbytes for stamp in found.files.values())
    why = ""
    if not is_sound_path(name):
        why = "its name"
    elif not stat.S_ISREG(status.st_mode):
        why = "not a regular file"
    elif not inside:
        why = "a link that leads out of the folder"
    elif status.st_size > LARGEST:
        why = format_size(status.st_size)
    elif len(found.files) >= MOST_FILES or total + status.st_size > MOST_BYTES:
        why = "too much beside it"
    if why:
        found.left.append(f"{printable(name, 60)} ({why})")
    else:
        found.files[name] = FileStamp.of(path, status)


def unreadable(path: object, error: OSError) -> WorldError:
    """Return the failure to look at something beside the weights."""
    return WorldError(
        f"{printable(path)}: cannot be read: {error.strerror or error}; make it readable, or remove it, and run the "
        "same command again"
    )
