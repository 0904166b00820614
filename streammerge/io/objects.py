"""Object stores as a volume: ``s3://``, ``gs://`` and ``az://``.

A folder is listed once when a model is opened, and what the list says (size and ETag) is what is read: every request
carries the ETag, so that an object that has changed since fails at its next read.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import threading
from collections.abc import Mapping
from dataclasses import field
from typing import Any

from streammerge.errors import ModelError, printable
from streammerge.io.object_file import ObjectFile, requests_nbytes
from streammerge.io.object_small import ask, list_objects
from streammerge.io.object_stores import e_tag_of, split_url
from streammerge.io.volumes import serves
from streammerge.records import dataclass

_BLOCK = 512


@dataclass(frozen=True, slots=True)
class ObjectStatus:
    """The status of an object, in the terms of `os.stat_result`."""

    st_size: int
    e_tag: str

    @property
    def st_mode(self) -> int:
        """A regular file."""
        return stat.S_IFREG | 0o644

    @property
    def st_blocks(self) -> int:
        """All bytes are stored."""
        return -(-self.st_size // _BLOCK)

    @property
    def st_mtime_ns(self) -> int:
        """Not compared: lists and answers give it in different units."""
        return 0

    @property
    def st_ctime_ns(self) -> int:
        """Not known."""
        return 0

    @property
    def st_ino(self) -> int:
        """A number made of the ETag, which stands for this version of the content."""
        return int.from_bytes(hashlib.blake2b(self.e_tag.encode(), digest_size=8).digest())


@dataclass(frozen=True)
class _Folder:
    objects: Mapping[str, ObjectStatus] = field(default_factory=dict)
    folders: frozenset[str] = frozenset()

    @property
    def names(self) -> list[str]:
        return sorted({*self.objects, *self.folders})


@serves("s3", "gs", "az")
class Objects:
    """See `Volume`."""

    @property
    def held_nbytes(self) -> int:
        """See `Volume`."""
        return requests_nbytes()

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._folders: dict[str, _Folder] = {}
        self._alone: dict[str, ObjectStatus | None] = {}
        """Objects that were looked for without a list of their folder."""

    def is_folder(self, url: str) -> bool:
        """See `Volume`."""
        url = url.rstrip("/")
        parent, _, name = url.rpartition("/")
        with self._lock:
            known = self._folders.get(parent)
        if known is not None and name not in known.folders:
            return False
        found = self._listed(url)
        # Some servers list folders of which everything has been removed.
        return bool(found.objects) or (bool(found.folders) and bool(list_objects(url, 1)))

    def names(self, url: str) -> list[str]:
        """See `Volume`."""
        found = self._listed(url.rstrip("/")).names
        if not found:
            raise _missing(url)
        return found

    def status(self, url: str, *, anew: bool = False) -> ObjectStatus:
        """See `Volume`."""
        if anew:
            return self._head(url)
        parent, _, name = url.rpartition("/")
        with self._lock:
            folder, alone = self._folders.get(parent), self._alone.get(url, ...)
        if folder is not None:
            found = folder.objects.get(name)
        elif alone is not ...:
            found = alone
        else:
            try:
                found = self._head(url)
            except FileNotFoundError:
                found = None
            with self._lock:
                self._alone[url] = found
        if found is None:
            raise _missing(url)
        return found

    def opened(self, url: str) -> tuple[ObjectFile, ObjectStatus]:
        """See `Volume`."""
        status = self.status(url)
        return ObjectFile(url, status), status

    def input_file(self, url: str, stop: threading.Event) -> ObjectFile:
        """See `Volume`."""
        return ObjectFile(url, self.status(url), stop)

    def forget(self, url: str) -> None:
        """See `Volume`."""
        url = url.rstrip("/")
        with self._lock:
            for known in (self._folders, self._alone):
                for key in [key for key in known if key == url or key.startswith(f"{url}/")]:
                    del known[key]
            self._folders.pop(url.rpartition("/")[0], None)

    def _listed(self, url: str) -> _Folder:
        with self._lock:
            known = self._folders.get(url)
        if known is None:
            known = _list(url)
            with self._lock:
                known = self._folders.setdefault(url, known)
        return known

    def _head(self, url: str) -> ObjectStatus:
        if not split_url(url)[2]:
            raise _missing(url)
        return _status(url, ask(url, lambda obstore, store, key: obstore.head(store, key)))


def _list(url: str) -> _Folder:
    """Return the objects and folders directly below a URL; nothing if there are none."""
    key = split_url(url)[2]
    try:
        found = ask(url, lambda obstore, store, key: obstore.list_with_delimiter(store, key or None))
    except FileNotFoundError:
        return _Folder()
    begin = len(key) + 1 if key else 0
    objects = {meta["path"][begin:]: meta for meta in found["objects"]}
    return _Folder(
        {name: _status(f"{url}/{name}", meta) for name, meta in objects.items() if name},
        frozenset(path.rstrip("/")[begin:] for path in found["common_prefixes"]),
    )


def _status(url: str, meta: Mapping[str, Any]) -> ObjectStatus:
    if not (e_tag := e_tag_of(meta)):
        raise ModelError(
            f"{printable(url)}: the store gives no ETag, without which a change goes unnoticed: copy it here"
        )
    return ObjectStatus(meta["size"], e_tag)


def _missing(url: str) -> FileNotFoundError:
    return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), url)
