"""Measures the compiled kernels: gigabytes of inputs a second of one core's CPU time, a million elements in the cache.

    python tools/measure/kernels.py [NAME...] [--runs 7]
    python tools/measure/kernels.py --against CHECKOUT          # the same kernels of a second checkout, alternately

A base and three fine-tunes in bf16, their Fisher diagonals in fp32. Each kernel is called as the engine calls it for a
block, by a process of its own for each checkout; the median of the runs counts. The statistics of a method are rows of
their own: what a TIES merge costs is `ties` plus three times `counting a window`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from streammerge.algebra.block import Block, Call, Operand
from streammerge.algebra.rules import FisherMean, Rule, TaskVectorMerge, WeightedSum
from streammerge.algebra.task_vectors import Cut, RankDrop, TaskVector
from streammerge.backends.cpu.compile import ensure_compiled, kernels_of_call, kernels_of_rule
from streammerge.backends.cpu.math import KernelMath
from streammerge.backends.cpu.memory import BlockMemory
from streammerge.numerics.crc32 import crc32
from streammerge.numerics.ordered_sum import BLOCK
from streammerge.numerics.philox import RandomKeys

_MODELS = 3
_ROWS, _ROW = 256, 4096
_N = _ROWS * _ROW
_WINDOW = (0, (1 << 31) - 1, 15)
_LEAST_SECONDS = 0.05
"""A run repeats a kernel for at least this long, so that the clock's steps do not show."""


class Kernel(NamedTuple):
    """One row of the table."""

    run: Callable[[], object]
    nbytes: int
    """Of the inputs that a call reads."""
    groups: frozenset[str]
    """The groups of compiled kernels that it needs."""


def made_block() -> tuple[Block, Operand]:
    """Return a block of a base, its fine-tunes and their diagonals, and an output behind them."""
    rng = np.random.default_rng(0)
    base = rng.normal(0, 0.02, _N).astype(np.float32)
    models = [base, *(base + rng.normal(0, 0.002, _N).astype(np.float32) for _ in range(_MODELS))]
    halves = [(values.view(np.uint32) + 0x8000 >> 16).astype(np.uint16) for values in models]
    diagonals = [(rng.normal(0, 1e-3, _N) ** 2).astype(np.float32) for _ in range(_MODELS)]
    parts: list[NDArray[Any]] = [*halves, *diagonals, np.zeros(_N, np.uint16)]
    dtypes = ["BF16"] * (_MODELS + 1) + ["F32"] * _MODELS + ["BF16"]
    offsets = np.cumsum([0, *(part.nbytes for part in parts)])
    operands = [Operand(int(at), dtype) for at, dtype in zip(offsets, dtypes, strict=False)]
    keys = RandomKeys(0, tuple("abc"))
    buffer = np.concatenate([part.view(np.uint8) for part in parts])
    first, last = _MODELS + 1, 2 * _MODELS + 1
    block = Block(
        buffer,
        tuple(operands[1:first]),
        operands[0],
        "t",
        0,
        _N,
        (_ROWS, _ROW),
        keys,
        tuple(operands[first:last]),
    )
    return block, operands[last]


def trimmed(block: Block, model: int, density: float) -> TaskVector:
    """Return a task vector cut at its largest magnitudes, with ties thinned."""
    assert block.base is not None
    memory = BlockMemory(block)
    delta = memory.widened(block.models[model], 0, _N) - memory.widened(block.base, 0, _N)
    magnitudes = delta.view(np.uint32) & 0x7FFFFFFF
    key = np.partition(magnitudes, int((1 - density) * _N))[int((1 - density) * _N)]
    return TaskVector(model, cut=Cut(int(key), "thin", 1 << 31))


