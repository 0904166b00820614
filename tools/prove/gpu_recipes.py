"""Every rule with every option, every statistic, and quantised decoding, for the law of bits (`gpu_bits.py`)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from gpu_values import INFINITE, middle_key

from streammerge.algebra.block import Block
from streammerge.algebra.rules import (
    ConsensusMerge,
    CopyOf,
    FisherMean,
    LargestAgreeing,
    Rule,
    TaskVectorMerge,
    TouchedMerge,
    WeightedSum,
)
from streammerge.algebra.task_vectors import Cut, RankDrop, TaskVector
from streammerge.backends.fused import decoding as fused
from streammerge.checkpoint.index import open_model
from streammerge.dtypes import itemsize
from streammerge.io.buffer_pool import map_memory
from streammerge.io.reader import Reader
from streammerge.numerics.philox import threshold
from streammerge.tensors.coded.floats import ScaledFloats
from streammerge.tensors.coded.kinds import aligned, coded_kinds, coded_steps
from streammerge.tensors.read import read_elements
from tests.checkpoint.quantized.formats import FORMATS, write, write_entries
from tests.checkpoint.quantized.numbers import bytes_of

# --- recipes


def rules_of(block: Block, seed: int) -> Iterator[tuple[str, Rule]]:
    """Yield every rule with every option."""
    rng, k, n = np.random.default_rng(seed), len(block.models), block.n
    w = (rng.random(k) + 0.1).tolist()
    yield "linear", WeightedSum(tuple(w))
    yield "linear, divided, base", WeightedSum(tuple(w), 2.7, base_weight=0.3)
    yield "copy", CopyOf(k - 1)
    yield "plain sum", WeightedSum((1.0,) * k)
    # Quotients in the middle between two numbers, whose reciprocals are not exact.
    yield "halves", WeightedSum((7.0,) * k, 14.0)
    halves = tuple(TaskVector(i, weight=7.0) for i in range(k))
    yield "elect, halves", TaskVectorMerge(halves, elect=True, normalize=True)
    opposed = [(-1.0) ** i * (0.1 + 0.7 * (i // 2)) for i in range(k)]
    yield "linear, opposed", WeightedSum(tuple(opposed))
    against = tuple(TaskVector(i, weight=opposed[i]) for i in range(k))
    yield "tasks, opposed, 1e10", TaskVectorMerge(against, scale=1e10)
    yield "elect, opposed", TaskVectorMerge(against, elect=True, zero_sign=0)
    yield "elect, opposed, -", TaskVectorMerge(against, elect=True, zero_sign=-1)

    def vectors(**options: Any) -> tuple[TaskVector, ...]:
        return tuple(TaskVector(i, weight=w[i], **options) for i in range(k))

    drop = {"drop": threshold(0.5), "rescale": 2.0}
    end = {"drop": threshold(0.3), "drop_end": block.start + n // 2, "shared": True, "rescale": 1 / 0.7}
    for name, options in (("tasks", {}), ("dare", drop), ("dare, exact", end)):
        yield name, TaskVectorMerge(vectors(**options), divisor=sum(w), scale=0.7)
        elect = TaskVectorMerge(vectors(**options), elect=True, zero_sign=1, normalize=True)
        yield f"{name}, elect", elect
    yield from _cut_rules(block, w)
    yield from _ranked_rules(w)
    yield from _fisher_rules(w, end)
    for name, options in (("", {}), (", dare", drop)):
        for least, share in ((1, 0.0), (2, 0.4), (2, 1.0), (k + 1, 0.4)):
            yield f"consensus {least} {share}{name}", ConsensusMerge(vectors(**options), least, share, 0.7)
        yield f"emr{name}", LargestAgreeing(vectors(**options), 0.7)
        for epsilon in (0.0, 1e-5, 2e-3):
            factors = tuple(1.0 + one / 7 for one in w)
            yield f"ram {epsilon}{name}", TouchedMerge(vectors(**options), epsilon, factors)
    yield "consensus, opposed", ConsensusMerge(against, 1, 0.0, 1e10)
    yield "emr, opposed", LargestAgreeing(against, 1e10)


def _cut_rules(block: Block, w: list[float]) -> Iterator[tuple[str, Rule]]:
    keys = [middle_key(block, i, 0.3) for i in range(len(w))]
    for ties in ("drop", "all", "thin", "index"):
        limit = {"thin": threshold(0.4), "index": block.start + block.n // 3}.get(ties, 0)
        cuts = [Cut(key, ties, limit) for key in keys]
        vectors = tuple(TaskVector(i, weight=w[i], cut=cut) for i, cut in enumerate(cuts))
        for sign, normalize in ((0, True), (-1, True), (1, False)):
            rule = TaskVectorMerge(vectors, elect=True, zero_sign=sign, normalize=normalize, scale=1.3)
            yield f"ties {ties} {sign} {normalize}", rule
        halves = (Cut(key // 2, ties, limit) for key in keys)
        both = tuple(
            replace(v, drop=threshold(0.3), rescale=1.5, cut=cut)
            for v, cut in zip(vectors, halves, strict=True)
        )
        yield f"dare and ties {ties}", TaskVectorMerge(both, elect=True, normalize=True)
        lows = (Cut(max(0, key - (1 << 23)), ties, limit) for key in keys)
        bands = tuple(
            replace(v, cut=low, outliers=cut) for v, low, cut in zip(vectors, lows, cuts, strict=True)
        )
        yield f"breadcrumbs {ties}", TaskVectorMerge(bands)
    zero = tuple(TaskVector(i, cut=Cut(0, "thin", threshold(0.4))) for i in range(len(w)))
    yield "ties at 0", TaskVectorMerge(zero, elect=True, normalize=True)
    both = tuple(replace(v, drop=threshold(0.5), rescale=2.0) for v in zero)
    yield "dare and ties at 0", TaskVectorMerge(both, elect=True, normalize=True)


def _ranked_rules(w: list[float]) -> Iterator[tuple[str, Rule]]:
    for low, spread, unbiased, elect in (
        (0.3, 0.4, True, False),
        (0.5, 0.3, False, True),
        (0.6, 0.0, True, True),
    ):
        drop = RankDrop(low, spread, unbiased)
        vectors = tuple(TaskVector(i, weight=one, rank_drop=drop) for i, one in enumerate(w))
        yield f"della {low} {spread}", TaskVectorMerge(vectors, elect=elect, normalize=elect, scale=0.9)


def _fisher_rules(w: list[float], end: dict[str, Any]) -> Iterator[tuple[str, Rule]]:
    k = len(w)
    yield "fisher", FisherMean(tuple(w), (0.0,) * k)
    yield "fisher, floors", FisherMean(tuple(w), (0.3,) * k, average=tuple(w))
    yield "fisher, added", FisherMean(tuple(w), (0.01,) * k, add=True)
    vectors = tuple(TaskVector(i, **end) for i in range(k))
    yield "fisher, dare", FisherMean(tuple(w), (0.0,) * k, average=(1.0,) * k, vectors=vectors)


def calls_of(block: Block) -> Iterator[tuple[str, Any]]:
    """Yield every statistic as a function of a `BlockMath`; what is compared are integers and sums of fp64."""
    k = len(block.models)
    dropped = TaskVector(0, drop=threshold(0.4), drop_end=block.start + 50, rescale=1.3)
    cut = TaskVector(k - 1, cut=Cut(middle_key(block, k - 1, 0.5), "thin", threshold(0.6)), rescale=0.7)
    vectors = (*(TaskVector(i, rescale=1.0 + i / 3) for i in range(k - 1)), cut)
    for i, vector in enumerate((TaskVector(0), dropped)):
        for window in ((0, (1 << 31) - 1, 16), (0x3A000000, 0x3C800000, 12)):
            yield f"keys {i} {window}", partial(_keys, vector=vector, window=window)
        key = middle_key(block, 0, 0.1 + i / 2)
        yield f"ties {i}", lambda math, vector=vector, key=key: math.ties(vector, key, 50)
        yield f"abs sums {i}", lambda math, vector=vector: math.abs_sums(vector)
    yield "abs sums, cut", lambda math: math.abs_sums(cut)
    ranked = TaskVector(0, rank_drop=RankDrop(0.3, 0.4))
    yield "abs sums, ranked", lambda math: math.abs_sums(ranked)
    yield "squares", lambda math: math.squares(vectors, None)
    yield "own squares", lambda math: math.own_squares()
    yield "dots", lambda math: math.dots(vectors, 4096)
    yield "dots of rows", lambda math: math.dots((), block.row_length)
    yield "column dots", partial(_column_dots, vectors=vectors, columns=block.row_length)
    for epsilon in (0.0, 1e-5, 2e-3):
        yield f"touches {epsilon}", lambda math, epsilon=epsilon: math.touches(vectors, epsilon)
    yield "fisher squares", lambda math: math.fisher_squares(0)
    merge = TaskVectorMerge(vectors, elect=True)
    yield "signs", lambda math: math.sign_total(merge)


def _keys(math: Any, vector: TaskVector, window: tuple[int, int, int]) -> Any:
    """Return counts of patterns; NaN of different payloads count as one."""
    low, high, shift = window
    bins = np.zeros(((high - low) >> shift) + 1, np.int32)
    above, highest = math.count_keys(vector, low, high, shift, bins)
    return above, min(highest, INFINITE), bins[: (INFINITE - low) >> shift]


def _column_dots(math: Any, vectors: tuple[TaskVector, ...], columns: int) -> Any:
    sums = np.ones((len(vectors) * (len(vectors) + 1) // 2, columns))
    math.add_column_dots(vectors, sums)
    return sums


# --- quantised decoding


def decoded(launcher: Any, folder: Path, *, few: bool = True) -> Iterator[tuple[str, bool]]:
    """Yield whether a tensor of each format has the bits of the CPU if a device decodes its codes, whole and in part.

    Slots are so small that most tensors take several steps.
    """
    reader, rng = Reader(), np.random.default_rng(1)
    slot = np.frombuffer(map_memory(3 << 12), dtype=np.uint8)
    kinds = set()
    for name in FORMATS:
        values = write(folder / name, name)
        logical = next(one for one in values if one != "model.norm.weight")
        ref = open_model(folder / name)[logical]
        kinds.add(type(ref))
        cuts = [sorted(map(int, rng.integers(0, ref.n_elements + 1, 2))) for _ in range(1 if few else 9)]
        for start, stop in [(0, ref.n_elements), *cuts]:
            want = read_elements(reader, ref, start, stop).view(np.uint32)
            found = _by_kernels(launcher, reader, ref, start, stop, slot)
            yield f"{name}, {start} to {stop}", np.array_equal(found.view(np.uint32), want)
    for dtype in ("F8_E4M3", "F8_E5M2"):
        write_entries(folder / dtype, {"w": bytes_of(np.arange(256).reshape(2, 128), dtype)}, {})
        ref = open_model(folder / dtype)["w"]
        kinds.add(type(ref))
        want = read_elements(reader, ref, 3, 256).view(np.uint16)
        found = _by_kernels(launcher, reader, ref, 3, 256, slot)
        yield f"plain {dtype}", np.array_equal(found.view(np.uint16), want)
    yield "every scale of E8M0", _powers_of_two(launcher)
    reader.close()
    yield "every kind of codes was decoded", kinds == coded_kinds()


def _powers_of_two(launcher: Any) -> bool:
    """Return whether codes have their values under every scale that a byte of E8M0 stands for, the subnormal one too."""
    codes, powers = (
        np.tile(np.array([0x38, 0xFE], np.uint8), 255),
        np.arange(255, dtype=np.uint8),
    )  # 1 and -448
    found = np.zeros(510, np.float32)
    how = ScaledFloats("F8_E4M3", 0, 510, 255, (0, 0), (1, 510), (1, 2), (510, 1), powers=True)
    fused.enqueue_decoding(launcher, how, [codes.ctypes.data, powers.ctypes.data], found.ctypes.data)
    with np.errstate(over="ignore"):
        want = np.outer(2.0 ** (powers - 127.0), [1.0, -448.0]).astype(np.float32)
    return np.array_equal(found.view(np.uint32), want.reshape(-1).view(np.uint32))


def _by_kernels(launcher: Any, reader: Reader, ref: Any, start: int, stop: int, slot: Any) -> Any:
    """Return elements of a tensor decoded by kernels, as bytes."""
    width = itemsize(ref.dtype)
    out = np.full((stop - start) * width, 0xA5, np.uint8)
    for step in coded_steps(ref, start, stop, slot.size):
        slot[:] = 0xA5  # what was not read shows
        codes = step.fill(reader, slot)
        assert sum(aligned(one.size) for one in codes.arrays) <= step.nbytes
        arrays = [one.ctypes.data if one.size else 0 for one in codes.arrays]
        fused.enqueue_decoding(launcher, codes.decoding, arrays, out.ctypes.data + width * codes.first)
    return out
