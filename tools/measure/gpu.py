"""
Measure everything that a GPU does for a merge, and write it down as a table: ten minutes on a machine that has one.

    python tools/measure/gpu.py --work /scratch/gpu [--out gpu.md] [--size 20GB] [--device cuda:0]
    python tools/measure/gpu.py --work /tmp/gpu --fake        # tries the program without a GPU, at a small size

Start-up; the bus in, out and both ways by size of copy; each rule and statistic by fused kernels, by eager torch and by
one CPU, with a comparison of the bytes; the rings; and whole merges of 20 GB, cold and from the page cache. The figures go
into docs/use/gpu.md. Exit code 1 if any bytes differ.
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from gpu_whole import Table, by_command, in_process, measure_merges, seconds

sys.path.insert(0, str(Path(__file__).parents[2]))

from streammerge.algebra.block import Block, BlockMath, Operand
from streammerge.algebra.rules import Rule, TaskVectorMerge, WeightedSum
from streammerge.algebra.task_vectors import Cut, RankDrop, TaskVector
from streammerge.backends.cpu.math import KernelMath
from streammerge.backends.gpu import backend
from streammerge.backends.gpu.driver import Driver
from streammerge.backends.gpu.lane import Lane, Sizes
from streammerge.numerics.philox import RandomKeys, threshold
from streammerge.units import nbytes_of

N_MODELS = 3
HALF = threshold(0.5)
CUT = Cut(0x3C000000, "thin", HALF)


def vectors(**how: Any) -> tuple[TaskVector, ...]:
    """Return a task vector of each model."""
    return tuple(TaskVector(i, **how) for i in range(N_MODELS))


RULES: dict[str, Rule] = {
    "linear": WeightedSum((0.2, 0.3, 0.5)),
    "task_arithmetic": TaskVectorMerge(vectors()),
    "dare_linear": TaskVectorMerge(vectors(drop=HALF, rescale=2.0)),
    "ties": TaskVectorMerge(vectors(cut=CUT), elect=True, normalize=True),
    "dare_ties": TaskVectorMerge(vectors(drop=HALF, rescale=2.0), elect=True, normalize=True),
    "della": TaskVectorMerge(vectors(rank_drop=RankDrop(0.4, 0.2)), elect=True),
}
STATISTICS: dict[str, Callable[[BlockMath], Any]] = {
    "a pass of a threshold": lambda math: _counts(math),
    "sums of magnitudes": lambda math: math.abs_sums(TaskVector(0)),
    "dot products": lambda math: math.dots(vectors(), 4096),
}


def _counts(math: BlockMath) -> Any:
    bins = np.zeros(1 << 15, np.int32)
    return *math.count_keys(TaskVector(0), 0, (1 << 31) - 1, 16, bins), bins


# --- start-up and the bus


def measure_start(table: Table, opened: Callable[[], Driver], sizes: Sizes) -> Driver:
    """Time what comes before the first tensor; return the driver."""
    table.head("Start-up", "what", "s")
    found: list[Any] = []
    table.row("the driver and its context", seconds(lambda: found.append(opened())))
    driver: Driver = found[0]
    buffer: Any = None

    def pin() -> None:
        nonlocal buffer
        from streammerge.io.buffer_pool import map_memory

        buffer = np.frombuffer(map_memory(sizes.nbytes), np.uint8)
        driver.pin(buffer)

    table.row(f"rings of {sizes.nbytes >> 20} MiB, in huge pages, pinned", seconds(pin))
    driver.unpin(buffer)
    from streammerge.backends.fused.specs import kernel_specs, ptx

    for name, spec in kernel_specs().items():
        table.row(f"loading the kernel {name}", seconds(partial(driver.load, ptx(spec), spec.entry)))
    return driver


def measure_bus(table: Table, driver: Driver, most: int) -> None:
    """Time copies in, out, and both at once, by their size."""
    table.head("The bus, GB/s", "bytes of a copy", "in", "out", "both together")
    place = driver.allocate(2 * most)
    memory = np.zeros(2 * most, np.uint8)
    driver.pin(memory)
    streams = driver.stream(), driver.stream()

    def rate(size: int, into: bool, out: bool) -> float:
        number = max(4, most // size)

        def run() -> None:
            for i in range(number):
                at = i * size % most
                if into:
                    driver.copy_in(memory[at : at + size], place + at, streams[0])
                if out:
                    driver.copy_out(place + most + at, memory[most + at : most + at + size], streams[1])
            for stream in streams:
                driver.synchronize(driver.record(stream))

        run()
        return number * size * (into + out) / seconds(run) / 1e9

    size = min(most, 1 << 16)
    while size <= most:
        table.row(size, rate(size, True, False), rate(size, False, True), rate(size, True, True))
        size *= 4
    driver.unpin(memory)
    driver.free(place)


# --- kernels


def make_block(n: int) -> tuple[Block, Operand, int]:
    """Return a base and models of `n` bf16 elements near each other, the place of the output, and the end of all."""
    rng = np.random.default_rng(0)
    base = rng.standard_normal(n, np.float32) * 0.02
    parts = [base, *(base + rng.standard_normal(n, np.float32) * 1e-3 for _ in range(N_MODELS))]
    size = -(-2 * n // 256) * 256
    buffer = np.zeros(size * (N_MODELS + 2), np.uint8)
    for i, part in enumerate(parts):
        buffer[i * size : i * size + 2 * n].view(np.uint16)[:] = part.view(np.uint32) >> 16
    operands = [Operand(i * size, "BF16") for i in range(N_MODELS + 2)]
    length = 4096 if n % 4096 == 0 else n
    block = Block(
        buffer,
        tuple(operands[1:-1]),
        operands[0],
        "w",
        0,
        n,
        (n // length, length),
        RandomKeys(0, tuple("abc")),
    )
    return block, operands[-1], buffer.size


def eager(block: Block, device: str, run: Callable[[BlockMath], Any]) -> float | str:
    """Return the seconds of torch's operations on the device, after a first call."""
    from streammerge.algebra.extent import Extent
    from streammerge.backends.torch.backend import CUDA

    assert CUDA.turn is not None
    try:
        with CUDA.turn(device):
            math = CUDA.math(block, device, Extent.ROW)
            run(math)
            return seconds(lambda: run(math))
    except Exception as error:  # torch without CUDA, or out of memory: the table says so
        return type(error).__name__


