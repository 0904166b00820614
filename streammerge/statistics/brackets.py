"""Two thresholds from a sample, between which the threshold of the whole tensor lies with near certainty."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from streammerge.statistics.ranks import INFINITE, Threshold

ERRORS = 5.0
"""Half the width of a bracket in standard errors; the true threshold lies outside of one in a million."""
_WHOLE = 1 << 32
"""The ties of a threshold whose limit is estimated: as many as there are random words."""
ROOM = 5
"""Bytes of room per sampled pattern: a copy of it, and a mark."""


def bracket(keys: NDArray[np.uint32], share: float, room: NDArray[np.uint8]) -> tuple[Threshold, Threshold]:
    """Return a lower and a higher threshold for the `share` of largest patterns.

    Runs of a tensor may differ (rows of an embedding do), so the error is estimated from the spread between runs.

    Parameters
    ----------
    keys
        Patterns of sampled runs of elements, (runs, length).
    share
        Fraction of the elements above the threshold, between 0 and 1.
    room
        Scratch memory of `ROOM` bytes per pattern, at a multiple of 4.
    """
    runs, size = keys.shape[0], keys.size
    ordered = room[: 4 * size].view(np.uint32)
    ordered.reshape(keys.shape)[:] = keys
    ordered.sort()
    marks = room[4 * size : ROOM * size].view(np.bool_).reshape(keys.shape)
    middle = ordered[min(size - 1, max(0, size - 1 - int(share * size)))]
    above = np.greater(keys, middle, out=marks).mean(axis=1)
    tied = np.equal(keys, middle, out=marks).mean(axis=1)
    total = float(tied.mean())
    of_ties = min(1.0, max(0.0, (share - float(above.mean())) / total)) if total else 0.0
    shares = above + of_ties * tied
    between = float(shares.var(ddof=1)) / runs if runs > 1 else 1.0
    alone = share * (1.0 - share) / size
    error = ERRORS * max(between, alone) ** 0.5 + 8 / size
    return _at(ordered, share + error), _at(ordered, share - error)


def _at(ordered: NDArray[np.uint32], share: float) -> Threshold:
    """Return the threshold for a share of the sampled patterns, in ascending order; beyond them, one of all or none."""
    rank = share * ordered.size
    if rank >= ordered.size:
        return Threshold(0, _WHOLE, _WHOLE)
    if rank <= 0:
        return Threshold(INFINITE - 1, _WHOLE, 0)
    key = int(ordered[ordered.size - 1 - int(rank)])
    # Of the same dtype, since all that is searched would be converted else.
    first, last = np.searchsorted(ordered, np.array([key, key + 1], np.uint32))
    inside = (rank - (ordered.size - int(last))) / (int(last) - int(first))
    return Threshold(key, _WHOLE, int(min(1.0, max(0.0, inside)) * _WHOLE))


def end_of_ties(
    keys: NDArray[np.uint32], starts: Sequence[int], threshold: Threshold, *, late: bool
) -> float:
    """Return a place before which the kept ties of a threshold end, or after which they do not; infinite: beyond all.

    Parameters
    ----------
    keys
        Patterns of sampled runs of elements, (runs, length).
    starts
        The first element of each run.
    threshold
        The pattern, and the share of its ties that are kept.
    late
        Whether the place is surely behind the last kept tie; else before it.
    """
    tied = np.cumsum([np.count_nonzero(run == threshold.key) for run in keys])
    share, total = threshold.needed / threshold.ties, int(tied[-1])
    margin = ERRORS * 0.5 / max(1, total) ** 0.5 + 1 / len(starts)
    wanted = (share + margin if late else share - margin) * total
    if wanted <= 0:
        return math.inf if late else 0.0
    run = int(np.searchsorted(tied, wanted)) + 2 * late
    return float(starts[run]) if run < len(starts) else math.inf
