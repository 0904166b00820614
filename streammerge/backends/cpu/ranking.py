"""Counts ranked elements on the CPU: task vectors by a separate kernel, scores tile by tile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from streammerge.algebra.block import Bins, BlockMath, Counts
from streammerge.algebra.scores import Ranked, Score
from streammerge.algebra.task_vectors import TaskVector
from streammerge.backends.cpu.memory import BlockMemory, kernels
from streammerge.backends.cpu.registry import VECTORS, Names, example
from streammerge.backends.cpu.tiles import SCORES, Tiles
from streammerge.numerics.ordered_sum import BLOCK


class Ranking(NamedTuple):
    """The functions that count elements ranked by one class: task vectors or scores."""

    kernels: str
    """The group of kernels that it calls."""
    count_keys: Callable[[BlockMemory, Any, Any, Bins], tuple[int, int]]
    """See `BlockMath.count_keys`; the third argument is a `Window`."""
    ties: Callable[[BlockMemory, Any, int, int], Counts]
    """See `BlockMath.ties`."""


def _count_magnitudes(memory: BlockMemory, vector: TaskVector, window: Any, bins: Bins) -> tuple[int, int]:
    above, highest = kernels().magnitudes.keys_in_window(
        *memory.pair(vector), memory.span(), memory.masks((vector,), cut=False), window, bins
    )
    return int(above), int(highest)


def _tied_magnitudes(memory: BlockMemory, vector: TaskVector, key: int, size: int) -> Counts:
    counts = np.zeros(-(-memory.block.n // size), np.int64)
    kernels().magnitudes.ties_per_run(
        *memory.pair(vector), memory.span(), memory.masks((vector,), cut=False), key, size, counts
    )
    return counts


def _count_scores(memory: BlockMemory, score: Score, window: Any, bins: Bins) -> tuple[int, int]:
    above, highest, tiles = 0, 0, Tiles(memory)
    for span in tiles.spans():
        more, top = kernels().scores.count_patterns(tiles.patterns(score, span), window, bins)
        above, highest = above + int(more), max(highest, int(top))
    return above, highest


def _tied_scores(memory: BlockMemory, score: Score, key: int, size: int) -> Counts:
    counts, tiles = np.zeros(-(-memory.block.n // size), np.int64), Tiles(memory)
    for first, n in tiles.spans():
        places = first + np.flatnonzero(tiles.patterns(score, (first, n)) == key)
        counts += np.bincount(places // size, minlength=counts.size)
    return counts


_RANKINGS: dict[type, Ranking] = {
    TaskVector: Ranking("ranks", _count_magnitudes, _tied_magnitudes),
    **{kind: Ranking(group, _count_scores, _tied_scores) for kind, (group, _) in SCORES.items()},
}


def ranking_of(subject: Ranked) -> Ranking:
    """Return the counting functions for a task vector or a score."""
    return _RANKINGS[type(subject)]


def kernels_of_ranking(subject: Ranked) -> Names:
    """Return the groups of kernels that counting it calls."""
    return frozenset({ranking_of(subject).kernels})


@example("ranks")
def _ranks(math: BlockMath) -> None:
    math.count_keys(VECTORS[0], 0, (1 << 31) - 1, 15, np.zeros(1 << 16, np.int32))
    math.ties(VECTORS[0], 0, BLOCK)
