"""Every rule with every option, every statistic, and quantised decoding, for the law of bits (`gpu_bits.py`)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from gpu_values import INFINITE, middle_key

from streammerge.algebra.block import Block
from streammerge.algebra.rules import CopyOf, FisherMean, Rule, TaskVectorMerge, WeightedSum
from streammerge.algebra.task_vectors import Cut, RankDrop, TaskVector
from streammerge.backends.fused import decoding as fused
from streammerge.numerics import decoding, unpacking
from streammerge.numerics.philox import threshold

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


def decoded(launcher: Any) -> Iterator[tuple[str, bool]]:
    """Yield whether quantised weights decoded by the kernels have the bits of `numerics`; NaN equals NaN."""
    rng = np.random.default_rng(5)
    place, shape, extent, pitch, skip = (3, 5), (7, 41), (4, 16), 64, 3
    scales = np.exp(8 * rng.standard_normal((3, 3))).astype(np.float32)
    scales[1, 1] = 1e-42
    for number, kind in enumerate(fused.KINDS):
        codes = rng.integers(0, 256, skip + pitch * shape[0] + 16, dtype=np.uint8)
        own, got = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
        decoding.decode(number, codes, skip, pitch, scales, place, shape, extent, own.reshape(-1))
        where = (place, shape, extent, got.ctypes.data)
        fused.decode(launcher, kind, codes.ctypes.data, skip, pitch, scales.ctypes.data, 3, *where)
        yield (
            f"decode {kind}",
            np.array_equal(own.view(np.int32) * ~np.isnan(own), got.view(np.int32) * ~np.isnan(got)),
        )
    raw = rng.integers(0, 256, 3 * 40 + 8, dtype=np.uint8)
    for bits, skip in ((2, 6), (3, 5), (4, 4), (8, 8)):
        shifts = bits * np.array([0, 4, 1, 5, 2, 6, 3, 7], np.int64)
        own8, got8 = np.zeros(3 * 29, np.uint8), np.zeros(3 * 29, np.uint8)
        unpacking.unpack(raw, 40, skip, bits, shifts.astype(np.uint64), (3, 29), own8)
        where = (raw.ctypes.data, 40, skip, bits, shifts.ctypes.data, (3, 29), got8.ctypes.data)
        fused.unpack(launcher, *where)
        yield f"unpack {bits}", np.array_equal(own8, got8)
    yield from _scaled(launcher, rng, place, extent, scales)
    tables, rows = rng.standard_normal((4, 16)).astype(np.float32), np.array([2, 0, 3, 1], np.int32)
    for high_first in (False, True):
        own, got = np.zeros(57, np.float32), np.zeros(57, np.float32)
        unpacking.look_up(raw, 1, high_first, tables, rows, 7, 16, own)
        where = (tables.ctypes.data, rows.ctypes.data, 7, 16, 57, got.ctypes.data)
        fused.look_up(launcher, raw.ctypes.data, 1, high_first, *where)
        yield f"look up {high_first}", own.tobytes() == got.tobytes()


def _scaled(launcher: Any, rng: Any, place: Any, extent: Any, scales: Any) -> Iterator[tuple[str, bool]]:
    codes, shape = rng.integers(0, 256, 7 * 50, dtype=np.uint8), (7, 41)
    listed = rng.integers(0, 3, 41).astype(np.int64)
    points = rng.integers(0, 16, scales.shape).astype(np.float32)
    for zeros, columns_of, divisor in ((None, None, 1), (points, None, 3), (points, listed, 1)):
        own, got = np.zeros((7, 44), np.float32), np.zeros((7, 44), np.float32)
        known = np.empty((0, 0), np.float32) if zeros is None else zeros
        places = np.empty(0, np.int64) if columns_of is None else columns_of
        unpacking.scale_integers(
            codes,
            50,
            np.uint8(128),
            -128,
            known,
            scales,
            places,
            place,
            shape,
            extent,
            divisor,
            own.reshape(-1),
            44,
        )
        addresses = [0 if one is None else one.ctypes.data for one in (zeros, scales, columns_of)]
        how = (codes.ctypes.data, 50, 128, -128, addresses[0], addresses[1], 3, addresses[2])
        fused.scale_integers(launcher, *how, place, shape, extent, divisor, got.ctypes.data, 44)
        yield f"scale integers {divisor} {columns_of is not None}", own.tobytes() == got.tobytes()
