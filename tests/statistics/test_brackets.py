"""Thresholds from a sample are computed in the room that is given."""

from __future__ import annotations

import tracemalloc

import numpy as np

from streammerge.statistics.brackets import ROOM, bracket, end_of_ties


def test_a_bracket_takes_no_memory_of_its_own() -> None:
    keys = np.random.default_rng(3).integers(0, 50_000, (64, 4096), dtype=np.uint32)
    before, room = keys.copy(), np.empty(ROOM * keys.size, np.uint8)
    tracemalloc.start()
    try:
        low, high = bracket(keys, 0.3, room)
        end_of_ties(keys, range(0, keys.size, 4096), low, late=True)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < keys.size // 2  # a byte for each pattern would be more
    assert low.key < np.quantile(keys, 0.7) < high.key
    assert (keys == before).all()
