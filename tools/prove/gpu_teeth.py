"""Planted errors in the fused kernels: the law of bits notices each of them.

    python tools/prove/gpu_teeth.py [NAME ...]

An error is planted in a copy of the sources, which the interpreter then runs in place of the package's.
"""

from __future__ import annotations

import importlib
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, str(Path(__file__).parent))

from gpu_bits import MIXES, Comparison

from streammerge.backends.fused.interpreter import Interpreter

SOURCES = Path(__file__).parents[2] / "streammerge" / "backends" / "fused" / "sources"


class Plant(NamedTuple):
    """An error: a text of a file, what takes its place, and the numbers of the mixes that are compared."""

    file: str
    old: str
    new: str
    mixes: tuple[int, ...]


SPECIAL, TINY, SAME, MIDDLE, ZEROS = 1, 11, 15, 18, 20
PLANTS = {
    "two roundings": Plant(
        "blocks.py", "return tl.where(wide != y, (bits - away) | 1, bits)", "return bits", (MIDDLE,)
    ),
    "weights in fp32": Plant(
        "merge.py",
        "total += real(tl.load(row + COEFFICIENT)) *",
        "total += real(tl.load(row + COEFFICIENT)).to(tl.float32).to(tl.float64) *",
        (9,),
    ),
    "fused multiply-add": Plant(
        "merge.py",
        "total += real(tl.load(row + COEFFICIENT)) * x.to(tl.float64)",
        "total = tl.fma(total * 0 + real(tl.load(row + COEFFICIENT)), x.to(tl.float64), total)",
        (SAME,),
    ),
    "reciprocal for division": Plant(
        "merge.py",
        "return merged / tl.where((normalize != 0) & (weight != 0.0), weight, 1.0)",
        "return merged * (1.0 / tl.where((normalize != 0) & (weight != 0.0), weight, 1.0))",
        (TINY,),
    ),
    "9 rounds of Philox": Plant("blocks.py", "tl.static_range(10)", "tl.static_range(9)", (SPECIAL,)),
    "words in another order": Plant(
        "blocks.py",
        "tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))",
        "tl.interleave(tl.interleave(w0, w1), tl.interleave(w2, w3))",
        (SPECIAL,),
    ),
    "words of a block not aligned": Plant(
        "blocks.py", "(start.to(tl.int64) & ~3)", "start.to(tl.int64)", (2,)
    ),
    "ties kept too early": Plant("deltas.py", "keep = size > threshold", "keep = size >= threshold", (2,)),
    "an infinity dropped": Plant(
        "deltas.py",
        "((w == drop) & (element >= drop_end)) | infinite",
        "((w == drop) & (element >= drop_end))",
        (SPECIAL,),
    ),
    "an infinity an outlier": Plant("deltas.py", "(~outlier | infinite)", "~outlier", (SPECIAL,)),
    "no gradual underflow": Plant(
        "deltas.py",
        "size = f32_bits(delta) & 0x7FFFFFFF\n",
        "delta = tl.where(tl.abs(delta) < 1.1754943508222875e-38, 0.0, delta)\n    size = f32_bits(delta) & 0x7FFFFFFF\n",
        (TINY,),
    ),
    "a zero without its sign": Plant(
        "merge.py", "tl.where(negative, -down, up)", "tl.where(negative, 0.0 - down, up)", (ZEROS,)
    ),
    "a NaN votes for neither": Plant(
        "merge.py", "up += tl.where(tau < 0.0, 0.0, tau)", "up += tl.where(tau > 0.0, tau, 0.0)", (SPECIAL,)
    ),
    "lanes added in another order": Plant(
        "sums.py",
        "tl.reshape(total, (total.shape[0] // 2, 2))",
        "tl.trans(tl.reshape(total, (2, total.shape[0] // 2)))",
        (9,),
    ),
    "the highest of equals as rank": Plant(
        "ranks.py", "smaller + with_equal - 1", "with_equal + with_equal - 2", (2,)
    ),
    "equal keys of both runs in one place": Plant(
        "ranks.py", "key, run, right, mask", "key, run, 0, mask", (2,)
    ),
    "the bin above the rank": Plant("counts.py", "from_top >= rank", "from_top > rank", (2,)),
    "an element that few need": Plant("votes.py", "needed >= least", "needed > least", (2,)),
    "a model that competes with itself": Plant("votes.py", "tl.abs(total - tau)", "tl.abs(total)", (2,)),
    "a sum that is not finite": Plant("votes.py", "tl.where(infinite, total, change)", "change", (SPECIAL,)),
    "the largest of the other sign": Plant(
        "votes.py", "tl.where(total > 0.0, up, ", "tl.where(total > 0.0, -down, ", (2,)
    ),
    "an entry as large as epsilon": Plant(
        "votes.py", "~(tl.abs(tau) <= real(epsilon))", "~(tl.abs(tau) < real(epsilon))", (2,)
    ),
    "an entry of one model not multiplied": Plant(
        "votes.py", "tl.where(count == 1.0, unique, mean)", "mean", (2,)
    ),
    "touched alone and with others": Plant("votes.py", "(count == 1)", "(count >= 1)", (2,)),
    "a floor in fp32": Plant(
        "fisher.py",
        "tl.where(known < floor, floor, known)",
        "tl.where(known < floor, floor.to(tl.float32), known)",
        (9,),
    ),
}


def differences(name: str, *, few: bool = False) -> list[str]:
    """Return the comparisons that notice a planted error; with `few` stop at the first."""
    plant = PLANTS[name]
    with tempfile.TemporaryDirectory() as folder:
        package = f"planted_{list(PLANTS).index(name)}"
        copy = Path(folder) / package
        shutil.copytree(SOURCES, copy, ignore=shutil.ignore_patterns("__pycache__"))
        text = (copy / plant.file).read_text()
        assert plant.old in text, f"{name}: {plant.file} no longer has the text"
        (copy / plant.file).write_text(text.replace(plant.old, plant.new))
        sys.path.insert(0, folder)
        try:
            kernels = importlib.import_module(f"{package}.catalog").KERNELS
            compare = Comparison(Interpreter(kernels), tell=False)
            for number in plant.mixes:
                compare.blocks(MIXES[number], 130, 0, few=few)
        finally:
            sys.path.remove(folder)
    return compare.different


def main() -> int:
    """Plant each error, and return 1 if one passes unnoticed."""
    passed = []
    for name in sys.argv[1:] or PLANTS:
        began = time.process_time()
        found = differences(name)
        print(
            f"{len(found):4} comparisons notice: {name} ({time.process_time() - began:.1f} CPU s)", flush=True
        )
        passed += [] if found else [name]
    print(f"unnoticed: {', '.join(passed) or 'none'}")
    return bool(passed)


if __name__ == "__main__":
    sys.exit(main())
