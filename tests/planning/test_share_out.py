"""How a merge is shared out: the shards of each process, the idle time at the end, and what bounds it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from streammerge.planning.share_out import share_out
from streammerge.report.shares import shares_text


def plan_of(n_shards: int, passes: int = 0) -> Any:
    """Return a plan with shards of 100 bytes, for each of which 300 bytes are read."""
    shards = [SimpleNamespace(nbytes=100, parts=((i, 0),)) for i in range(n_shards)]
    jobs = [SimpleNamespace(input_bytes=300, fisher_bytes=0) for _ in shards]
    layout = SimpleNamespace(shards=shards, nbytes=100 * n_shards)
    return SimpleNamespace(jobs=jobs, layout=layout, bytes_of_passes=lambda: passes)


@pytest.mark.parametrize(
    ("shards", "workers", "rate", "store", "most", "idle", "seconds", "bound"),
    [
        (11, 8, None, None, 2, 1 - 11 / 16, None, "shards"),
        (16, 8, 100, None, 2, 0.0, 8.0, "workers"),
        (16, 8, 100, 400, 2, 0.0, 16.0, "store"),  # 6400 bytes at 400 a second
        (16, 8, 100, 4000, 2, 0.0, 8.0, "workers"),
        (3, 8, 100, None, 1, 1 - 3 / 8, 4.0, "shards"),
        (1, 1, 100, 50, 1, 0.0, 8.0, "store"),
    ],
)
def test_shards_idle_time_and_bound(
    shards: int,
    workers: int,
    rate: float | None,
    store: float | None,
    most: int,
    idle: float,
    seconds: float | None,
    bound: str,
) -> None:
    found = share_out(plan_of(shards), workers, rate, store)
    assert (found.shards, found.most, found.seconds, found.bound) == (shards, most, seconds, bound)
    assert found.idle == pytest.approx(idle)
    assert (found.better is not None) == (idle > 0.1)


def test_passes_over_the_whole_model_are_shared_too() -> None:
    assert share_out(plan_of(16, passes=800), 8, 100, None).seconds == 9.0


def test_the_text_names_the_cure() -> None:
    said = shares_text(share_out(plan_of(11), 8, None, None))
    assert said.startswith(
        "8 processes: 11 shards, at most 2 each, 31 % idle at the end; bounded by the shards"
    )
    assert "--shard-size 22B leaves less idle" in said
