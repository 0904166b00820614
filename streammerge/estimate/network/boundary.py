"""Files of activations between two layers: fp32 rows, example after example.

A file gets its final name once all of it is durable, so the name marks a finished stage. Its data are in the page cache
while there is room, never in the memory of the process.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from streammerge.io.durable import PARTIAL, fsync_directory, world_errors, write_fully

_WIDTH = np.float32().itemsize


class Boundary:
    """A file of rows for every example.

    Parameters
    ----------
    rows
        Number of rows of each example.
    batch_size
        Number of examples that are read and written at a time.
    """

    def __init__(self, path: Path, rows: Sequence[int], batch_size: int = 16) -> None:
        self._path = path
        self._batch_size = batch_size
        self._first = [0, *accumulate(rows)]

    def exists(self) -> bool:
        """Whether the file is complete."""
        return self._path.exists()

    @contextmanager
    def writing(self) -> Iterator[Writer]:
        """Yield a writer for the rows, example after example; afterwards the file is durable and has its name."""
        partial = self._path.with_name(self._path.name + PARTIAL)
        with world_errors(self._path):
            descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
            try:
                writer = Writer(descriptor, self._batch_size)
                yield writer
                writer.flush()
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            os.replace(partial, self._path)
            fsync_directory(self._path.parent)

    @contextmanager
    def reading(self) -> Iterator[Reader]:
        """Yield a reader of any example's rows."""
        with world_errors(self._path), self._path.open("rb", buffering=0) as file:
            yield Reader(file.fileno(), self._first, self._batch_size)

    def remove(self) -> None:
        """Remove the file if it exists."""
        with world_errors(self._path):
            self._path.unlink(missing_ok=True)


class Writer:
    """Writes rows in the order of the examples."""

    def __init__(self, descriptor: int, batch_size: int) -> None:
        self._descriptor = descriptor
        self._batch_size = batch_size
        self._held: list[np.ndarray] = []

    def add(self, rows: Tensor) -> None:
        """Append rows, fp32 of any device."""
        self._held.append(rows.detach().cpu().contiguous().numpy().reshape(-1))
        if len(self._held) >= self._batch_size:
            self.flush()

    def flush(self) -> None:
        """Write the buffered rows."""
        if self._held:
            write_fully(self._descriptor, np.concatenate(self._held).view(np.uint8).data)
            self._held.clear()


class Reader:
    """Reads rows of any example; reading in order is fast."""

    def __init__(self, descriptor: int, first: Sequence[int], batch_size: int) -> None:
        self._descriptor = descriptor
        self._first = first
        self._batch_size = batch_size
        self._row = os.fstat(descriptor).st_size // max(1, first[-1])
        self._held = range(0)
        self._values = torch.empty(0)

    def rows(self, n: int) -> Tensor:
        """Return the rows of example `n`, fp32 [rows, width]."""
        if n not in self._held:
            self._held = range(n, min(n + self._batch_size, len(self._first) - 1))
            self._values = torch.empty(0)  # freed before the next batch is allocated
            self._values = self._read(self._first[n], self._first[self._held.stop])
        base = self._first[self._held.start]
        return self._values[self._first[n] - base : self._first[n + 1] - base]

    def _read(self, first: int, end: int) -> Tensor:
        buffer = np.empty((end - first) * self._row, np.uint8)
        done = 0
        while done < buffer.size:
            done += os.preadv(self._descriptor, [buffer.data[done:]], first * self._row + done)
        return torch.from_numpy(buffer.view(np.float32)).view(end - first, self._row // _WIDTH)
