"""A warm process that forks merges which share one output in an object store. Prints, as JSON, how each scene ended.

python -m tests.laws.joined.store_forks WORKDIR [SCENE...]

The environment names the store's endpoint. Only forks ask it, because the library that does so has threads.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # a process of one thread may be forked

from streammerge.engine import joined_session
from streammerge.engine.streaming import Streamer
from streammerge.io.object_upload import Upload
from streammerge.io.volumes import as_path
from streammerge.output import object_commit, object_volume
from streammerge.output.heartbeat import STALE_SECONDS
from streammerge.output.object_shards import ObjectShards
from streammerge.output.shared_ledger import SharedLedger
from tests.laws.joined.maker import DARE, WHOLE, Maker
from tests.laws.joined.running import run_scenes
from tests.laws.joined.scene import SHARD, Scene, at_call, die, quietly, sleep, wait_stopped
from tests.laws.resume.forks import fork, wait
from tests.patience import PATIENCE

SCENES: dict[str, Callable[[Path], None]] = {}
STALE, LATE = 2.0, 4.0
"""Seconds: a store tells times in whole seconds."""
MOMENTS: dict[str, tuple[Any, str, int]] = {
    "in its first shard": (ObjectShards, "write", 1),
    "before a shard gets its name": (ObjectShards, "end", 1),
    "before it records": (SharedLedger, "record", 1),
    "before it gives up": (joined_session, "confirm", 1),
    "in the commit, before the manifest": (object_commit, "seal", 1),
    "in the commit, before the index": (object_commit, "put_object", 4),
    "after the commit": (object_volume.ObjectFolder, "discard", 1),
    "before the ledger goes": (object_volume.ObjectFolder, "clear", 1),
}


def scene(function: Callable[[Path], None]) -> Callable[[Path], None]:
    """Register a scene under the name of its function."""
    SCENES[function.__name__] = function
    return function


class StoreScene(Scene):
    """One merge into a folder of the bucket ``bench``, and what it gives in a directory."""

    def __init__(
        self, directory: Path, case: tuple[str, dict[str, Any]], name: str = "out", shard_size: int = SHARD
    ) -> None:
        maker = Maker(directory)
        maker.write({name: case})
        super().__init__(directory, maker.config(name), name)
        self.out = as_path(f"s3://bench/{directory.parent.name}-{directory.name}/{name}")
        self._shard_size = shard_size

    def merge(self, out: Path | None = None, **options: Any) -> Any:
        """Merge in this process."""
        return super().merge(out, **{"shard_size": self._shard_size, **options})

    def finished(self) -> None:
        """See that every object is there, byte for byte, and nothing else; then remove all."""
        assert self.expected  # made before a fork asks the store
        number = fork(self._look)
        assert wait(number) == 0, self.told("look").read_text()

    def _look(self) -> None:
        from streammerge.io.object_small import list_objects, read_small, remove_object

        found = {name: read_small(f"{self.out}/{name}") for name in list_objects(str(self.out), 1000)}
        expected = self.expected
        differ = sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))
        self.told("look").write_text(f"{differ} differ; there are {sorted(found)}")
        assert not differ, differ
        for name in found:
            remove_object(f"{self.out}/{name}")


@scene
def every_kind(directory: Path) -> None:
    """Two or three processes give the bytes, the index and the manifest of one that merges into a directory."""
    for number, case in enumerate(
        (DARE, WHOLE)
    ):  # every other kind is shared by the same files in a directory
        one = StoreScene(directory, case, f"out{number}")
        one.all_well([one.start(name=str(i)) for i in range(3 - number)])


@scene
def claims_that_exclude_nobody(directory: Path) -> None:
    """Two processes do everything, and commit at once."""

    def believe_all() -> None:
        SharedLedger.claim = lambda self, unit: True  # type: ignore[method-assign]

    one = StoreScene(directory, DARE)
    one.all_well([one.start(believe_all, str(i)) for i in range(2)])


@scene
def one_shard(directory: Path) -> None:
    """An only shard ends last, by whoever has it; the others wait."""
    one = StoreScene(directory, DARE, shard_size=10**9)
    one.all_well([one.start(name=str(i)) for i in range(2)])
    assert wait(one.start(at_call(object_commit, "seal", 1, die), "first")) == -signal.SIGKILL
    one.all_well([one.start(name="second")])


@scene
def kills(directory: Path) -> None:
    """A process that dies at any moment loses its shard to a different one, at once on the same machine."""
    one = StoreScene(directory, DARE)
    for moment, (owner, name, call) in list(MOMENTS.items())[::2]:
        assert wait(one.start(at_call(owner, name, call, die), "first")) == -signal.SIGKILL, moment
        one.all_well([one.start(name="second")])
    one = StoreScene(directory, WHOLE, "counted")
    assert wait(one.start(at_call(Streamer, "_add_piece", 3, die), "first")) == -signal.SIGKILL
    one.all_well([one.start(name="second")])


@scene
def zombies(directory: Path) -> None:
    """A process that wakes after the others have finished finds the end, changes nothing and leaves nothing."""
    scenes = {moment: StoreScene(directory, DARE, f"out{i}") for i, moment in enumerate(list(MOMENTS)[1::2])}
    asleep = {}
    for moment, one in scenes.items():
        owner, name, call = MOMENTS[moment]
        asleep[moment] = one.start(at_call(owner, name, call, sleep), f"{one.alone.name}-first")
        wait_stopped(asleep[moment])
    time.sleep(LATE)
    others = {moment: one.start(name=f"{one.alone.name}-second") for moment, one in scenes.items()}
    for moment, one in scenes.items():
        ended = wait(others[moment])
        os.kill(asleep[moment], signal.SIGCONT)
        assert ended == 0, (moment, one.told(f"{one.alone.name}-second").read_text())
        assert wait(asleep[moment]) == 0, (moment, one.told(f"{one.alone.name}-first").read_text())
        one.finished()


@scene
def a_different_merge(directory: Path) -> None:
    """It is refused by name while the first is unfinished and afterwards; one that is asked to replace it waits for it."""
    one = StoreScene(directory, DARE)
    os.environ[STALE_SECONDS] = "60"
    first = one.start(at_call(Upload, "finish", 2, sleep), "first")
    wait_stopped(first)
    for join in (True, False):
        assert wait(one.start(name="other", join=join, seed=4)) == 2
        assert "holds an unfinished merge with a different seed" in one.told("other").read_text()
    assert wait(one.start(name="other", join=False, overwrite=True, seed=4)) == 2
    assert "is writing there" in one.told("other").read_text()
    os.kill(first, signal.SIGCONT)
    assert wait(first) == 0
    assert wait(one.start(name="other", seed=4)) == 2
    assert "holds a finished merge with a different seed" in one.told("other").read_text()
    one.finished()


@scene
def looking_on(directory: Path) -> None:
    """`status` tells who works there; `verify --join` gives the verdict of one process, and leaves nothing."""
    import streammerge.api
    from streammerge.output.status import status_of

    os.environ[STALE_SECONDS] = "60"  # none counts as dead, however busy the machine
    one = StoreScene(directory, DARE)
    reached, looked = directory / "reached", directory / "looked"

    def stand_still() -> None:
        reached.touch()
        _wait_for(looked)

    first = one.start(at_call(SharedLedger, "record", 2, stand_still), "first")
    _wait_for(reached)

    def look() -> None:
        found = status_of(one.out)
        assert found.shared
        assert not found.finished
        assert 1 <= found.shards_done < found.shards
        (worker,) = found.workers
        assert worker.sign.pid == first
        assert worker.units

    assert wait(fork(look)) == 0
    looked.touch()
    assert wait(first) == 0

    def verdict() -> None:
        assert status_of(one.out).finished
        found = streammerge.api.verify(one.out, join=True, on_event=quietly)
        alone = streammerge.api.verify(one.out, on_event=quietly)
        assert (found.files, found.nbytes, found.problems) == (alone.files, alone.nbytes, ())

    assert [wait(number) for number in [fork(verdict), fork(verdict)]] == [0, 0]
    one.finished()


def _wait_for(path: Path) -> None:
    until = time.monotonic() + PATIENCE
    while not path.exists() and time.monotonic() < until:
        time.sleep(0.005)


def _made(directory: Path) -> Path:
    os.environ[STALE_SECONDS] = str(STALE)
    return directory


if __name__ == "__main__":
    run_scenes(SCENES, _made)
