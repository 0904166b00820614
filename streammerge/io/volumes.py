"""Where the bytes of a path lie: in this machine's file system, or in a store that a URL names.

Everything that looks at an input asks here. A path without a scheme is handled by `os`. The modules in `_HOMES` register
a *volume* for the schemes that they serve; no volume is imported, and nothing is asked of a network, until a URL of its
scheme is opened.
"""

from __future__ import annotations

import importlib
import os
import threading
from collections.abc import Callable, Iterable
from pathlib import Path, PosixPath
from typing import TYPE_CHECKING, Protocol, TypeVar

from streammerge.errors import ModelError, printable
from streammerge.lazy import late_pattern

if TYPE_CHECKING:
    from streammerge.io.buffer_pool import Bytes

AnyPath = str | os.PathLike[str]

_SCHEME = late_pattern(r"([A-Za-z][A-Za-z0-9]*)://")
_USER = late_pattern(r"://[^/]*@")
_HOMES = {"s3": "streammerge.io.objects", "gs": "streammerge.io.objects", "az": "streammerge.io.objects"}
"""The module that serves each scheme."""
_VOLUMES: dict[str, Volume] = {}


class Status(Protocol):
    """The facts about an input that tell whether it has changed; `os.stat_result` has them."""

    @property
    def st_mode(self) -> int:
        """Its kind, as in `stat`."""

    @property
    def st_size(self) -> int:
        """Bytes."""

    @property
    def st_blocks(self) -> int:
        """Units of 512 bytes that are stored."""

    @property
    def st_mtime_ns(self) -> int:
        """Time of the last change in nanoseconds; 0 if the volume compares contents by a tag instead."""

    @property
    def st_ctime_ns(self) -> int:
        """Time of the last change of content or metadata in nanoseconds; 0 as above."""

    @property
    def st_ino(self) -> int:
        """Number that identifies the file, or this version of its content."""


class InputFile(Protocol):
    """An input that is open for reading, from any thread."""

    users: int
    """Number of threads that read it now."""
    direct: bool
    """Whether it can be read past the page cache."""

    def status(self) -> Status:
        """Return its status."""

    def read(self, offset: int, target: Bytes) -> None:
        """Fill `target` from byte `offset`."""

    def read_mapped(self, offset: int, target: Bytes) -> None:
        """Do the same from a memory map, where there is such a thing."""

    def read_parts(self, parts: Iterable[tuple[int, list[memoryview]]]) -> int:
        """Fill buffers: for each offset, several with consecutive bytes; return the number of bytes."""

    def read_past_cache(self, offset: int, slot: Bytes, nbytes: int) -> None:
        """Read a range and the rest of its pages into `slot`, which begins at a page."""

    def cached_share(self, offset: int, nbytes: int) -> float:
        """Return the fraction of a range that is in the page cache."""

    def will_need(self, offset: int, nbytes: int) -> None:
        """Hint that a range will be read soon; 0 bytes: the whole file."""

    def forget(self, offset: int, nbytes: int) -> None:
        """Evict a range from the page cache."""

    def close(self) -> None:
        """Close it."""


class Opened(Protocol):
    """An object of a volume that is open for small reads, such as headers."""

    def pread(self, nbytes: int, offset: int) -> bytes:
        """Return up to `nbytes` bytes from `offset` on; fewer only at its end."""


class Volume(Protocol):
    """The inputs of one scheme. URLs have been checked by `check_url`; missing ones raise FileNotFoundError."""

    @property
    def held_nbytes(self) -> int:
        """Most resident memory that reading from it takes, beyond the buffers that are filled."""

    def is_folder(self, url: str) -> bool:
        """Return whether anything lies below a URL."""

    def names(self, url: str) -> list[str]:
        """Return the names directly below a URL."""

    def status(self, url: str, *, anew: bool = False) -> Status:
        """Return an object's status as it was when its folder was first listed, or `anew`."""

    def opened(self, url: str) -> tuple[Opened, Status]:
        """Open an object for small reads."""

    def input_file(self, url: str, stop: threading.Event) -> InputFile:
        """Open an object for large reads; every read fails if the object is no longer the one that was listed.

        `stop` is set when nobody waits any more for a store that is away.
        """

    def forget(self, url: str) -> None:
        """Forget what was listed at and below a URL, because it is opened anew."""


_Class = TypeVar("_Class", bound=Callable[[], Volume])


def serves(*schemes: str) -> Callable[[_Class], _Class]:
    """Register the volume of these schemes; it is made when this is called."""

    def register(volume: _Class) -> _Class:
        _VOLUMES.update(dict.fromkeys(schemes, volume()))
        return volume

    return register


def is_url(path: AnyPath) -> bool:
    """Return whether a path names something outside the file system."""
    return _SCHEME.match(os.fspath(path)) is not None


def volume_of(path: AnyPath) -> Volume | None:
    """Return the volume of a URL; None for a path in the file system.

    Raises
    ------
    ModelError
        If no volume serves its scheme, or it carries a user, a password or a query.
    """
    text = os.fspath(path)
    match = _SCHEME.match(text)
    if match is None:
        return None
    check_url(text)
    if match[1] not in _VOLUMES:
        importlib.import_module(_HOMES[match[1]])
    return _VOLUMES[match[1]]


