"""Find the publishable origins of a merge's inputs: their names on the hub, and their licences.

Paths are private: for a local folder only its own name is given.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from streammerge.checkpoint.adapters.files import split_reference
from streammerge.checkpoint.hub import parse_name
from streammerge.checkpoint.index import TensorIndex
from streammerge.checkpoint.locating import locate
from streammerge.checkpoint.sidecars import read_small
from streammerge.errors import StreammergeError, printable
from streammerge.io import volumes
from streammerge.lazy import late_pattern
from streammerge.records import dataclass

_README = "README.md"
_MOST_README = 1 << 16
"""Bytes of a README that are read; the front matter comes first."""
_FRONT = late_pattern(r"\A\ufeff?---[ \t]*\r?\n(.*?\r?\n)---[ \t]*\r?\n", re.DOTALL)
_KEY = late_pattern(
    r"^(license|license_name|license_link):[ \t]*(?:\r?\n[ \t]*-[ \t]+)?([\"']?)([^\s\"'#\[\]{}|>&*!][^\r\n\"'#]{0,200}?)\2[ \t\r]*$",
    re.MULTILINE,
)


@dataclass(frozen=True)
class Origin:
    """The origin of a model, or of an adapter."""

    name: str
    """The name on the hub, or the name of the local folder."""
    revision: str = ""
    """The commit of a model from the hub."""
    on_hub: bool = False
    licence: tuple[tuple[str, str], ...] = ()
    """The licence in the front matter of its README, by key; empty if there is none."""


def origins_of(index: TensorIndex) -> tuple[Origin, ...]:
    """Return the origin of a model, and that of the adapter on it."""
    if index.adapter is None:
        return (_origin(index.reference, index.directory),)
    model, adapter = split_reference(index.reference, _exists)
    return _origin(model, index.directory), _origin(adapter, index.adapter.directory)


def shared_licence(origins: Sequence[Origin]) -> tuple[tuple[str, str], ...]:
    """Return the licence that all inputs state in the same words; empty if they differ or one states none."""
    stated = {origin.licence for origin in origins}
    (licence,) = stated if len(stated) == 1 else ((),)
    return licence


def shown_reference(reference: str) -> str:
    """Return a reference as it may be published: of a local path only the last part.

    >>> shown_reference("/home/me/models/math"), shown_reference("org/math@v1"), shown_reference("a/math+../my/lora")
    ('math', 'org/math@v1', 'a/math+lora')
    """
    return "+".join(
        _last(part) if part.startswith(("/", "~", ".")) or volumes.is_url(part) else part
        for part in reference.split("+")
    )


def _origin(reference: str, directory: Path) -> Origin:
    licence = () if volumes.isfile(os.path.expanduser(reference)) else tuple(_licence(directory))
    named = parse_name(reference)
    places = directory.parts[-3:]
    if named is not None and len(places) == 3:
        repository = "models--" + named.repo.replace("/", "--")
        if places[:2] == (repository, "snapshots") and not volumes.exists(reference):
            return Origin(named.repo, places[2], True, licence)
    return Origin(printable(_last(reference), 120), licence=licence)


def _last(path: str) -> str:
    return os.path.basename(os.path.normpath(path)) or "model"


def _exists(part: str) -> bool:
    try:
        locate(part)
    except StreammergeError:
        return False
    return True


def _licence(directory: Path) -> Iterator[tuple[str, str]]:
    text = read_small(directory, _README, _MOST_README).decode(errors="replace")
    front = _FRONT.match(text)
    found = {key: value.strip() for key, _, value in _KEY.findall(front[1])} if front else {}
    if "license" in found:
        yield from ((key, value) for key, value in sorted(found.items()) if value.isprintable())
