"""What passes between two layers, of all examples, in a file: fp32 rows, example after example.

The file has its name once all of it is durable, so a name says that a stage is done. Until then, and while it is read,
it lies in the page cache as far as that has room, and never in the memory of the process.
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

from streammerge.engine.durable import PARTIAL, fsync_directory, world_errors, write_fully

_WIDTH = np.float32().itemsize


class Boundary:
    """Rows of every example.

    Parameters
    ----------
    rows
        How many rows each example has.
    """

    def __init__(self, path: Path, rows: Sequence[int]) -> None:
        self._path = path
        self._first = [0, *accumulate(rows)]

    def exists(self) -> bool:
        """Whether it was written completely."""
        return self._path.exists()

    @contextmanager
    def writing(self) -> Iterator[Writer]:
        """Yield what takes the rows, example after example; they are durable, and named, afterwards."""
        partial = self._path.with_name(self._path.name + PARTIAL)
        with world_errors(self._path):
            descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
            try:
                yield Writer(descriptor)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            os.replace(partial, self._path)
            fsync_directory(self._path.parent)

    @contextmanager
    def reading(self) -> Iterator[Reader]:
        """Yield what returns the rows of any example."""
        with world_errors(self._path), self._path.open("rb", buffering=0) as file:
            yield Reader(file.fileno(), self._first)

    def remove(self) -> None:
        """Remove the file, if it is there."""
        with world_errors(self._path):
            self._path.unlink(missing_ok=True)


class Writer:
    """Takes rows in the order of the examples."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def add(self, rows: Tensor) -> None:
        """Append rows, fp32 of any device."""
        write_fully(self._descriptor, rows.detach().cpu().contiguous().numpy().reshape(-1).view(np.uint8).data)


class Reader:
    """Returns rows of any example."""

    def __init__(self, descriptor: int, first: Sequence[int]) -> None:
        self._descriptor = descriptor
        self._first = first
        total = os.fstat(descriptor).st_size
        self._row = total // max(1, first[-1])

    def rows(self, n: int) -> Tensor:
        """Return the rows of example `n`, fp32 [rows, width]."""
        count = self._first[n + 1] - self._first[n]
        buffer = np.empty(count * self._row, np.uint8)
        offset, done = self._first[n] * self._row, 0
        while done < buffer.size:
            done += os.preadv(self._descriptor, [buffer.data[done:]], offset + done)
        return torch.from_numpy(buffer.view(np.float32)).view(count, self._row // _WIDTH)
