"""One run that fills a store: opened or continued, written array by array, committed under its final name."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from streammerge.checkpoint.index import open_model
from streammerge.events import Control
from streammerge.formats.zarr_writer import StoreWriter, Sums, locked_partial
from streammerge.io.durable import PARTIAL, world_errors
from streammerge.io.reader import Reader
from streammerge.io.stamp import FileStamp, check_unchanged
from streammerge.records import dataclass
from streammerge.tensors.fingerprint import fingerprint
from streammerge.version import __version__

_WORK = "__work__"
"""Folder of an estimate's work files inside the unfinished store; no array can have this name."""


@dataclass(frozen=True)
class Written:
    """The result of a run."""

    out: str
    tensors: int
    bytes_read: int
    """Bytes read in this run."""
    seconds: float
    about: Mapping[str, Any]
    """The store's own record."""
    resumed: int = 0
    """Number of tensors that an earlier run had finished, if counted."""


class StoreRun:
    """A run that reads a model and writes a store about it; run again, it continues.

    Parameters
    ----------
    model
        The model that the store is about.
    out
        The store to write.
    attribute
        The key of the store's table: it tells the kind of the store.
    sums
        Function that returns the sums to record for an array, given its tensor and dtype.
    control
        Receives events, and can stop the run.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        out: Path,
        *,
        attribute: str,
        sums: Callable[[str, str], Sums],
        control: Control | None = None,
    ) -> None:
        self._began = time.monotonic()
        self._name = os.path.basename(os.path.normpath(model))
        self._out = out
        self._attribute = attribute
        self._sums = sums
        self.control = control or Control()
        self.index = open_model(model)
        self.reader = Reader()
        self.store: StoreWriter
        """The unfinished store, inside `writing`."""

    @property
    def work(self) -> Path:
        """A directory for work files until the store is finished; it is removed together with an unfinished store."""
        return self._out.with_name(self._out.name + PARTIAL) / _WORK

    @contextmanager
    def writing(self, identity: Mapping[str, str], overwrite: bool) -> Iterator[StoreWriter]:
        """Lock and open the unfinished store, or continue the one that an earlier run left; close the reader at the end.

        Parameters
        ----------
        identity
            The names and values, in addition to those of the program and the model, that a run must share with the one
            that it continues.
        overwrite
            Replace the store, or what an unfinished run left.

        Raises
        ------
        OutputError
            If the store exists, a different process is writing it, or an unfinished one has a different identity.
        """
        try:
            self._fingerprint = fingerprint(self.index, self.reader)
            bound = {"version": __version__, "model": self._fingerprint, **identity}
            with locked_partial(self._out, overwrite):
                self.store = StoreWriter(self._out, bound, attribute=self._attribute, sums=self._sums)
                yield self.store
        finally:
            self.reader.close()

    def finish(
        self,
        order: Iterable[str],
        about: Mapping[str, Any],
        *,
        stamps: Sequence[FileStamp] | None = None,
        resumed: int = 0,
    ) -> Written:
        """Give the store its final name, inside `writing`.

        Parameters
        ----------
        order
            The tensors of the store, in the order of its table.
        about
            Facts to record about the store in addition to its model.
        stamps
            The files that must not have changed meanwhile; default: the model's.

        Raises
        ------
        ModelError
            If a file has changed.
        """
        for stamp in self.index.stamps if stamps is None else stamps:
            check_unchanged(stamp)
        with world_errors(self.work):
            shutil.rmtree(self.work, ignore_errors=True)
        order = list(order)
        known = {"model_fingerprint": self._fingerprint, "model_name": self._name, **about}
        attributes = self.store.commit(order, known)
        seconds = time.monotonic() - self._began
        return Written(str(self._out), len(order), self.reader.bytes_read, seconds, attributes, resumed)
