"""A warm process that forks merges which share one output. Prints, as JSON, how each scene ended: empty, or a traceback.

python -m tests.laws.joined.forks WORKDIR [SCENE...]
"""

from __future__ import annotations

import errno
import json
import os
import signal
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # a process of one thread may be forked

import streammerge.api
from streammerge.engine import joined_session
from streammerge.engine.joined_session import JoinedSession
from streammerge.engine.streaming import Streamer
from streammerge.io import allocate
from streammerge.output import commit as committing
from streammerge.output import joining
from streammerge.output.own_shards import OwnShards, Publisher
from streammerge.output.place import STATE
from streammerge.output.shards import ShardWriter
from streammerge.output.shared_ledger import SharedLedger
from tests.laws.joined.maker import DARE, MAJORITY, WHOLE, Maker, use
from tests.laws.joined.running import run_scenes
from tests.laws.joined.scene import LATE, Scene, at_call, die, quietly, sleep, wait_stopped
from tests.laws.resume.forks import contents, fork, wait

SCENES: dict[str, Callable[[Maker], None]] = {}
MOMENTS: dict[str, tuple[Any, str, int]] = {
    "before its first file": (OwnShards, "begin", 1),
    "in its first shard": (ShardWriter, "write", 1),
    "in its second shard": (ShardWriter, "write", 3),
    "before it records": (SharedLedger, "record", 1),
    "before it gives up": (joined_session, "confirm", 1),
    "in the commit, before the first name": (Publisher, "publish", 1),
    "in the commit, between names": (Publisher, "publish", 3),
    "in the commit, before the manifest": (committing, "seal", 1),
    "after the commit": (joining, "sweep_shards", 1),
    "before the ledger goes": (joining, "remove_state", 1),
}


def scene(function: Callable[[Maker], None]) -> Callable[[Maker], None]:
    """Register a scene under the name of its function."""
    SCENES[function.__name__] = function
    return function


@scene
def every_method(of: Maker) -> None:
    """One, two or three processes give the bytes, the index and the manifest of one that is alone."""
    from tests.laws.test_methods import VARIANTS

    use(1 << 26)  # methods that hold whole tensors need some room
    cases: dict[str, tuple[str, dict[str, Any]]] = {}
    for number, (method, parameters) in enumerate(VARIANTS):
        if method not in {name for name, _ in cases.values()} or _at_model_scope(parameters):
            cases[f"{number}"] = (method, parameters)
    of.write(cases)
    _share({str(case): Scene(of.directory, of.config(name), name) for name, case in cases.items()})


@scene
def every_kind(of: Maker) -> None:
    """Two or three processes give the bytes of one, whatever the inputs and outputs are."""
    from tests.laws.joined.kinds import written

    use(1 << 26)

    def write() -> None:
        (of.directory / "kinds.json").write_text(json.dumps(written(of.directory / "models")))

    (of.directory / "models").mkdir()
    assert wait(fork(write), 300) == 0
    configs = json.loads((of.directory / "kinds.json").read_text())
    scenes = {name: Scene(of.directory, config, name) for name, config in configs.items()}
    _share(scenes, least=1, shard_size=4000)
    few = [name for name, one in scenes.items() if len(list(one.out.rglob("*.safetensors"))) < 3]
    assert not few, f"there is nothing to share out: {few}"


def _share(scenes: Mapping[str, Scene], least: int = 0, **options: Any) -> None:
    """Have one, two or three processes, but more than `least`, do each merge; compare with what one process gives alone."""

    def take_part(worker: int) -> None:
        for number, one in enumerate(scenes.values()):
            if worker <= max(least, number % 3):
                one.merge(join=True, **options)

    def alone() -> None:
        for one in scenes.values():
            one.merge(one.alone, **options)

    codes = [wait(number, 300) for number in [fork(alone), *(fork(partial(take_part, i)) for i in range(3))]]
    assert codes == [0] * 4
    for name, one in scenes.items():
        assert contents(one.out) == contents(one.alone), name


def _at_model_scope(parameters: dict[str, Any]) -> bool:
    known = {"trim_scope": "model", "zero_sign": "majority", "preset": "paper"}
    return any(parameters.get(name) == value for name, value in known.items())


