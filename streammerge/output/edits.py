"""Files of an output that people edit afterwards: a model card, a licence, a prompt, a chat template.

That is no damage, so long as what is there is a text, and JSON where it was.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from streammerge.checkpoint.sidecar_names import is_editable
from streammerge.errors import StreammergeError
from streammerge.formats.safetensors import SUFFIX
from streammerge.io.files import read_exactly, reading
from streammerge.numerics.crc32 import crc32

EDITED, REMOVED = "edited since", "removed since"
_LARGEST = 1 << 26
"""Most bytes of a file that a person has edited."""


def find_edits(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Return what became of the files that may be edited, by name; of those that are as written nothing.

    One that is neither as it was written nor soundly edited is not in it either: that is damage, and the caller's to find.

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
    if not os.path.lexists(path):
        return REMOVED
    data = _regular(path)
    if data is None or (len(data) == entry["nbytes"] and f"{crc32(data):08x}" == entry["crc32"]):
        return ""
    return EDITED if _is_text(data, name) else ""


def _regular(path: Path) -> bytes | None:
    """Return the content of a file that is no link and not too large to be edited; None of any other."""
    try:
        if not stat.S_ISREG(os.lstat(path).st_mode):
            return None
        with reading(str(path)) as (descriptor, status):
            size = status.st_size
            return read_exactly(descriptor, size, 0, str(path)) if size <= _LARGEST else None
    except (OSError, StreammergeError):
        return None


def _is_text(data: bytes, name: str) -> bool:
    """Return whether an editor may have left this: UTF-8, no zeros, and an object where the name says JSON."""
    try:
        text = data.decode()
        return "\0" not in text and (not name.endswith(".json") or isinstance(json.loads(text), dict))
    except (ValueError, RecursionError):
        return False
