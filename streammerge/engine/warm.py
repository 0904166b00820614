"""Compile the kernels once, in a process of their own.

Compiling takes over 100 MiB that a merge under `--memory 512MiB` does not have to spare; the result is
kept on disk and loaded in a fraction of a second afterwards.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
from pathlib import Path

import numpy as np

from streammerge.engine.adapted import add_products
from streammerge.engine.pieces import KernelMath, Loaded, Operand
from streammerge.engine.statistics import low_words
from streammerge.methods.recipes import (
    ColumnCombination,
    FisherMean,
    RowCombination,
    SelectedMerge,
    TaskVectorMerge,
    TouchedMerge,
    WeightedSum,
)
from streammerge.methods.requests import LowWords, Squares
from streammerge.methods.rng import RandomKeys
from streammerge.methods.scores import Importance, Selection, Spread
from streammerge.methods.vectors import Cut, RankDrop, TaskVector

_MARK = "compiled"


def ensure_compiled() -> bool:
    """Compile the kernels in a child process unless they are; return whether that was needed.

    Where the cache cannot be written they are compiled later, in this process.
    """
    from streammerge.kernels import cache_directory

    mark = cache_directory() / _MARK
    if mark.exists():
        return False
    code = "from streammerge.engine.warm import compile_kernels; compile_kernels()"
    done = subprocess.run(
        [sys.executable, "-c", code], check=False, stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    if done.returncode == 0:
        _touch(mark)
    return True


def _touch(mark: Path) -> None:
    with contextlib.suppress(OSError):
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()


def compile_kernels() -> None:
    """Call every kernel once with the argument types that are used."""
    from streammerge.kernels.squares import add_squares

    arena = np.zeros(64 * 4, np.uint8)
    operands = tuple(Operand(64 * i, "BF16") for i in range(2))
    keys = RandomKeys(0, ("a", "b"))
    piece = Loaded(arena, operands, Operand(128, "BF16"), "t", 0, 8, (8,), keys, operands)
    math = KernelMath(piece)
    vectors = tuple(TaskVector(i, drop=1 << 31, cut=Cut(1, "thin", 1 << 31)) for i in range(2))
    math.count_keys(vectors[0], 0, (1 << 31) - 1, 15, np.zeros(1 << 16, np.int32))
    math.abs_sums(vectors[0])
    math.ties(vectors[0], 0, 4096)
    math.apply(RowCombination(lambda gram: gram[:, 0], vectors), Operand(128, "BF16"))
    math.add_column_dots(vectors, np.zeros((3, 8)))
    math.apply(ColumnCombination(np.ones((2, 8)), vectors), Operand(128, "BF16"))
    for score in (Spread(vectors), Importance(vectors[0])):
        math.count_keys(score, 0, (1 << 31) - 1, 15, np.zeros(1 << 16, np.int32))
        selection = Selection(score, Cut(1, "index", 4))
        math.squares(Squares(vectors, selection))
        math.apply(SelectedMerge(vectors, selection), Operand(128, "BF16"))
    math.apply(TouchedMerge(vectors, 0.0, (1.0, 1.0)), Operand(128, "BF16"))
    math.apply(WeightedSum((1.0, 1.0)), Operand(128, "BF16"))
    math.apply(TaskVectorMerge(vectors, elect=True), Operand(128, "BF16"))
    ranked = tuple(TaskVector(i, rank_drop=RankDrop(0.4, 0.2)) for i in range(2))
    math.abs_sums(ranked[0])
    math.apply(TaskVectorMerge(ranked, elect=True), Operand(128, "BF16"))
    math.fisher_squares(0)
    math.apply(FisherMean((1.0, 1.0), (0.0, 0.0), vectors=vectors), Operand(128, "BF16"))
    add_products(np.ones((2, 5), np.float32), np.ones((5, 3), np.float32), 0, 3, np.empty((2, 3), np.float32))
    low_words(LowWords(TaskVector(0), 0.5), 8, keys.key("dare", 0, "t"))
    add_squares(np.zeros(8), np.zeros(8, np.float32))