@scene
def claims_that_exclude_nobody(of: Maker) -> None:
    """Three processes do everything, and commit at once."""

    def believe_all() -> None:
        SharedLedger.claim = lambda self, unit: True  # type: ignore[method-assign]

    for case in (DARE, MAJORITY):
        one = of(*case)
        one.all_well([one.start(believe_all, str(i)) for i in range(3)])


@scene
def kills(of: Maker) -> None:
    """A process that dies at any moment loses its shard to a different one, and nothing is left over."""
    one = of(*DARE)
    for moment, (owner, name, call) in MOMENTS.items():
        first = one.start(at_call(owner, name, call, die), "first")
        assert wait(first) == -signal.SIGKILL, moment
        one.all_well([one.start(name="second")])


@scene
def kills_in_the_passes(of: Maker) -> None:
    """A process that dies while the whole model is counted is replaced in its unit."""
    record, count = (SharedLedger, "record"), (Streamer, "_add_piece")
    for case, moments in (
        (WHOLE, ((record, 1), (record, 4), (record, 7), (count, 3))),
        (MAJORITY, ((record, 2),)),
    ):
        one = of(*case)
        for (owner, name), call in moments:
            assert wait(one.start(at_call(owner, name, call, die), "first")) == -signal.SIGKILL, (name, call)
            one.all_well([one.start(name="second")])


@scene
def zombies(of: Maker) -> None:
    """A process that wakes after the others have finished finds the end, changes nothing and leaves nothing."""
    one = of(*DARE)
    for moment, (owner, name, call) in list(MOMENTS.items())[1::2]:
        first = one.start(at_call(owner, name, call, sleep), "first")
        try:
            wait_stopped(first)
            time.sleep(LATE)
            second = one.start(name="second")
            assert wait(second) == 0, (moment, one.told("second").read_text())
        finally:
            os.kill(first, signal.SIGCONT)
        assert wait(first) == 0, (moment, one.told("first").read_text())
        one.finished()


@scene
def failures(of: Maker) -> None:
    """A value that is not finite is met by one process and stops all, with the same line."""
    one = of(*DARE)
    path = one.directory / "m1" / "model.safetensors"
    data = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    first, _ = json.loads(data[8:start])["layers.1.weight"]["data_offsets"]
    data[start + first + 2 * 917 : start + first + 2 * 918] = b"\xc0\x7f"  # NaN in bf16
    path.write_bytes(data)
    codes = [wait(number) for number in [one.start(name=str(i)) for i in range(3)]]
    said = {one.told(str(i)).read_text() for i in range(3)}
    assert codes == [2, 2, 2], (codes, said)
    assert len(said) == 1, said
    assert "layers.1.weight" in said.pop()
    again = one.start(name="again")
    assert wait(again) == 2


@scene
def changed_inputs(of: Maker) -> None:
    """An input that changes meanwhile stops all; what was made of the old one is not gone on with."""
    one = of(*DARE)
    path = one.directory / "m1" / "model.safetensors"
    before = path.stat()

    def touch() -> None:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 10**9))

    assert wait(one.start(at_call(joined_session, "confirm", 1, touch))) == 1
    assert "changed" in one.told("worker").read_text()
    assert wait(one.start(name="other")) == 2
    assert "with a different version of the files of" in one.told("other").read_text()
    assert not list(one.out.glob("*.safetensors"))


