"""The contract of an executor, and the registry of them: one file each, in this folder or anywhere else."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Generator, Iterable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Protocol

from streammerge.engine.worker import RunSpec, Worker
from streammerge.errors import InputError, printable
from streammerge.output.journal import Receipt
from streammerge.planning.schedule import Chunk


class Executor(Protocol):
    """Takes a run specification and chunks, and yields receipts."""

    durable: bool
    """True where the bytes of a receipt are synced before it is yielded.

    They must be where a worker has descriptors of its own: only the machine that wrote can sync.
    """

    def run(
        self, spec: RunSpec, chunks: Iterable[Chunk | None], driver: Worker
    ) -> Generator[Sequence[Receipt], None, None]:
        """Run all chunks, in any order and place, and yield the receipts of what is written.

        Parameters
        ----------
        spec
            What a worker elsewhere is opened from, by `open_worker`.
        chunks
            Ready to run: statistics of their tensors that are not taken from the chunk itself are known to `driver`
            (`Worker.known`). None: there is none for the moment, while a tensor is streamed; yield, then ask again.
            Take no more ahead than keeps the workers busy.
        driver
            The worker of this process. Its `stop` is set when the merge is to stop: then chunks in hand end, and the
            rest of `chunks` is let go.

        Yields
        ------
        Sequence
            Receipts, at least four times a second: an empty sequence where none is new, so that the caller can report.

        Raises
        ------
        StreammergeError
            The first failure of a chunk, after the receipts of what was in hand have been yielded.
        """


_EXECUTORS: dict[str, Callable[[], Executor]] = {}


def executor(name: str) -> Callable[[type[Executor]], type[Executor]]:
    """Register a class as the executor of a name.

    Raises
    ------
    ValueError
        If a different class has the name.
    """

    def register(kind: type[Executor]) -> type[Executor]:
        known = _EXECUTORS.setdefault(name, kind)
        if known is not kind:
            raise ValueError(f"executor {name!r} is registered already: choose a different name")
        return kind

    return register


def make_executor(name: str) -> Executor:
    """Return an executor by its name: a registered one, or the one in the file of that name in this folder.

    Raises
    ------
    InputError
        If there is none.
    """
    files = {file.name for file in pkgutil.iter_modules([str(Path(__file__).parent)])}
    if name not in _EXECUTORS and name in files:
        import_module(f"streammerge.engine.executors.{name}")
    if name not in _EXECUTORS:
        names = ", ".join(sorted({*_EXECUTORS, *files} - {"base"}))
        raise InputError(f"no executor {printable(name)!r}: choose one of {names}")
    return _EXECUTORS[name]()