def all_kernels() -> dict[str, Kernel]:
    """Return the kernels by their name in the table."""
    block, out = made_block()
    math = KernelMath(block)
    each = range(_MODELS)
    plain = tuple(TaskVector(i) for i in each)
    halved = tuple(TaskVector(i, drop=1 << 31, rescale=2.0) for i in each)
    cut = tuple(trimmed(block, i, 0.2) for i in each)
    ranked = tuple(TaskVector(i, rank_drop=RankDrop(0.4, 0.2)) for i in each)
    thetas, with_base, one = 2 * _N * _MODELS, 2 * _N * (_MODELS + 1), 4 * _N
    two = KernelMath(Block(block.buffer, block.models[:1], block.base, "t", 0, _N, (_N,), block.keys))
    bins = np.zeros(1 << 16, np.int32)
    assert cut[0].cut is not None
    near = (cut[0].cut.key - 1000, cut[0].cut.key + 1000, 0)  # as after a sample: few patterns are inside
    unequal = tuple(
        TaskVector(v.model, weight=w, cut=v.cut) for v, w in zip(cut, (0.5, 0.3, 0.2), strict=True)
    )

    def rule(rule: Rule, nbytes: int) -> Kernel:
        return Kernel(lambda: math.apply(rule, out), nbytes, kernels_of_rule(rule))

    def call(name: str, subject: object, run: Callable[[], object], nbytes: int) -> Kernel:
        return Kernel(run, nbytes, kernels_of_call(Call(name, subject)))

    return {
        "weighted sum": rule(WeightedSum((1.0,) * _MODELS, float(_MODELS)), thetas),
        "weighted sum of two": Kernel(
            lambda: two.apply(WeightedSum((0.6,), base_weight=0.4), out), one, frozenset({"weighted_sum"})
        ),
        "task arithmetic": rule(TaskVectorMerge(plain), with_base),
        "dare_linear": rule(TaskVectorMerge(halved), with_base),
        "ties": rule(TaskVectorMerge(cut, elect=True, normalize=True), with_base),
        "ties, unequal weights": rule(TaskVectorMerge(unequal, elect=True, normalize=True), with_base),
        "dare_ties": rule(TaskVectorMerge(halved, elect=True), with_base),
        "della": rule(TaskVectorMerge(ranked, elect=True), with_base),
        "fisher mean": rule(FisherMean((1.0,) * _MODELS, (1e-9,) * _MODELS), 3 * thetas),
        "counting keys": call("count_keys", plain[0], lambda: math.count_keys(plain[0], *_WINDOW, bins), one),
        "counting a window": call(
            "count_keys", plain[0], lambda: math.count_keys(plain[0], *near, bins), one
        ),
        "dot products of two": call("dots", (), lambda: two.dots((), BLOCK), one),
        "sums of magnitudes": call("abs_sums", plain[0], lambda: math.abs_sums(plain[0]), one),
        "CRC-32": Kernel(lambda: crc32(block.buffer[: 2 * _N]), 2 * _N, frozenset()),
    }


def speed_of(kernel: Kernel) -> float:
    """Return the bytes of inputs that a kernel reads in a second of CPU time."""
    calls, began = 0, time.thread_time()
    while (passed := time.thread_time() - began) < _LEAST_SECONDS:
        kernel.run()
        calls += 1
    return calls * kernel.nbytes / passed


def serve() -> None:
    """Answer each name of a kernel on the standard input with its speed."""
    kernels = all_kernels()
    if (reason := ensure_compiled(frozenset().union(*(one.groups for one in kernels.values())))) is not None:
        sys.exit(reason)
    for one in kernels.values():
        one.run()
    print(*kernels, sep="\t", flush=True)
    for line in sys.stdin:
        print(speed_of(kernels[line.strip()]), flush=True)


class Server:
    """A process that measures the kernels of one checkout.

    Parameters
    ----------
    checkout
        The folder that contains the package; None: the package that this process would import.
    """

    def __init__(self, checkout: Path | None) -> None:
        path = [str(checkout.resolve()) if checkout else "", os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(part for part in path if part)}
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--serve"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.names = self._answer().split("\t")

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline().strip()
        if not line:
            sys.exit("a process that measures has ended")
        return line

    def speed(self, name: str) -> float:
        """Measure one kernel, in bytes a second."""
        assert self._process.stdin is not None
        self._process.stdin.write(name + "\n")
        self._process.stdin.flush()
        return float(self._answer())

    def end(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def measure(names: Sequence[str], servers: Sequence[Server], runs: int) -> None:
    """Print a line a kernel: GB/s of each checkout, and with two the share of the other's time that this one takes."""
    others = len(servers) > 1
    print(f"{'kernel':24}" + ("  before, GB/s   after, GB/s   time" if others else "  GB/s"))
    for name in names or servers[0].names:
        found = [[server.speed(name) for server in servers] for _ in range(runs)]
        now, *before = (median(run[i] for run in found) / 1e9 for i in range(len(servers)))
        ratio = median(run[-1] / run[0] for run in found)
        told = f"{before[0]:14.2f} {now:13.2f} {100 * ratio:4.0f} %" if others else f"{now:6.2f}"
        print(f"{name:24}{told}", flush=True)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="default: all kernels")
    parser.add_argument("--against", type=Path, metavar="CHECKOUT", help="a checkout to compare with")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.serve:
        serve()
        return
    checkouts = [Path(__file__).parents[2], *([asked.against] if asked.against else [])]
    servers = [Server(checkout) for checkout in checkouts]
    try:
        measure(asked.names, servers, asked.runs)
    finally:
        for server in servers:
            server.end()


if __name__ == "__main__":
    main()
