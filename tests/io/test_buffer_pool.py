"""Buffers that a pool lends: parts of regions whose pages are there already, and never more than its capacity."""

from __future__ import annotations

import mmap
import random
import threading
from contextlib import ExitStack
from itertools import pairwise

import pytest

from streammerge.io import buffer_pool
from streammerge.io.buffer_pool import Bytes, Pool
from tests.patience import PATIENCE

UNIT = 1 << 16
STOP = threading.Event()


@pytest.fixture
def mapped(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of all regions that pools have mapped, in units."""
    sizes: list[int] = []
    make = buffer_pool.map_memory

    def noted(size: int) -> mmap.mmap:
        sizes.append(size // UNIT)
        return make(size)

    monkeypatch.setattr(buffer_pool, "map_memory", noted)
    return sizes


def lent(held: ExitStack, pool: Pool, units: int) -> Bytes:
    """Lease a buffer that must be there at once."""
    stop = threading.Event()
    timer = threading.Timer(PATIENCE, stop.set)
    timer.start()
    buffer = held.enter_context(pool.lease(units * UNIT, stop))
    timer.cancel()
    assert buffer is not None, "it waits"
    assert buffer.size == units * UNIT
    return buffer


def test_one_large_region_is_lent_in_parts_and_is_whole_again_afterwards(mapped: list[int]) -> None:
    pool = Pool(8 * UNIT)
    with ExitStack() as held:
        lent(held, pool, 8)
    for _ in range(2):
        with ExitStack() as held:
            parts = [lent(held, pool, units) for units in (3, 1, 4)]
            for number, part in enumerate(parts):
                part[:] = number
            assert [set(part.tolist()) for part in parts] == [{0}, {1}, {2}]
        with ExitStack() as held:
            lent(held, pool, 8)
    assert mapped == [8]


def test_a_buffer_that_fits_the_capacity_waits_for_no_part_that_is_idle(mapped: list[int]) -> None:
    pool = Pool(8 * UNIT)
    with ExitStack() as first, ExitStack() as last:
        lent(first, pool, 2)
        lent(last, pool, 1)
        whole = first.pop_all()
        with ExitStack() as held:
            lent(held, pool, 5)
        whole.close()
        lent(first, pool, 7)  # of 8, though the idle parts lie on both sides of one that is lent
    assert mapped == [2, 1, 5, 7]


def test_what_is_given_back_to_the_system_is_not_held(mapped: list[int]) -> None:
    pool = Pool(8 * UNIT)
    with ExitStack() as held:
        buffer = lent(held, pool, 8)
        buffer[:] = 1
        address = buffer.ctypes.data
    with ExitStack() as outer:
        kept = lent(outer, pool, 1)
        with ExitStack() as held:
            lent(held, pool, 7)
        assert kept.ctypes.data == address
        assert mapped == [8]
        pool.close()
        with ExitStack() as held:
            fresh = lent(held, pool, 7)
            fresh[:] = 2
        assert set(kept.tolist()) == {1}
    assert mapped == [8, 7]


def test_buffers_never_exceed_the_capacity_nor_share_a_byte() -> None:
    rng, pool, capacity = random.Random(0), Pool(32 * UNIT + 1000), 32 * UNIT + 1000
    buffers: list[tuple[ExitStack, Bytes]] = []
    for _ in range(400):
        units = rng.choice((1, 2, 3, 5, 8, 13, 21, 32))
        while buffers and sum(b.size for _, b in buffers) + units * UNIT > capacity:
            held, _ = buffers.pop(rng.randrange(len(buffers)))
            held.close()
        held = ExitStack()
        buffers.append((held, lent(held, pool, units)))
        ranges = sorted((b.ctypes.data, b.ctypes.data + b.size) for _, b in buffers)
        assert all(stop <= start for (_, stop), (start, _) in pairwise(ranges))
        assert pool._held <= capacity
    for held, _ in buffers:
        held.close()
    pool.close()
    assert pool._held == 0
