"""Merges that forks of a warm process share, and what one process gives alone."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from streammerge.events import Event
from tests.laws.resume.forks import contents, fork, wait
from tests.patience import PATIENCE

SHAPES: dict[str, tuple[int, ...]] = {
    "embed.weight": (300, 64),
    "layers.0.weight": (64, 130),
    "layers.1.weight": (64, 130),
    "empty": (0, 5),
    "norm": (64,),
    "scalar": (),
}
SHARD = 20_000
"""Bytes: every large tensor has a shard of its own."""
STALE = 0.4
"""Seconds after which a process without a sign of life counts as dead."""
LATE = 1.0
"""Seconds after which every sign of life is stale."""


def quietly(event: Event) -> None:
    """Hear an event."""


class Scene:
    """One merge, and what it gives when one process does all.

    Parameters
    ----------
    config
        A config as a mapping, or its text.
    """

    def __init__(self, directory: Path, config: Mapping[str, Any] | str, name: str = "out") -> None:
        self.directory, self.config = directory, config if isinstance(config, str) else dict(config)
        self.out = directory / name
        self.alone = directory / f"{name}-alone"
        self._expected: dict[str, bytes] = {}

    def merge(self, out: Path | None = None, **options: Any) -> Any:
        """Merge in this process."""
        from streammerge.api import merge

        config = options.pop("config", self.config)
        return merge(config, out or self.out, **{"shard_size": SHARD, "on_event": quietly, **options})

    def start(self, before: Callable[[], object] = lambda: None, name: str = "worker", **options: Any) -> int:
        """Take part in a fork, after something else; return its number. What it says goes into a file."""

        def action() -> None:
            from streammerge.errors import StreammergeError

            before()
            try:
                summary = self.merge(**{"join": True, **options})
            except StreammergeError as error:
                self.told(name).write_text(str(error))
                raise SystemExit(error.exit_code) from None
            self.told(name).write_text(json.dumps([summary.bytes_read, summary.bytes_written]))

        self.told(name).unlink(missing_ok=True)
        return fork(action)

    def told(self, name: str) -> Path:
        """Return the file of what a fork says at its end."""
        return self.directory / f"{name}.told"

    @property
    def expected(self) -> dict[str, bytes]:
        """The files that one process writes, by name."""
        if not self._expected:
            number = fork(lambda: self.merge(self.alone))
            assert wait(number) == 0
            self._expected = contents(self.alone)
            shutil.rmtree(self.alone)
        return self._expected

    def finished(self) -> None:
        """See that every file is there, byte for byte, and nothing else; then remove all."""
        found = contents(self.out)
        assert sorted(found) == sorted(self.expected), sorted(found)
        differ = [name for name, data in found.items() if data != self.expected[name]]
        assert not differ, differ
        assert not (self.out / ".streammerge").exists()
        shutil.rmtree(self.out)

    def all_well(self, numbers: list[int]) -> None:
        """Wait for forks; each must end without an error, and the output be finished."""
        codes = [wait(number) for number in numbers]
        said = [path.read_text() for path in sorted(self.directory.glob("*.told"))]
        assert codes == [0] * len(numbers), (codes, said)
        self.finished()


def wait_stopped(number: int, seconds: float = PATIENCE) -> None:
    """Wait until a fork has stopped itself."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found, status = os.waitpid(number, os.WNOHANG | os.WUNTRACED)
        if found:
            assert os.WIFSTOPPED(status), f"it ended: {status}"
            return
        time.sleep(0.005)
    raise AssertionError("it did not stop")


def at_call(owner: Any, name: str, number: int, action: Callable[[], object]) -> Callable[[], None]:
    """Return what makes a process do something just before its `number`-th call of a function."""

    def patch() -> None:
        real, calls = getattr(owner, name), iter(range(1, 10**6))

        def call(*arguments: Any, **options: Any) -> Any:
            if next(calls) == number:
                action()
            return real(*arguments, **options)

        setattr(owner, name, call)

    return patch


def die() -> None:
    """Kill this process."""
    os.kill(os.getpid(), signal.SIGKILL)


def sleep() -> None:
    """Stop this process until it is told to go on."""
    os.kill(os.getpid(), signal.SIGSTOP)
