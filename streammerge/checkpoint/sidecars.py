"""Find the small files next to a model's weights, and select those that are copied to an output.

Only small settings files that name other files are read. Links are followed only within the model's folder and to the
blobs of a Hugging Face cache. A stranger's link to anything else would copy a private file of this machine into an
output that may be published.
"""

from __future__ import annotations

import errno
import json
import os
import re
import stat
from collections.abc import Collection, Iterator, Mapping
from dataclasses import field
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
from streammerge.io import volumes
from streammerge.io.files import read_exactly, reading
from streammerge.io.stamp import FileStamp
from streammerge.lazy import late_pattern
from streammerge.records import dataclass
from streammerge.units import format_size

MODULES = "modules.json"
LARGEST = 1 << 28
"""Most bytes of a file that is copied."""
MOST_BYTES = 1 << 30
"""Most bytes of all copied files together."""
MOST_FILES = 1000
_MOST_SETTINGS = 1 << 20
"""Most bytes of a settings file that is read."""
_BLOB = late_pattern(r"[0-9a-f]{40,64}", re.ASCII)
_NAMED_BY = late_pattern(r"tokenizer_config\.json|.*processor_config\.json", re.ASCII)
"""Settings files that name other files."""
_ROUTERS = {"Router": "router_config.json", "Asym": "config.json"}
"""Classes of modules with branches of modules (sentence-transformers), and the file that names these."""


@dataclass
class Beside:
    """The files next to the weights of a model."""

    files: dict[str, FileStamp] = field(default_factory=dict)
    """Stamps of the files to copy to an output, sorted by their path in the folder."""
    left: list[str] = field(default_factory=list)
    """Names of the files that are left out, with the reason if it is not obvious."""
    modules: list[str] = field(default_factory=list)
    """Folders of the model's modules whose weights are among `files`."""


def survey(directory: Path, own: Collection[str], *, whole: bool, merged: Collection[str] = ()) -> Beside:
    """Return the files next to the weights in a model's folder.

    Parameters
    ----------
    own
        Names of the files that the model is read from.
    whole
        Whether the whole folder belongs to the model. If False, the model is one file of many, and only the tokenizer
        and the settings next to it are taken as its own.
    merged
        Folders whose weights are merged; all their other files are copied.

    Raises
    ------
    WorldError
        If the machine cannot read the folder.
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
        elif volumes.isdir(directory / name):
            if whole:
                _take_folder(found, directory, name, is_module=name in (*modules, *merged), merged=merged)
        elif is_left_behind(name) and name not in named:
            if whole and not _is_index_of(name, own):
                found.left.append(name)
        else:
            _take(found, directory, name)
    return found


def module_folders(directory: Path) -> tuple[str, ...]:
    """Return the folders of a model's modules (sentence-transformers), except the model's own folder.

    ``modules.json`` names them, and the settings of a router name those of its branches, within its own folder.
    """
    return tuple(modules_of(directory))


def modules_of(directory: Path) -> dict[str, str]:
    """Return the class of each module, without its package, by the module's folder; see `module_folders`."""
    entries = _settings(directory / MODULES)
    listed = [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []
    found: dict[str, str] = {}
    routers: list[str] = []
    for entry in listed:
        path, kind = entry.get("path"), _class(entry.get("type"))
        if isinstance(path, str) and path and is_sound_path(path):
            found.setdefault(path, kind)
        if kind in _ROUTERS and (path == "" or path in found):
            routers.append(path)
    for router in routers:
        for name, kind in _branches(directory / router).items():
            path = f"{router}/{name}".lstrip("/")
            if name and is_sound_path(path):
                found.setdefault(path, _class(kind))
    return found


def _branches(router: Path) -> Mapping[str, Any]:
    """Return the modules of a router's branches by their folders within its own."""
    for name in _ROUTERS.values():
        settings = _settings(router / name)
        if isinstance(settings, dict) and isinstance(settings.get("types"), dict):
            return dict(settings["types"])
    return {}


def _class(text: object) -> str:
    return text.rpartition(".")[2] if isinstance(text, str) else ""


def read_small(directory: Path, name: str, most: int = _MOST_SETTINGS) -> bytes:
    """Return the beginning of a small file in a model's folder; empty if there is no file that may be read."""
    try:
        if not leads_inside(directory, directory / name):
            return b""
        with reading(str(directory / name)) as (descriptor, status):
            return read_exactly(descriptor, min(status.st_size, most), 0, name)
    except (OSError, ModelError, WorldError):
        return b""


def leads_inside(directory: Path, path: Path) -> bool:
    """Return whether a path, after following links, is in the model's folder or among the blobs of a hub's cache.

    Raises
    ------
    OSError
        If the links cannot be followed.
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
        return volumes.listdir(directory)
    except OSError as error:
        raise unreadable(directory, error) from error


def _is_json(name: str) -> bool:
    return name.endswith("config.json")


def _is_index_of(name: str, own: Collection[str]) -> bool:
    """Return whether a file is the index of the files that the model is read from."""
    stem = name.partition(".")[0]
    return name.endswith(".index.json") and any(one.startswith(stem) for one in own)


def _named_files(directory: Path) -> frozenset[str]:
    """Return the file names, of any form, that the settings of tokenizer and processors mention."""
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
    """Return the content of a small JSON file; None if it cannot be read."""
    try:
        return json.loads(read_small(path.parent, path.name))
    except StreammergeError:
        raise
    except (ValueError, RecursionError):
        return None


def _take_folder(
    found: Beside, directory: Path, name: str, *, is_module: bool, merged: Collection[str]
) -> None:
    """Take all files of a folder except merged weights; take none if it holds other weights or no loader needs it."""
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
    """Return whether a file is a weight file or an index in a folder whose weights are merged."""
    folder, _, name = path.rpartition("/")
    return folder in merged and is_weights(name)


def _walk(directory: Path, name: str) -> Iterator[str]:
    """Yield the paths of a folder's files except hidden ones, up to a limit of depth and number."""
    waiting, count = [name], 0
    while waiting and count <= MOST_FILES:
        folder = waiting.pop()
        for entry in sorted(_names(directory / folder)):
            path = f"{folder}/{entry}"
            count += 1
            if entry.startswith(".") or count > MOST_FILES + 1:
                continue
            if volumes.isdir(directory / path) and not os.path.islink(directory / path):
                waiting += [path] if path.count("/") < DEEPEST - 1 else []
            else:
                yield path


def _take(found: Beside, directory: Path, name: str) -> None:
    """Add a file unless it is not a regular file, is too large, or lies outside the folder."""
    path = directory / name
    try:
        status = volumes.stat(path)
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
    """Return the error for a file next to the weights that cannot be read."""
    return WorldError(
        f"{printable(path)}: cannot be read: {error.strerror or error}; make it readable, or remove it, and run the "
        "same command again"
    )
