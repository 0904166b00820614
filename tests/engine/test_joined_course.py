"""How often a process of a shared merge asks the file system or store of the output while it waits."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from streammerge.engine.joined_course import JoinedCourse
from streammerge.engine.taking import Claiming
from streammerge.output import heartbeat
from streammerge.output.joining import shard_unit
from streammerge.output.shared_ledger import SharedLedger
from streammerge.output.volume import Folder

RUN, OURS, THEIRS = "0123456789abcdef", "00000001", "00000002"
SECONDS = 130.0
"""Longer than twice the time after which a sign of life is stale."""


class Clock:
    """A clock that goes on when somebody waits; an event that is never set."""

    def __init__(self) -> None:
        self.now = 0.0
        self.wished: list[float] = []
        """The times at which the sync of what is written was wished."""

    def wait(self, seconds: float) -> bool:
        self.now += seconds
        return False

    def is_set(self) -> bool:
        return self.now >= SECONDS

    def set(self) -> None:
        self.wished.append(self.now)


class Counted:
    """A volume that counts what it is asked."""

    def __init__(self, volume: Folder) -> None:
        self._volume = volume
        self.asked = Counter[str]()

    def __getattr__(self, name: str) -> Any:
        self.asked[name] += name not in ("domain", "has_ended")
        return getattr(self._volume, name)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(heartbeat.time, "monotonic", lambda: clock.now)
    return clock


@pytest.fixture
def volume(tmp_path: Path) -> Counted:
    folder = Folder(tmp_path)
    folder.prepare(RUN)
    SharedLedger(folder, RUN, OURS).found({"identity": {}})
    for worker in (OURS, THEIRS):
        sign = {"host": "n", "pid": 1, "domain": "elsewhere", "run": RUN, "progress": {}}
        folder.put(f"workers/{worker}.json", json.dumps(sign).encode())
    return Counted(folder)


def course(volume: Counted, clock: Clock, n_shards: int, finished: set[int]) -> JoinedCourse:
    shards = [SimpleNamespace(nbytes=100, parts=()) for _ in range(n_shards)]
    plan = SimpleNamespace(
        layout=SimpleNamespace(shards=shards),
        jobs=(),
        streamed=False,
        budget=SimpleNamespace(threads=1),
    )
    worker = SimpleNamespace(plan=plan, stop=clock, due=clock)
    writer = SimpleNamespace(begin=lambda number: None)
    ledger = SharedLedger(cast(Any, volume), RUN, OURS)
    taking = Claiming()
    return JoinedCourse(
        cast(Any, worker),
        ledger,
        cast(Any, writer),
        OURS,
        taking,
        finished,
        lambda done: None,
        lambda: None,
    )


def test_a_process_that_waits_for_others_asks_four_times_a_second_at_most(
    volume: Counted, clock: Clock
) -> None:
    """However many parts the others have claimed."""
    theirs = SharedLedger(Folder(volume.root), RUN, THEIRS)
    assert all(theirs.claim(shard_unit(number)) for number in range(40))
    waiting = course(volume, clock, 40, set())._claimed()
    assert next(waiting) is None
    first, volume.asked = volume.asked.total(), Counter()
    assert first > 40  # it has looked at every claim once
    assert list(waiting) == [None] * (len(range(int(SECONDS) * 4)) - 1)
    assert volume.asked.total() <= 4 * SECONDS, volume.asked
    assert volume.asked["create"] == 0
    assert 2 <= volume.asked["age"] <= 4  # a sign is looked at again when it may have gone stale


def test_a_part_that_is_given_up_is_taken_at_the_next_look(volume: Counted, clock: Clock) -> None:
    theirs = SharedLedger(Folder(volume.root), RUN, THEIRS)
    assert theirs.claim(shard_unit(0))
    waiting = course(volume, clock, 1, set())._claimed()
    assert next(waiting) is None
    theirs.release()
    assert next(number for number in waiting if number is not None) == 0
    assert clock.now <= 1.0


def test_a_part_whose_process_goes_stale_is_taken_then(
    volume: Counted, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = SharedLedger(Folder(volume.root), RUN, THEIRS)
    assert theirs.claim(shard_unit(0))
    monkeypatch.setattr(Folder, "age", lambda own, name: clock.now)
    waiting = course(volume, clock, 1, set())._claimed()
    assert next(number for number in waiting if number is not None) == 0
    assert 60.0 < clock.now <= 62.0


def test_a_process_that_waits_for_its_own_part_asks_nothing(volume: Counted, clock: Clock) -> None:
    """It looks at its own state twenty times a second, and wishes a sync four times."""
    finished: set[int] = set()
    waiting = course(volume, clock, 2, finished)._claimed()
    assert next(waiting) in (0, 1)
    volume.asked.clear()
    while clock.now < 10.0:
        assert next(waiting) is None
    once = volume.asked.total()
    assert once <= 6, volume.asked
    while clock.now < 20.0:
        assert next(waiting) is None
    assert volume.asked.total() == once
    apart = [later - earlier for earlier, later in zip(clock.wished, clock.wished[1:], strict=False)]
    assert len(apart) > 70
    assert min(apart) >= 0.2499
    began = clock.now
    finished |= {0, 1}
    assert next(waiting) in (0, 1)
    assert clock.now - began <= 0.1
