"""Files of an output that people may edit: the model card, a licence, prompts, a chat template.

An edit is not damage as long as the file is text, and still JSON if it was JSON.
"""

from __future__ import annotations

import json
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from streammerge.checkpoint.sidecar_names import is_editable
from streammerge.errors import StreammergeError
from streammerge.formats.safetensors import SUFFIX
from streammerge.io import volumes
from streammerge.io.files import read_exactly, reading
from streammerge.numerics.crc32 import crc32

EDITED, REMOVED = "edited since", "removed since"
_LARGEST = 1 << 26
"""Most bytes of an edited file."""


def find_edits(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Return the kind of change of each edited file, by name; unchanged files are left out.

    Damaged files, neither unchanged nor validly edited, are left out as well; the caller detects them.

    Parameters
    ----------
    folder
        The directory of an output's files.
    files
        Size and checksum of every file, as the manifest has them.
    """
    found = {
        name: _edit_of(folder / name, name, files[name])
        for name in files
        if is_editable(name) and not name.endswith(SUFFIX)
    }
    return {name: what for name, what in found.items() if what}


def _edit_of(path: Path, name: str, entry: Mapping[str, Any]) -> str:
    if not volumes.lexists(path):
        return REMOVED
    data = _regular(path)
    if data is None or (len(data) == entry["nbytes"] and f"{crc32(data):08x}" == entry["crc32"]):
        return ""
    return EDITED if _is_text(data, name) else ""


def _regular(path: Path) -> bytes | None:
    """Return the content of a regular file that is not too large to be edited, else None."""
    try:
        if not stat.S_ISREG(volumes.lstat(path).st_mode):
            return None
        with reading(str(path)) as (descriptor, status):
            size = status.st_size
            return read_exactly(descriptor, size, 0, str(path)) if size <= _LARGEST else None
    except (OSError, StreammergeError):
        return None


def _is_text(data: bytes, name: str) -> bool:
    """Return whether data may come from an editor: UTF-8 without NUL, and a JSON object if the name says JSON."""
    try:
        text = str(data, "utf-8")
        return "\0" not in text and (not name.endswith(".json") or isinstance(json.loads(text), dict))
    except (ValueError, RecursionError):
        return False
