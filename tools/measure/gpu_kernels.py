"""The parts of `gpu.py` that use the driver: start-up, the bus, kernels and rings; and the GPU that memory plays."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from gpu_whole import Table, seconds

sys.path.insert(0, str(Path(__file__).parents[2]))

from streammerge.algebra.block import Block, BlockMath, Operand
from streammerge.algebra.rules import Rule, TaskVectorMerge, WeightedSum
from streammerge.algebra.task_vectors import Cut, RankDrop, TaskVector
from streammerge.backends.cpu.math import KernelMath
from streammerge.backends.gpu import backend, core_driver
from streammerge.backends.gpu.driver import Driver
from streammerge.backends.gpu.lane import Lane, Sizes
from streammerge.machine import available_memory, physical_cores
from streammerge.numerics.philox import RandomKeys, threshold
from streammerge.units import format_size

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


# --- the machine, start-up and the bus


def show_machine(table: Table, device: str) -> None:
    """Write down what the figures are of; no `device`: the GPU is played."""
    table.head("Machine", "what", "value")
    number = int(device.partition(":")[2] or 0)
    if device and backend.find_gpu(number) is not None and core_driver.is_installed():
        for name, ask in (("GPU", core_driver.title), ("compute capability", core_driver.capability)):
            table.row(name, ask(number))
    table.row("kernels are loaded by", backend.loader())
    table.row("cores", physical_cores())
    table.row("memory that is free", format_size(available_memory()))


def measure_start(table: Table, opened: Callable[[], Driver], sizes: Sizes) -> None:
    """Time what comes before the first tensor; kernels that the driver has compiled before are in its cache."""
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

    took = {
        name: seconds(partial(driver.load, ptx(spec), spec.entry)) for name, spec in kernel_specs().items()
    }
    slowest = max(took, key=lambda name: took[name])
    table.row(f"loading all {len(took)} kernels", sum(took.values()))
    table.row(f"the slowest of them, {slowest}", took[slowest])
    driver.close()


def measure_bus(table: Table, opened: Callable[[], Driver], most: int) -> None:
    """Time copies in, out, and both at once, by their size."""
    driver = opened()
    while 2 * most > driver.memory() // 2:
        most //= 2
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
    driver.close()


# --- kernels


def bring(lane: Lane, data: Any, place: int, stop: threading.Event) -> Any:
    """Have bytes copied through the ring to a place on the device; return the event of the last copy."""

    def read(slot: Any, first: int) -> Iterator[tuple[int, Any]]:
        part = data[first : first + lane.read_bytes]
        slot[: part.size] = part
        yield place + first, slot[: part.size]

    event = None
    for first in range(0, data.size, lane.read_bytes):
        event = lane.bring(partial(read, first=first), stop)
    return event


def that_fits(lane: Lane, n: int) -> int:
    """Return `n` elements, or as many of a base, models and an output as the device holds."""
    while 2 * (N_MODELS + 2) * (n + 256) > lane.arena.limit:
        n //= 2
    return n


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
    n = that_fits(lane, n)
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

        event = bring(lane, block.buffer, place, stop)
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
    n = that_fits(lane, n)
    block, out, nbytes = make_block(n)
    inputs, stop = out.offset, threading.Event()
    count = max(threads, total // inputs)

    def one(_: int) -> None:
        with lane.arena.lease(nbytes, stop) as place:
            assert place is not None
            event = bring(lane, block.buffer[:inputs], place, stop)
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
