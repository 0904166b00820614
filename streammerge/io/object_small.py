"""Small objects: each written whole or not at all, and read whole. Lists of objects."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from streammerge.errors import StreammergeError
from streammerge.io.object_errors import explained, while_writing
from streammerge.io.object_stores import e_tag_of, library, split_url, store_of
from streammerge.io.object_waiting import Patience
from streammerge.records import dataclass

_T = TypeVar("_T")
_EXISTS = {"AlreadyExistsError", "PreconditionError"}
"""Names of obstore's exceptions for an object that is there already."""
_UNKNOWN = {"NotSupportedError", "NotImplementedError"}
"""Names of obstore's exceptions for a store that knows no conditions."""


@dataclass(frozen=True)
class Facts:
    """What a store tells of an object."""

    nbytes: int
    e_tag: str
    written: float
    """Seconds since 1970 by the store's clock, which may count whole seconds only."""


def put_object(url: str, data: bytes) -> str:
    """Write a small object; return its ETag.

    Raises
    ------
    WorldError
        If the store fails.
    """
    return str(_ask(url, lambda obstore, store, key: e_tag_of(obstore.put(store, key, data)), writes=True))


def create_object(url: str, data: bytes) -> bool:
    """Write a small object unless there is one, and return whether it was written.

    A store that knows no conditions, or ignores them, lets everyone succeed.

    Raises
    ------
    WorldError
        If the store fails.
    """

    def create(obstore: Any, store: Any, key: str) -> bool:
        try:
            obstore.put(store, key, data, mode="create")
        except Exception as error:
            if type(error).__name__ in _EXISTS:
                return False
            if type(error).__name__ not in _UNKNOWN and "status code: 501" not in str(error):
                raise
            obstore.put(store, key, data)
        return True

    return bool(_ask(url, create, writes=True))


def remove_object(url: str) -> None:
    """Remove an object, if it exists.

    Raises
    ------
    WorldError
        If the store fails.
    """
    _ask(url, lambda obstore, store, key: obstore.delete(store, key))


def facts_of(url: str) -> Facts | None:
    """Return what the store tells of an object; None if there is none.

    Raises
    ------
    WorldError
        If the store fails.
    """
    meta = _ask(url, lambda obstore, store, key: obstore.head(store, key))
    return None if meta is None else _facts(meta)


def read_small(url: str) -> bytes | None:
    """Return a small object, as it is now; None if there is none.

    Raises
    ------
    WorldError
        If the store fails.
    """
    found: bytes | None = _ask(url, lambda obstore, store, key: bytes(obstore.get(store, key).bytes()))
    return found


def names_below(url: str) -> tuple[list[str], list[str]]:
    """Return the names of the objects directly below a URL, and of the folders.

    Raises
    ------
    WorldError
        If the store fails.
    """
    found = _ask(url, lambda obstore, store, key: obstore.list_with_delimiter(store, key or None))
    if found is None:
        return [], []
    key = split_url(url)[2]
    cut = len(key) + 1 if key else 0
    objects = [meta["path"][cut:] for meta in found["objects"]]
    folders = [path.rstrip("/")[cut:] for path in found["common_prefixes"]]
    return [name for name in objects if name], [name for name in folders if name]


def list_objects(url: str, most: int) -> dict[str, tuple[int, str]]:
    """Return size and ETag of the objects below a URL, at any depth, by their path there; at most about `most` of them.

    Raises
    ------
    StreammergeError
        If the store fails, or access is denied.
    """

    def listed(obstore: Any, store: Any, key: str) -> dict[str, tuple[int, str]]:
        found: dict[str, tuple[int, str]] = {}
        for batch in obstore.list(store, key or None):
            for meta in batch:
                found[meta["path"][len(key) + 1 if key else 0 :]] = (meta["size"], e_tag_of(meta))
            if len(found) >= most:
                break
        found.pop("", None)
        return found

    try:
        return ask(url, listed)
    except FileNotFoundError:
        return {}


def _facts(meta: Any) -> Facts:
    return Facts(meta["size"], e_tag_of(meta), meta["last_modified"].timestamp())


def _ask(url: str, question: Callable[[Any, Any, str], _T], *, writes: bool = False) -> _T | None:
    """Ask a store of a merge that has begun; return None if there is no such object, and nothing is written."""
    try:
        return ask(url, question, lambda url, error: _explained(url, error, writes))
    except FileNotFoundError:
        return None


def _explained(url: str, error: Exception, writes: bool) -> Exception:
    what = explained(url, error)
    return what if not writes and isinstance(what, FileNotFoundError) else while_writing(url, error)


def ask(
    url: str,
    question: Callable[[Any, Any, str], _T],
    failure: Callable[[str, Exception], Exception] = explained,
) -> _T:
    """Ask a store, for minutes if it is away; see `streammerge.io.object_waiting`.

    Parameters
    ----------
    question
        Function that is given obstore, the store and the URL's key.
    failure
        Returns the error to raise for one of obstore's.

    Raises
    ------
    StreammergeError
        If the store fails.
    FileNotFoundError
        If there is no such object.
    """
    patience = Patience(url)
    while True:
        store, key = store_of(url)
        try:
            found = question(library(split_url(url)[0]), store, key)
            patience.came()
            return found
        except StreammergeError:
            raise
        except Exception as error:
            if not patience.wait(error):
                raise failure(url, error) from None
