"""The contract of executors, and their registry. Each is one file, in this folder or anywhere else."""

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
    """Whether the bytes of a receipt are synced before it is yielded.

    They must be if workers have their own file descriptors, since only the machine that wrote can sync.
    """

    def run(
        self, spec: RunSpec, chunks: Iterable[Chunk | None], driver: Worker
    ) -> Generator[Sequence[Receipt], None, None]:
        """Run all chunks, in any order and place, and yield the receipts of written elements.

        Parameters
        ----------
        spec
            The specification from which `open_worker` opens a worker in a different process.
        chunks
            Chunks that are ready to run: `driver` knows the statistics that they need (`Worker.known`). None means that
            no chunk is ready while a tensor is streamed: yield, then ask again. Take only as many chunks ahead as keep
            the workers busy.
        driver
            The worker of this process. Its `stop` is set to end the merge: running chunks then end, and the remaining
            `chunks` are not taken.

        Yields
        ------
        Sequence
            Receipts, at least four times a second; an empty sequence if there are none, so that the caller can report.

        Raises
        ------
        StreammergeError
            The first failure of a chunk, after the receipts of running chunks have been yielded.
        """


_EXECUTORS: dict[str, Callable[[], Executor]] = {}


def executor(name: str) -> Callable[[type[Executor]], type[Executor]]:
    """Register a class as an executor under a name.

    Raises
    ------
    ValueError
        If a different class has the name.
    """

    def register(kind: type[Executor]) -> type[Executor]:
        known = _EXECUTORS.setdefault(name, kind)
        if known is not kind:
            raise ValueError(f"executor {name!r} is already registered: choose a different name")
        return kind

    return register


def make_executor(name: str) -> Executor:
    """Return an executor by name: a registered one, or the one in this folder's file of that name.

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
