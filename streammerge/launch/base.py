"""The contract of launchers, and their registry. Each is one file, in the folder `launchers` or anywhere else.

A launcher starts processes somewhere and says how they ended. It moves no data and knows nothing of merging: all state lies
in the output directory.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Protocol

from streammerge.errors import InputError, printable
from streammerge.launch import launchers
from streammerge.records import dataclass

PARENT = "STREAMMERGE_PARENT"
"""The environment variable with the number of the process with which a process ends."""


@dataclass(frozen=True)
class Needs:
    """What the processes need."""

    count: int | None
    """Number of processes; None: as many as suit the place."""
    memory: int | None
    """Bytes of ``--memory`` of each; None: a share of what is free."""
    threads: int | None
    """CPUs of each; None: a share of those that are there."""
    device: str
    """``auto``, ``cpu`` or ``cuda[:N]``, as ``--device`` has it."""


@dataclass(frozen=True)
class Ended:
    """The end of a process."""

    number: int
    code: int
    """Its exit code; negative: the signal that ended it."""
    events: tuple[dict[str, object], ...]
    """What it said under ``--json``."""
    last_line: str
    """The last line of its stderr."""


class Launcher(Protocol):
    """Starts the processes of one merge."""

    count: int
    """Number of processes that it is meant to run."""
    restarts: int
    """Times that a process is started again after it died or met a failure of the machine."""
    elsewhere: bool
    """Whether the processes run on other machines, whose devices are not those of this one."""

    def start(self, number: int, command: Sequence[str]) -> None:
        """Start process `number` (from 0): ``streammerge`` with these arguments; it may have run before and ended."""

    def heard(self) -> Sequence[Mapping[str, object]]:
        """Return what running processes have said since the last call, as far as it is known before their end."""

    def ended(self) -> list[Ended]:
        """Return the processes that have ended since the last call."""

    def stop(self) -> None:
        """Let all processes stop cleanly, end those that do not within half a minute, and return."""


MOST_RESTARTS = 3
"""Times that a process is started again after it died or met a failure of the machine."""
_LAUNCHERS: dict[str, Callable[[Needs], Launcher]] = {}


def launcher(name: str) -> Callable[[Callable[[Needs], Launcher]], Callable[[Needs], Launcher]]:
    """Register what makes a launcher under the name that ``--on`` takes.

    Raises
    ------
    ValueError
        If something else has the name.
    """

    def register(make: Callable[[Needs], Launcher]) -> Callable[[Needs], Launcher]:
        if _LAUNCHERS.setdefault(name, make) is not make:
            raise ValueError(f"launcher {name!r} is already registered: choose a different name")
        return make

    return register


def parse_place(text: str) -> tuple[str, int | None]:
    """Return the name of a launcher and the number of processes of ``--on NAME[:N]``.

    >>> parse_place("processes:4"), parse_place("processes")
    (('processes', 4), ('processes', None))

    Raises
    ------
    InputError
        If the number is none.
    """
    name, colon, number = text.partition(":")
    if not colon:
        return name, None
    if not (number.isascii() and number.isdigit() and 1 <= int(number) <= 10_000):
        raise InputError(
            f"--on {printable(text)}: {printable(number)!r} is no number of processes from 1 to 10000"
        )
    return name, int(number)


def make_launcher(name: str, needs: Needs) -> Launcher:
    """Return a launcher by name: a registered one, or the one in the file of that name in `launchers`.

    Raises
    ------
    InputError
        If there is none, or if it cannot start anything here.
    """
    files = {file.name for file in pkgutil.iter_modules(launchers.__path__)}
    if name not in _LAUNCHERS and name in files:
        import_module(f"{launchers.__name__}.{name}")
    if name not in _LAUNCHERS:
        raise InputError(f"--on {printable(name)}: choose one of {', '.join(sorted({*_LAUNCHERS, *files}))}")
    return _LAUNCHERS[name](needs)
