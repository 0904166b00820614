"""Undecided elements are kept as they were read, and searched a few at a time."""

from __future__ import annotations

import numpy as np

from streammerge.engine.aside import _COMPARED_AT_ONCE, Undecided


def test_ties_are_found_across_the_parts_in_which_they_are_searched() -> None:
    n = 2 * _COMPARED_AT_ONCE + 5
    base = np.arange(n, dtype=np.float32)
    sign = np.where(np.arange(n) % 2, -1, 1).astype(np.float32)
    other = base + sign * (np.arange(n) % 3 == 0)
    places = np.arange(7, 7 + 2 * n, 2, dtype=np.uint32)
    undecided = Undecided(("F32", "F32"), places, values=[base.view(np.uint8), other.view(np.uint8)])
    one = int(np.float32(1).view(np.uint32))
    found = np.concatenate(list(undecided.tied(0, one)))
    assert found.tolist() == places[::3].tolist()
