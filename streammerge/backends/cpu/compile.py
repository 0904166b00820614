"""Compile the kernels that a merge needs, once, in a child process.

Compiling needs over 100 MiB, which a merge under `--memory 512MiB` cannot spare, and a process cannot interrupt its own
compiler. The result is cached on disk and later loads in a fraction of a second.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np

from streammerge.algebra.block import Block, BlockMath, Operand
from streammerge.backends.cpu.math import KernelMath
from streammerge.backends.cpu.memory import kernels
from streammerge.backends.cpu.registry import (
    OUT,
    answers,
    example,
    groups,
    kernels_of_call,
    kernels_of_rule,
)
from streammerge.io.lock import try_lock
from streammerge.numerics.compiled import (
    NOWHERE,
    is_compiled,
    kernel_cache,
    lacking,
    look_again,
    mark_compiled,
    unusable_kernels,
)
from streammerge.numerics.exporting import export
from streammerge.numerics.philox import RandomKeys

__all__ = ["GROUPS", "compile_kernels", "ensure_compiled", "kernels_of_call", "kernels_of_rule"]

_POLL_SECONDS = 0.05


# --- kernels that no method of a block calls


@answers("words", call="words_between")
@example("words")
def _words(math: BlockMath) -> None:
    kernels().deltas.words_between(
        0, 8, np.zeros(4, np.uint32), 0, 8, np.empty(8, np.int64), np.empty(8, np.int64)
    )


@example("adapters")
def _adapters(math: BlockMath) -> None:
    from streammerge.numerics.products import add_products

    for dtype in (np.float32, np.float64):
        add_products(np.ones((2, 5), dtype), np.ones((5, 3), dtype), 0, 3, np.empty((2, 3), dtype))


@example("decoding")
def _decoding(math: BlockMath) -> None:
    from streammerge.numerics.decoding import decode, turn

    codes, scales, out = np.zeros(4, np.uint8), np.ones((1, 1), np.float32), np.empty(4, np.float32)
    decode(0, codes, 0, 2, scales, (0, 0), (2, 2), (2, 2), out)
    turn(out.reshape(2, 2), np.empty(4, np.float32), 2)


@example("unpacking")
def _unpacking(math: BlockMath) -> None:
    from streammerge.numerics.decoding import turn
    from streammerge.numerics.packing import NONE
    from streammerge.numerics.unpacking import look_up, scale_integers, unpack

    raw, codes, out = np.zeros(16, np.uint8), np.empty(8, np.uint8), np.empty(8, np.float32)
    unpack(raw, 4, 0, 4, np.zeros(8, np.uint64), (1, 8), codes)
    turn(codes.reshape(2, 4), np.empty(8, np.uint8), 2)
    ones, shape = np.ones((1, 1), np.float32), (1, 8)
    scale_integers(codes, 8, np.uint8(0), 0, ones, ones, NONE, (0, 0), shape, shape, 1, out, 8)
    look_up(raw, 0, False, np.zeros((1, 16), np.float32), np.zeros(1, np.int32), 0, 8, out)


@example("encoding_f8")
def _codes(math: BlockMath) -> None:
    from streammerge.numerics.encoding_loops import largest_patterns, write_f8

    values = np.ones((2, 4), np.float32)
    largest_patterns(values.view(np.uint32), 2, 2, np.zeros((1, 2), np.uint32))
    write_f8(values, np.ones((1, 2), np.float32), 2, 2, np.empty((2, 4), np.uint8))


@example("encoding_small")
def _small_codes(math: BlockMath) -> None:
    from streammerge.numerics.encoding_loops import write_f4, write_integers

    values, ones = np.ones((2, 4), np.float32), np.ones((1, 2), np.float32)
    write_f4(values, np.float32(1), ones, 2, 2, np.empty((2, 2), np.uint8))
    write_integers(values, ones, 2, 2, 8, np.empty((2, 4), np.int8))


@example("diagonals")
def _diagonals(math: BlockMath) -> None:
    from streammerge.kernels.fisher import square_sums, sums
    from streammerge.kernels.operands import Operand as Diagonal
    from streammerge.kernels.squares import add_squares

    diagonal = Diagonal(np.zeros(8, np.uint16), np.zeros(4, np.uint32), 0, 2)
    square_sums(diagonal, 4, np.empty(1))
    sums(diagonal, 4)
    add_squares(np.zeros(8), np.zeros(8, np.float32))


GROUPS = tuple(groups())
"""The names of all groups of kernels."""


def compile_kernels(names: Iterable[str] = GROUPS) -> None:
    """Run the examples of some groups of kernels, and mark each finished group."""
    for name in names:
        _run_examples(name)
        mark_compiled(name)
    export()


def load_kernels(names: Iterable[str]) -> None:
    """Load those of some groups of kernels that are compiled already, by running their examples."""
    for name in names:
        if is_compiled(name):
            _run_examples(name)


def _run_examples(name: str) -> None:
    buffer = np.zeros(64 * 4, np.uint8)
    operands = tuple(Operand(64 * i, "BF16") for i in range(2))
    keys = RandomKeys(0, ("a", "b"))
    math = KernelMath(Block(buffer, operands, OUT, "t", 0, 8, (8,), keys, operands))
    for run in groups()[name]:
        run(math)


def ensure_compiled(
    names: Iterable[str] = GROUPS, check_stop: Callable[[], object] = lambda: None
) -> str | None:
    """Compile missing groups of kernels in a child process; return why that failed, or None.

    Parameters
    ----------
    names
        Names of the groups; default: all.
    check_stop
        Called twenty times a second while waiting; an exception that it raises ends the child and propagates.
    """
    if (reason := unusable_kernels(names)) is not None:
        return reason
    directory = kernel_cache().directory
    if not (needed := lacking(names)):
        return None
    if directory is None:
        return NOWHERE.format("; ".join(kernel_cache().refused))
    with _alone(directory, needed, check_stop):
        look_again()  # a different process may have compiled them
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
        ],  # -P: import nothing from the current directory
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
def _alone(directory: Path, names: Iterable[str], check_stop: Callable[[], object]) -> Iterator[None]:
    """Hold the locks of groups of kernels, so that only one process compiles each.

    Every process takes them in alphabetical order, so that none waits for one that waits for it.
    """
    with ExitStack() as held:
        for name in sorted(names):
            try:
                descriptor = os.open(directory / f"{name}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
                held.callback(os.close, descriptor)
                while not try_lock(descriptor):
                    check_stop()
                    time.sleep(_POLL_SECONDS)
            except OSError:
                pass  # a full disk, or one without locks: kernels may be compiled twice, which is harmless
        yield
