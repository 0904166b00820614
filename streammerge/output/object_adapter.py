"""The end of a merge into an adapter in an object store: it is copied from the file of factors, which is a working file.

Nothing is written to a disk: ranges of the factors are read from the store and go into the upload of the adapter.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from typing import Any

from streammerge.checkpoint.weight_names import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from streammerge.errors import WorldError
from streammerge.io import volumes
from streammerge.io.object_small import put_object
from streammerge.io.object_upload import Upload
from streammerge.io.reader import Reader
from streammerge.output.adapter_cut import Cut
from streammerge.output.identity import Identity
from streammerge.output.journal import Receipt
from streammerge.output.manifest import seal
from streammerge.output.object_place import object_of
from streammerge.output.place import Place
from streammerge.output.shared_ledger import run_of
from streammerge.planning.plan import MergePlan


def commit_adapter_object(
    plan: MergePlan,
    place: Place,
    reader: Reader,
    receipts: Sequence[Receipt],
    identity: Identity,
    card: str,
    contents: Mapping[str, str],
    stop: threading.Event,
    check: Callable[[], None],
) -> dict[str, Any]:
    """Publish a finished adapter; see `streammerge.output.adapter.commit_adapter`.

    Parameters
    ----------
    stop
        Set to stop.
    check
        Called before each object is written; an exception that it raises, because others have ended the merge, ends this.
    """
    factors = _Factors(str(place.path(object_of(place, plan.layout, run_of(identity.public), 0))))
    cut = Cut(plan, factors.read, reader, place)
    with closing(Upload(str(place.path(ADAPTER_WEIGHTS)), cut.nbytes, stop, check)) as upload:
        for data in cut.data():
            upload.write(data)
        made = cut.made(card)
        for name in made.keys() - {ADAPTER_CONFIG}:
            check()
            put_object(str(place.path(name)), made[name])
        manifest = cut.manifest(made, receipts, identity, contents)
        check()
        put_object(str(place.manifest), seal(manifest))
        upload.finish()
    check()
    put_object(str(place.path(ADAPTER_CONFIG)), made[ADAPTER_CONFIG])
    return manifest


class _Factors:
    """The file of factors in a store."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._open()

    def _open(self) -> None:
        volumes.forget(self._url)
        volume = volumes.volume_of(self._url)
        assert volume is not None
        self._file, _ = volume.opened(self._url)

    def read(self, offset: int, nbytes: int) -> bytes:
        """Return bytes from an offset on."""
        try:
            return self._file.pread(nbytes, offset)
        except WorldError:  # a different process has written it too, with the same bytes
            self._open()
            return self._file.pread(nbytes, offset)