def measure_kernels(table: Table, lane: Lane, device: str, n: int, runs: int) -> None:
    """Compare and time every rule and statistic: fused, eager, and on one CPU."""
    block, out, nbytes = make_block(n)
    stop, moved = threading.Event(), 2 * n * (N_MODELS + 1)
    end = out.offset + 2 * n
    table.head(
        f"Kernels, GB/s of inputs, {moved / 1e9:.2f} GB",
        "what",
        "fused",
        "eager",
        "one CPU",
        "first call s",
        "bytes",
    )
    with lane.arena.lease(nbytes, stop) as place:
        assert place is not None

        def read(slot: Any, first: int) -> Any:
            part = block.buffer[first : first + lane.read_bytes]
            slot[: part.size] = part
            return slot[: part.size]

        event = None
        for first in range(0, nbytes, lane.read_bytes):
            event = lane.bring(partial(read, first=first), place + first, stop)
        cases: dict[str, Callable[[BlockMath], Any]] = {
            name: partial(lambda math, rule: math.apply(rule, out), rule=rule) for name, rule in RULES.items()
        }
        for name, run in {**cases, **STATISTICS}.items():
            try:
                with lane.computing(event):
                    math = lane.math(block, place)
                    first_call = seconds(partial(run, math))
                    there = run(math)
                    best = min(seconds(partial(run, math)) for _ in range(runs))
            except MemoryError:
                table.row(name, "no scratch memory", "", "", "", "")
                continue
            here = run(KernelMath(block))
            one_cpu = min(seconds(partial(run, KernelMath(block))) for _ in range(2))
            same = _same(there, here)
            if name in cases:
                same &= bool((lane.fetch(place + out.offset, 2 * n) == block.buffer[out.offset : end]).all())
            table.equal &= same
            slow = eager(block, device, run)
            shown = slow if isinstance(slow, str) else moved / slow / 1e9
            cells = moved / best / 1e9, shown, moved / one_cpu / 1e9, first_call
            table.row(name, *cells, "equal" if same else "DIFFERENT")


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, np.ndarray):
        return bool(np.array_equal(one, other))
    if isinstance(one, tuple):
        return all(map(_same, one, other))
    return bool(one == other)


