"""Compile the kernels that a merge needs once, in a process of their own.

Compiling takes over 100 MiB that a merge under `--memory 512MiB` does not have to spare, and cannot be interrupted
from within; the result is kept on disk and loaded in a fraction of a second afterwards.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import numpy as np

from streammerge.algebra.block import Block, Operand
from streammerge.algebra.rules import (
    ColumnCombination,
    FisherMean,
    RowCombination,
    SelectedMerge,
    TaskVectorMerge,
    TouchedMerge,
    WeightedSum,
)
from streammerge.algebra.scores import Importance, Score, Spread
from streammerge.algebra.task_vectors import Cut, RankDrop, TaskVector
from streammerge.backends.cpu.math import KernelMath
from streammerge.io.lock import try_lock
from streammerge.numerics.compiled import (
    NOWHERE,
    kernel_cache,
    lacking,
    look_again,
    mark_compiled,
    missing_kernels,
)
from streammerge.numerics.ordered_sum import BLOCK
from streammerge.numerics.philox import RandomKeys

_POLL_SECONDS = 0.05
_OUT = Operand(128, "BF16")
_VECTORS = tuple(TaskVector(i, drop=1 << 31, cut=Cut(1, "thin", 1 << 31)) for i in range(2))
_RANKED = tuple(TaskVector(i, rank_drop=RankDrop(0.4, 0.2)) for i in range(2))


def _ranks(math: KernelMath) -> None:
    math.count_keys(_VECTORS[0], 0, (1 << 31) - 1, 15, np.zeros(1 << 16, np.int32))
    math.ties(_VECTORS[0], 0, BLOCK)


def _ranked(math: KernelMath) -> None:
    math.abs_sums(_RANKED[0])
    math.apply(TaskVectorMerge(_RANKED, elect=True), _OUT)


def _rows(math: KernelMath) -> None:
    math.apply(RowCombination(lambda gram: gram[:, 0], _VECTORS), _OUT)


def _columns(math: KernelMath) -> None:
    math.add_column_dots(_VECTORS, np.zeros((3, 8)))
    math.apply(ColumnCombination(np.ones((2, 8)), _VECTORS), _OUT)


def _score(score: Score, math: KernelMath) -> None:
    math.count_keys(score, 0, (1 << 31) - 1, 15, np.zeros(1 << 16, np.int32))


def _select(math: KernelMath) -> None:
    math.squares(_VECTORS, None)
    math.apply(SelectedMerge(_VECTORS, None), _OUT)


def _touch(math: KernelMath) -> None:
    math.touches(_VECTORS, 0.0)
    math.apply(TouchedMerge(_VECTORS, 0.0, (1.0, 1.0)), _OUT)


def _fisher(math: KernelMath) -> None:
    math.fisher_squares(0)
    math.apply(FisherMean((1.0, 1.0), (0.0, 0.0), vectors=_VECTORS), _OUT)


def _words(math: KernelMath) -> None:
    from streammerge.kernels.deltas import words_between

    words_between(0, 8, np.zeros(4, np.uint32), 0, 8, np.empty(8, np.int64), np.empty(8, np.int64))


def _adapters(math: KernelMath) -> None:
    from streammerge.numerics.products import add_products

    for dtype in (np.float32, np.float64):
        add_products(np.ones((2, 5), dtype), np.ones((5, 3), dtype), 0, 3, np.empty((2, 3), dtype))


def _diagonals(math: KernelMath) -> None:
    from streammerge.kernels.fisher import square_sums, sums
    from streammerge.kernels.squares import add_squares

    half, full = np.zeros(8, np.uint16), np.zeros(4, np.uint32)
    square_sums(half, full, 0, 2, 4, np.empty(1))
    sums(half, full, 0, 2, 4)
    add_squares(np.zeros(8), np.zeros(8, np.float32))


GROUPS: Mapping[str, Callable[[KernelMath], object]] = {
    "weighted_sum": lambda math: math.apply(WeightedSum((1.0, 1.0)), _OUT),
    "task_vectors": lambda math: math.apply(TaskVectorMerge(_VECTORS, elect=True), _OUT),
    "ranked": _ranked,
    "ranks": _ranks,
    "abs_sums": lambda math: math.abs_sums(_VECTORS[0]),
    "dots": lambda math: math.dots(_VECTORS, BLOCK),
    "rows": _rows,
    "columns": _columns,
    "spread": partial(_score, Spread(_VECTORS)),
    "importance": partial(_score, Importance(_VECTORS[0])),
    "selected": _select,
    "touched": _touch,
    "fisher": _fisher,
    "words": _words,
    "adapters": _adapters,
    "diagonals": _diagonals,
}
"""What calls every kernel of a group once, with the argument types that are used."""


def compile_kernels(names: Iterable[str] = tuple(GROUPS)) -> None:
    """Call the kernels of some groups, and take down each that is done."""
    arena = np.zeros(64 * 4, np.uint8)
    operands = tuple(Operand(64 * i, "BF16") for i in range(2))
    keys = RandomKeys(0, ("a", "b"))
    math = KernelMath(Block(arena, operands, _OUT, "t", 0, 8, (8,), keys, operands))
    for name in names:
        GROUPS[name](math)
        mark_compiled(name)


def ensure_compiled(
    names: Iterable[str] = tuple(GROUPS), check_stop: Callable[[], object] = lambda: None
) -> str | None:
    """Compile groups of kernels in a child process unless they are; return why that failed, None if it did not.

    Parameters
    ----------
    names
        Of the groups; default: all.
    check_stop
        Called twenty times a second while waiting; what it raises ends the child first.
    """
    if (reason := missing_kernels()) is not None:
        return reason
    directory = kernel_cache().directory
    if not (needed := lacking(names)):
        return None
    if directory is None:
        return NOWHERE.format("; ".join(kernel_cache().refused))
    with _alone(os.fspath(directory), check_stop):
        look_again()  # another process may have been at it
        if needed := lacking(names):
            _compile_in_child(needed, check_stop)
    look_again()
    return f"compiling them failed in {directory}" if lacking(names) else None


def _compile_in_child(names: Sequence[str], check_stop: Callable[[], object]) -> None:
    code = f"from streammerge.backends.cpu.compile import compile_kernels; compile_kernels({list(names)})"
    child = subprocess.Popen(
        [
            sys.executable,
            "-P",
            "-c",
            code,
        ],  # -P: nothing from the directory that this happens to be called in
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )
    try:
        while child.poll() is None:
            check_stop()
            time.sleep(_POLL_SECONDS)
    finally:
        if child.poll() is None:
            child.kill()
            child.wait()


@contextmanager
def _alone(directory: str, check_stop: Callable[[], object]) -> Iterator[None]:
    """Wait until no other process compiles to a directory, and keep others waiting meanwhile."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        while True:
            try:
                if try_lock(descriptor):
                    break
            except OSError:
                break  # a file system without locks: work is done twice, and does no harm
            check_stop()
            time.sleep(_POLL_SECONDS)
        yield
    finally:
        os.close(descriptor)