def check_url(url: str) -> None:
    """Refuse a URL that is not served, or that carries secrets, which the message does not repeat.

    Raises
    ------
    ModelError
        If it is refused.
    """
    scheme, _, rest = url.partition("://")
    place = rest.partition("/")[0]
    if scheme not in _HOMES:
        raise ModelError(
            f"{printable(scheme, 20)}://…: models are read from directories, the Hugging Face cache (org/name), and "
            "s3://, gs:// or az://: download it first"
        )
    refuse_secrets(url)
    if not place:
        raise ModelError(f"{printable(url)}: names no bucket: write {scheme}://BUCKET/PREFIX")


def refuse_secrets(text: str) -> None:
    """Refuse a reference with a URL that carries secrets, before anything else can repeat it in a message.

    Raises
    ------
    ModelError
        If it has a user, a password, a query or a fragment.
    """
    if "://" in text and (_USER.search(text) or "?" in text or "#" in text):
        raise ModelError(
            "a URL with a user, a password or a query (not shown): write s3://BUCKET/FOLDER alone; credentials come from "
            "the environment"
        )


class Url(PosixPath):
    """The path of something in a volume: it is joined like a path, and keeps the two slashes of its scheme."""

    def __str__(self) -> str:
        return "//".join((self.parts[0], "/".join(self.parts[1:])))

    def __fspath__(self) -> str:
        return str(self)

    def resolve(self, strict: bool = False) -> Url:
        """Return itself: a volume has no links."""
        return self


def as_path(text: AnyPath) -> Path:
    """Return a path, or a `Url` if the text is one."""
    return Url(text) if is_url(text) else Path(text)


def local_path(text: AnyPath, what: str) -> Path:
    """Return the path of something that is only written to a disk.

    Raises
    ------
    ModelError
        If it is a URL; `what` names the thing in the message.
    """
    if volume_of(text) is not None:
        raise ModelError(
            f"{printable(os.fspath(text))}: {what} is written to a disk only: name a directory or a file"
        )
    return Path(text)


def refuse_url(path: AnyPath, shown: str, who: str) -> None:
    """Refuse a model in a volume where a library reads its files itself.

    Raises
    ------
    ModelError
        If the path is a URL.
    """
    if is_url(path):
        raise ModelError(
            f"{printable(shown)}: {who} reads this model's files from a disk only: copy it to a directory"
        )


def lexists(path: AnyPath) -> bool:
    """Return whether a path exists, even as a broken link."""
    volume = volume_of(path)
    return os.path.lexists(path) if volume is None else _exists(volume, os.fspath(path))


def exists(path: AnyPath) -> bool:
    """Return whether a path exists."""
    volume = volume_of(path)
    return os.path.exists(path) if volume is None else _exists(volume, os.fspath(path))


def isdir(path: AnyPath) -> bool:
    """Return whether a path is a directory."""
    volume = volume_of(path)
    return os.path.isdir(path) if volume is None else volume.is_folder(os.fspath(path))


def isfile(path: AnyPath) -> bool:
    """Return whether a path is a file."""
    volume = volume_of(path)
    return os.path.isfile(path) if volume is None else _is_object(volume, os.fspath(path))


def listdir(path: AnyPath) -> list[str]:
    """Return the names in a directory.

    Raises
    ------
    OSError
        If it cannot be listed.
    """
    volume = volume_of(path)
    return os.listdir(path) if volume is None else volume.names(os.fspath(path))


def stat(path: AnyPath, *, anew: bool = False) -> Status:
    """Return the status of a file; in a volume as it was first seen, unless it is asked `anew`.

    Raises
    ------
    OSError
        If it is missing, or not permitted.
    """
    volume = volume_of(path)
    return os.stat(path) if volume is None else volume.status(os.fspath(path), anew=anew)


def lstat(path: AnyPath) -> Status:
    """Return the status of a file, of a link itself; a volume has no links.

    Raises
    ------
    OSError
        As `stat`.
    """
    volume = volume_of(path)
    return os.lstat(path) if volume is None else volume.status(os.fspath(path))


def forget(path: AnyPath) -> None:
    """Look at a model anew: what a volume remembers of it is dropped."""
    volume = volume_of(path)
    if volume is not None:
        volume.forget(os.fspath(path))


def held_nbytes(paths: Iterable[AnyPath]) -> int:
    """Return the resident memory that reading files takes beyond the buffers that are filled; 0 for local ones."""
    found = {id(volume): volume for path in paths if (volume := volume_of(path)) is not None}
    return sum(volume.held_nbytes for volume in found.values())


def _is_object(volume: Volume, url: str) -> bool:
    try:
        volume.status(url)
    except FileNotFoundError:
        return False
    return True


def _exists(volume: Volume, url: str) -> bool:
    return _is_object(volume, url) or volume.is_folder(url)