# --- the rings


def measure_rings(table: Table, lane: Lane, n: int, total: int, threads: int) -> None:
    """Time TIES of tensors that threads copy from memory into the ring, and out of the other, as a merge does."""
    block, out, nbytes = make_block(n)
    inputs, stop = out.offset, threading.Event()
    count = max(threads, total // inputs)

    def one(_: int) -> None:
        def read(slot: Any, first: int) -> Any:
            part = block.buffer[first : min(inputs, first + lane.read_bytes)]
            slot[: part.size] = part
            return slot[: part.size]

        with lane.arena.lease(nbytes, stop) as place:
            assert place is not None
            event = None
            for first in range(0, inputs, lane.read_bytes):
                event = lane.bring(partial(read, first=first), place + first, stop)
            with lane.computing(event):
                lane.math(block, place).apply(RULES["ties"], out)
            lane.deliver(place + out.offset, 2 * n, 0, lambda position, part: None, stop)

    with ThreadPoolExecutor(threads) as pool:
        one(0)
        took = seconds(lambda: list(pool.map(one, range(count))))
    table.head("The rings: TIES from memory to memory", "threads", "GB/s in", "GB/s out")
    table.row(threads, count * inputs / took / 1e9, count * 2 * n / took / 1e9)


# --- without a GPU


def played(sizes: Sizes) -> tuple[Callable[[], Driver], Callable[[str], Lane]]:
    """Return what opens a driver and a lane on a GPU that memory plays; merges find it too."""
    from streammerge.backends.registry import BACKENDS
    from streammerge.planning import on_device
    from tests.backends.fake_driver import FakeDriver, Twin

    def lane(device: str) -> Lane:
        driver = FakeDriver(1 << 26)
        return Lane(driver, partial(Twin, driver=driver, scratch=0), lambda spec: "", sizes)

    on_device.DEVICE_BYTES = 1 << 10
    BACKENDS["fused"] = replace(
        backend.FUSED, open_lane=lane, find=lambda number: f"cuda:{number}", lacks=lambda: None
    )
    return lambda: FakeDriver(1 << 26), lane


def main() -> int:
    """Measure everything, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument(
        "--work", type=Path, required=True, help="a folder on the disk to measure, with room for 30 GB"
    )
    parser.add_argument("--out", type=Path, help="the file of the table")
    parser.add_argument("--size", default="20GB", help="bytes of the models of a whole merge")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--fake", action="store_true", help="try the program without a GPU")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    table, sizes = Table(), Sizes()
    opened: Callable[[], Driver] = partial(backend.open_driver, options.device)
    lane_of, merge, n, total = backend.open_lane, by_command, 1 << 26, nbytes_of(options.size) or 0
    if options.fake:
        sizes = Sizes(3, 2, 1 << 16, 1, 1 << 12)
        opened, lane_of = played(sizes)
        merge, n, total = in_process, 1 << 14, 1 << 22
    driver = measure_start(table, opened, sizes)
    measure_bus(table, driver, 1 << 20 if options.fake else 1 << 28)
    driver.close()
    lane = lane_of(options.device)
    threads = min(16, (os.cpu_count() or 2) + 2)
    measure_kernels(table, lane, options.device, n, 2 if options.fake else 5)
    measure_rings(table, lane, n // 4, total, threads)
    lane.close()
    measure_merges(table, options.work, total, ["cpu", options.device], merge)
    if options.out is not None:
        options.out.write_text("\n".join(table.lines) + "\n")
    return 0 if table.equal else 1


if __name__ == "__main__":
    sys.exit(main())