@scene
def full_disk(of: Maker) -> None:
    """A process that finds no room ends with 1 and gives up its shard; the others finish."""
    one = of(*DARE)

    def no_room() -> None:
        def refuse(descriptor: int, nbytes: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        allocate.fallocate = refuse

    assert wait(one.start(no_room, "full")) == 1
    assert "free some space and run the same command again" in one.told("full").read_text()
    assert not list(one.out.glob("*.partial"))
    assert not list((one.out / STATE).rglob("*.claim"))
    one.all_well([one.start()])


@scene
def alone_and_together(of: Maker) -> None:
    """What one way has finished counts as done in the other, and neither begins while the other runs."""
    one = of(*DARE)
    last = (Publisher, "publish", 1)
    # Together, then alone: all shards are recorded, the commit is not done.
    assert wait(one.start(at_call(*last, die))) == -signal.SIGKILL
    time.sleep(LATE)
    assert wait(one.start(name="alone", join=False)) == 0
    assert json.loads(one.told("alone").read_text())[1] == 0, "it wrote again what the others had finished"
    one.finished()
    # Alone, then together.
    alone = one.start(at_call(committing, "seal", 1, die), "alone", join=False)
    assert wait(alone) == -signal.SIGKILL
    assert wait(one.start(name="joined")) == 0
    assert json.loads(one.told("joined").read_text())[1] == 0, "it wrote again what one process had finished"
    one.finished()
    for join in (True, False):
        first = one.start(at_call(ShardWriter, "write", 2, sleep), "first", join=join)
        try:
            wait_stopped(first)
            assert wait(one.start(name="other", join=not join)) == 2
            assert "is writing there" in one.told("other").read_text()
        finally:
            os.kill(first, signal.SIGCONT)
        one.all_well([first])


@scene
def other_merges(of: Maker) -> None:
    """A merge with a different seed, shard size or input is refused by name, before and after the end."""
    one = of(*DARE)
    changes: dict[str, dict[str, Any]] = {"seed": {"seed": 4}, "shard size": {"shard_size": 40_000}}
    assert wait(one.start(at_call(JoinedSession, "finish", 1, die))) == -signal.SIGKILL
    for ended in (False, True):
        for what, change in changes.items():
            join = (what == "seed") != ended
            assert wait(one.start(name="other", join=join, **change)) == 2
            said = one.told("other").read_text()
            assert f"merge with a different {what}" in said, said
        if not ended:
            time.sleep(LATE)
            assert wait(one.start()) == 0
    one.finished()


@scene
def verification(of: Maker) -> None:
    """Processes that read an output together give the verdict of one, of a damaged one too, and leave nothing."""
    one = of(*DARE)
    assert wait(one.start(join=False)) == 0
    before = contents(one.out)

    def verdict(name: str, join: bool, after: Callable[[], object] = lambda: None) -> int:
        def action() -> None:
            after()
            found = streammerge.api.verify(one.out, join=join, on_event=quietly)
            one.told(name).write_text(json.dumps([found.files, found.nbytes, found.problems, found.others]))

        return fork(action)

    for damaged in (False, True):
        if damaged:
            path = sorted(one.out.glob("*.safetensors"))[1]
            path.write_bytes(path.read_bytes()[:-2] + b"\1\2")
        numbers = [verdict("alone", False)]
        # One that dies in the middle leaves what nobody believes.
        assert wait(verdict("dead", True, at_call(SharedLedger, "record", 3, die))) == -signal.SIGKILL
        time.sleep(LATE)
        numbers += [verdict(str(i), True) for i in range(2)]
        assert [wait(number) for number in numbers] == [0, 0, 0]
        said = {one.told(name).read_text() for name in ("alone", "0", "1")}
        assert len(said) == 1, said
        assert ("damaged" in said.pop()) == damaged
    assert contents(one.out).keys() == before.keys()


@scene
def stopped(of: Maker) -> None:
    """A process that is told to stop gives up its claims and leaves no file; the next goes on at once."""
    import threading

    one = of(*DARE)

    def action() -> None:
        from streammerge.errors import Stopped

        stop = threading.Event()
        at_call(ShardWriter, "write", 3, stop.set)()
        try:
            one.merge(join=True, stop=stop, signal_received=lambda: signal.SIGINT)
        except Stopped as error:
            raise SystemExit(error.exit_code) from None

    assert wait(fork(action)) == 130
    left = [path.name for path in (one.out / STATE).rglob("*") if path.suffix == ".claim"]
    signs = list((one.out / STATE / "workers").iterdir())
    recorded = len(list((one.out / STATE).rglob("*.done")))
    files = list(one.out.glob("*.partial"))
    assert len(left) == recorded, left
    assert not signs
    assert len(files) == recorded
    one.all_well([one.start()])


def _made(directory: Path) -> Maker:
    use(1 << 17)
    return Maker(directory)


if __name__ == "__main__":
    run_scenes(SCENES, _made)
