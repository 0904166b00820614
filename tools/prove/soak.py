"""Merge many times in one process: memory, open files, threads and temporary files do not grow.

    python tools/prove/soak.py              # 200 merges, some two minutes
    python tools/prove/soak.py --merges 1000

Methods take turns, and so do merges that are stopped half-way, and continued, refused, or fail. The first two fifths
warm up. Memory is compared by medians, of the third and of the last fifth; what is counted must not grow at all.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import shutil
import statistics
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from worst_models import Family, make_family

from streammerge.api import merge
from streammerge.errors import StreammergeError
from streammerge.events import Event
from streammerge.units import parse_size

MIB = 1 << 20
SHAPES = Family((("embed.weight", (2048, 256)), ("a.weight", (256, 256)), ("norm.weight", (256,))), 3)
METHODS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("linear", {}),
    ("ties", {"density": 0.2}),
    ("dare_ties", {"density": 0.5}),
    ("breadcrumbs", {"density": 0.5}),
    ("della", {"density": 0.5, "epsilon": 0.1}),
    ("karcher", {}),
    ("sce", {"select_topk": 0.5}),
    ("ties", {"density": 0.2, "trim_scope": "model"}),
)
ALLOWED = 2 * MIB
"""By which the resident memory may differ: threads and pages come and go."""


@dataclass(frozen=True)
class Sample:
    """The resources that the process holds between two merges."""

    resident: int
    """Bytes."""
    descriptors: int
    threads: int
    temporaries: int
    """Files in the directory for temporary files."""


def take_sample(process: psutil.Process, temporaries: Path) -> Sample:
    """Return what the process holds now."""
    gc.collect()  # what waits for it is no leak, nor is what the allocator keeps to give out again
    ctypes.CDLL(None).malloc_trim(0)
    held = sum(1 for _ in temporaries.rglob("*"))
    return Sample(process.memory_info().rss, process.num_fds(), process.num_threads(), held)


def merge_once(number: int, paths: Sequence[Path], out: Path) -> None:
    """Merge by the method whose turn it is: most times in one go, some times not."""
    method, parameters = METHODS[number % len(METHODS)]
    config = {
        "merge_method": method,
        "models": [{"model": str(path)} for path in paths[1:]],
        "parameters": parameters,
        **({} if method == "linear" else {"base_model": str(paths[0])}),
    }
    kind = (number + number // len(METHODS)) % 4  # of every method, in time
    if kind == 1:  # stopped, then continued
        stop = threading.Event()

        def on_event(event: Event) -> None:
            if event.kind == "start":
                stop.set()

        _refused(lambda: merge(config, out, memory="384MiB", device="cpu", on_event=on_event, stop=stop))
    elif kind == 2:
        _refused(lambda: merge(config, out, memory="64MiB", device="cpu"))
    elif kind == 3:
        _refused(lambda: merge(config, paths[0], memory="384MiB", device="cpu"))
    merge(config, out, memory="384MiB", device="cpu")
    shutil.rmtree(out)


def _refused(action: Callable[[], object]) -> None:
    try:
        action()
    except StreammergeError:
        return
    raise AssertionError("it should have been refused or stopped")


def soak(merges: int, workdir: Path) -> list[Sample]:
    """Merge so many times; return what the process held after each."""
    paths = make_family(workdir, SHAPES)
    temporaries = workdir / "tmp"
    temporaries.mkdir(exist_ok=True)
    before, tempfile.tempdir = tempfile.tempdir, str(temporaries)
    process, samples = psutil.Process(), []
    try:
        for number in range(merges):
            merge_once(number, paths, workdir / "out")
            samples.append(take_sample(process, temporaries))
    finally:
        tempfile.tempdir = before
    return samples


def growth(samples: Sequence[Sample]) -> dict[str, tuple[int, int]]:
    """Return, of each quantity, what was held after the warming up and what is held at the end."""
    fifth = len(samples) // 5
    first, last = samples[2 * fifth : 3 * fifth], samples[-fifth:]
    resident = [round(statistics.median(sample.resident for sample in part)) for part in (first, last)]
    found = {"resident bytes": (resident[0], resident[1])}
    for name in ("descriptors", "threads", "temporaries"):
        found[name] = (getattr(first[0], name), max(getattr(sample, name) for sample in last))
    return found


def leaks(samples: Sequence[Sample], allowed: int = ALLOWED) -> list[str]:
    """Return one line for each quantity that has grown, the resident memory by more than `allowed` bytes."""
    return [
        f"{name}: {before} after the warming up, {after} at the end"
        for name, (before, after) in growth(samples).items()
        if after > before + (allowed if name == "resident bytes" else 0)
    ]


def main() -> None:
    """Print what was held, and fail if it grew."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--merges", type=int, default=200)
    parser.add_argument("--allowed", default="2MiB", help="by which the resident memory may grow")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as workdir:
        samples = soak(args.merges, Path(workdir))
    for name, (before, after) in growth(samples).items():
        scale, unit = (MIB, " MiB") if name == "resident bytes" else (1, "")
        print(
            f"{name}: {before / scale:g}{unit} after {2 * args.merges // 5} merges, {after / scale:g}{unit} at the end"
        )
    if found := leaks(samples, parse_size(args.allowed)):
        sys.exit("\n".join(found))


if __name__ == "__main__":
    main()
