"""The law of bits: the fused kernels against the CPU's, under Triton's interpreter; no GPU is needed.

    python tools/prove/gpu_bits.py [--few] [--seeds 2] [--n 257]

Every recipe of every rule, mixes of dtypes, odd sizes and starts, and the values that betray: equal models under weights w
and -w (0 unless a product enters a sum unrounded), fp32 outputs (16 bits hide the last bits of fp64), denormals, a scale of
1e10, sums near the middle between two 16-bit numbers, zeros of both signs, NaN and infinities. `--few` is what CI runs.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import tempfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
from gpu_recipes import calls_of, decoded, rules_of
from gpu_values import FEW, INFINITE, MIXES, Mix, block_of

from streammerge.algebra.block import Block, Operand, operand_bytes
from streammerge.algebra.extent import Extent
from streammerge.algebra.rules import Rule, SelectedMerge, TaskVectorMerge, WeightedSum
from streammerge.algebra.task_vectors import RankDrop, TaskVector
from streammerge.backends.cpu.math import KernelMath
from streammerge.backends.fused import math, triton_launcher
from streammerge.backends.fused.copied import Copied
from streammerge.backends.fused.interpreter import Interpreter
from streammerge.backends.fused.math import FusedMath
from streammerge.backends.fused.triton_launcher import TritonLauncher
from streammerge.backends.torch import backend as torch_backend
from streammerge.numerics.philox import threshold

# --- the comparison


class Comparison:
    """Compares the fused kernels with the CPU's.

    Parameters
    ----------
    launcher
        What runs the fused kernels; default: the interpreter.
    tell
        Whether differences are printed.
    """

    def __init__(self, launcher: Any = None, *, tell: bool = True) -> None:
        self.launcher = launcher or Interpreter()
        self.tell = tell
        self.done = 0
        self.different: list[str] = []
        self.seconds: Counter[str] = Counter()

    def fused(self, block: Block) -> FusedMath:
        """Return the fused arithmetic of a block."""
        return FusedMath(block, self.launcher, Copied(block, self.launcher), KernelMath)

    def few(self, n: int = 131) -> None:
        """Compare what CI does: of the mixes in `FEW` each has every other rule, so that every rule meets half of them."""
        for place, number in enumerate(FEW):
            self.blocks(MIXES[number], n, 0, every=2, first=place % 2)

    def blocks(
        self, mix: Mix, n: int, seed: int, *, few: bool = False, every: int = 1, first: int = 0
    ) -> None:
        """Compare the rules and every statistic on one block; with `few` stop at the first difference."""
        block, out = block_of(mix, n, seed)
        for name, rule in itertools.islice(rules_of(block, seed), first, None, every):
            if few and self.different:
                return
            self.rule(f"{mix}, n = {n}: {name}", block, out, rule)
        if mix.start % 4096 == 0 or mix.start < 16:
            for name, call in calls_of(replace(block, start=0)):
                self.call(f"{mix}, n = {n}: {name}", replace(block, start=0), call)
        self.largest(f"{mix}, n = {n}: largest", block)

    def rule(self, name: str, block: Block, out: Operand, rule: Rule) -> None:
        """Compare a merge: the bytes of the output, and the report."""
        results = []
        for label, make in (("cpu", KernelMath), ("fused", self.fused)):
            began, own = time.process_time(), replace(block, buffer=block.buffer.copy())
            report = make(own).apply(rule, out)
            merged = own.buffer[out.offset : out.offset + operand_bytes(out, block.n)].tobytes()
            results.append((report, merged))
            self.seconds[label] += time.process_time() - began
        self._same(name, results[0] == results[1])

    def call(self, name: str, block: Block, call: Any) -> None:
        """Compare a statistic; NaN equals NaN."""
        own, fused = call(KernelMath(block)), call(self.fused(block))
        pairs = zip(own, fused, strict=True) if isinstance(own, tuple) else [(own, fused)]
        self._same(name, all(np.array_equal(a, b, equal_nan=True) for a, b in pairs))

    def largest(self, name: str, block: Block) -> None:
        """Compare thresholds found on the device with a sort."""
        dropped = TaskVector(0, drop=threshold(0.4))
        vectors = [TaskVector(0), TaskVector(len(block.models) - 1), dropped, dropped]
        ranks = [1, block.n, 1 + block.n // 5, 1 + block.n // 2]
        for vector, rank, found in zip(
            vectors, ranks, self.fused(block).largest(vectors, ranks), strict=True
        ):
            bins = np.zeros(1 << 16, np.int32)
            KernelMath(block).count_keys(vector, 0, (1 << 31) - 1, 15, bins)
            place = len(bins) - 1 - int(np.searchsorted(np.cumsum(bins[::-1]), rank))
            exact = np.zeros(1 << 15, np.int32)
            above, highest = KernelMath(block).count_keys(
                vector, place << 15, (place << 15) + 32767, 0, exact
            )
            from_top = above + np.cumsum(exact[::-1])
            at = int(np.searchsorted(from_top, rank))
            ties = int(exact[::-1][at])
            wanted = ((place << 15) + 32767 - at, ties, rank - int(from_top[at]) + ties)
            finite = wanted[0] < INFINITE
            got = (found.key, found.ties, found.needed)
            same = got == wanted if finite else found.key >= INFINITE
            self._same(f"{name} {rank}", same and min(found.highest, INFINITE) == min(highest, INFINITE))

    def sizes(self) -> None:
        """Compare blocks of odd sizes, from odd starts, by a rule that draws words and one that sums."""
        for n, start in (
            (1, 0),
            (1, 3),
            (3, (1 << 34) + 2),
            (511, 1),
            (1022, 2),
            (1023, 1),
            (1025, 5),
            (4097, 0),
        ):
            block, out = block_of(replace(MIXES[1], start=start), n, n)
            vectors = tuple(TaskVector(i, drop=threshold(0.5), rescale=2.0) for i in range(3))
            rule = TaskVectorMerge(vectors, elect=True, normalize=True)
            self.rule(f"n = {n} from {start}: dare", block, out, rule)
            self.rule(f"n = {n} from {start}: linear", block, out, WeightedSum((0.3, 0.4, 0.7), 1.4))
        for number, n, row in (
            (2, 3 * 75, 75),
            (18, 600, 300),
            (1, 128, 0),
            (15, 2, 2),
        ):  # several runs, ties over their ends
            block, out = block_of(replace(MIXES[number], row=row), n, 0)
            drop = tuple(TaskVector(i, rank_drop=RankDrop(0.3, 0.4)) for i in range(2))
            self.rule(f"rows of {row or n}: della", block, out, TaskVectorMerge(drop, elect=True))
        block, _ = block_of(MIXES[17], 9001, 0)  # of one model: a loop for each pair of models takes a second
        for name, call in calls_of(block):
            if name in ("dots", "abs sums 1", "fisher squares", "keys 0 (0, 2147483647, 16)", "ties 0"):
                self.call(f"n = 9001: {name}", block, call)
        self.largest("n = 9001: largest", block)

    def on_the_way(self) -> None:
        """Compare what goes through the CPU: rows too long for ranks, and rules without a kernel; and torch's memory."""
        block, out = block_of(MIXES[9], 4097, 3)
        rule = TaskVectorMerge(tuple(TaskVector(i, rank_drop=RankDrop(0.3, 0.4)) for i in range(3)))
        longest, math._LONGEST_ROW = math._LONGEST_ROW, 4096
        try:
            self.rule("a long row", block, out, rule)
            self.call("signs of a long row", block, lambda one: one.sign_total(replace(rule, elect=True)))
            self.call("sums of a long row", block, lambda one: one.abs_sums(rule.vectors[0]))
        finally:
            math._LONGEST_ROW = longest
        self.rule("no kernel", block, out, SelectedMerge(rule.vectors[:1], None))
        own, self.launcher = self.launcher, TritonLauncher("cpu")
        self.rule("memory of torch", block, out, WeightedSum((0.3, 0.4, 0.7), 1.4))
        self.largest("thresholds in memory of torch", block)
        self.call("counts in memory of torch", block, lambda one: one.ties(TaskVector(1), 0, 50))
        self.launcher = own
        with (
            patch.object(triton_launcher, "why_not_amd", lambda: None),
            patch.object(torch_backend, "share_of_memory", lambda device: 1 << 30),
        ):
            amd = torch_backend.CUDA.math(replace(block, buffer=block.buffer.copy()), "cpu", Extent.ELEMENT)
        self._same("AMD's way", isinstance(amd, FusedMath))
        for name, call in (
            ("counts", lambda one: one.ties(TaskVector(1), 0, 50)),
            ("no kernel", lambda one: one.touches((TaskVector(0), TaskVector(1)), 1e-3)),
        ):
            self.call(
                f"AMD's way: {name}",
                block,
                lambda one, call=call: call(one if isinstance(one, KernelMath) else amd),
            )

    def codes(self, *, few: bool = True) -> None:
        """Compare quantised tensors that the kernels decode with those that the CPU decodes, in every format."""
        with tempfile.TemporaryDirectory() as folder:
            for name, same in decoded(self.launcher, Path(folder), few=few):
                self._same(name, same)

    def _same(self, name: str, same: bool) -> None:
        self.done += 1
        if not same:
            self.different.append(name)
            if self.tell:
                print(f"DIFFERS  {name}", flush=True)


def main() -> int:
    """Compare, and return 1 if anything differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--few", action="store_true", help="only what CI runs")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--n", type=int, default=257)
    options = parser.parse_args()
    compare, began = Comparison(), time.process_time()
    if options.few:
        compare.few(options.n)
    else:
        for seed, mix in itertools.product(range(options.seeds), MIXES):
            compare.blocks(mix, options.n, seed)
    compare.sizes()
    compare.codes(few=options.few)
    compare.on_the_way()
    seconds = ", ".join(f"{label} {spent:.1f}" for label, spent in compare.seconds.items())
    print(
        f"{compare.done} comparisons, {len(compare.different)} differ; {time.process_time() - began:.1f} CPU s ({seconds})"
    )
    return bool(compare.different)


if __name__ == "__main__":
    sys.exit(main())
