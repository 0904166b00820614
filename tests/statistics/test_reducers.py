"""Reducers against exact oracles, whichever backend computes the pieces and wherever they are cut."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streammerge.algebra.block import Block, BlockMath, Operand
from streammerge.algebra.gram_matrix import rows_at_once
from streammerge.algebra.rules import TaskVectorMerge, WeightedSum
from streammerge.algebra.scores import Importance, Selection, Spread
from streammerge.algebra.task_vectors import Cut, TaskVector, Where, terms_of
from streammerge.backends.cpu.math import KernelMath
from streammerge.backends.torch.math import TorchMath
from streammerge.numerics.ordered_sum import block_sums
from streammerge.numerics.philox import RandomKeys
from streammerge.statistics.base import NotFiniteError
from streammerge.statistics.kinds import AbsSum, Threshold, TieIndex, TopK
from streammerge.statistics.ranks import TopKReducer
from streammerge.statistics.sums import SumsReducer
from streammerge.statistics.ties import TieIndexReducer

# --- pieces

KEYS = RandomKeys(3, ("one", "two"))


def aligned(n: int) -> int:
    return (n + 7) // 8 * 8


def load(tensors: Sequence[torch.Tensor], start: int = 0, has_base: bool = True) -> Block:
    """Lay out [base, models...] in a buffer, as the engine does."""
    codes = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.float64: "F64"}
    raws = [t.contiguous().view(torch.uint8).numpy() for t in tensors]
    buffer = np.zeros(sum(aligned(len(raw)) for raw in raws) + 64, np.uint8)
    operands, offset = [], 0
    for tensor, raw in zip(tensors, raws, strict=True):
        buffer[offset : offset + len(raw)] = raw
        operands.append(Operand(offset, codes[tensor.dtype]))
        offset += aligned(len(raw))
    base = operands.pop(0) if has_base else None
    n = tensors[0].numel()
    return Block(buffer, tuple(operands), base, "t", start, n, (n,), KEYS)


def cuts_of(n: int, cuts: Sequence[int]) -> list[tuple[int, int]]:
    edges = [0, *sorted({c for c in cuts if 0 < c < n}), n]
    return list(pairwise(edges))


def deltas(kind: str, n: int, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, generator=g)
    if kind == "lattice":
        base = torch.randn(n, generator=g) * 0.02
        return ((base + 1e-4 * x).bfloat16().float() - base.bfloat16().float()).float()
    if kind == "denormal":
        return x * 3e-41
    if kind == "mostly zero":
        return torch.where(torch.rand(n, generator=g) < 0.99, 0.0, x)
    if kind == "constant":
        return torch.full((n,), -0.25)
    if kind == "wide":
        return x * torch.exp(20 * torch.randn(n, generator=g).clamp(-4, 4))
    return x


KINDS = ["gaussian", "lattice", "denormal", "mostly zero", "constant", "wide"]
Maths = Callable[[Block], BlockMath]
MATHS: list[Maths] = [KernelMath, lambda piece: TorchMath(piece, "cpu", 4096)]
BOTH = pytest.mark.parametrize("math", MATHS, ids=["kernels", "torch"])


def expected_threshold(delta: torch.Tensor, k: int) -> Threshold:
    keys = delta.abs().numpy().view(np.int32)
    t = int(np.partition(keys, len(keys) - k)[len(keys) - k])
    return Threshold(t, int((keys == t).sum()), k - int((keys > t).sum()))


def select(
    delta: torch.Tensor,
    density: float,
    parts: Sequence[tuple[int, int]],
    math: Maths,
    sample: Sequence[tuple[int, int]] = (),
) -> tuple[Threshold, int]:
    """Return the threshold of delta's magnitudes, and the passes it took."""
    pieces = [(a, math(load([torch.zeros(b - a), delta[a:b]], a)), b - a) for a, b in parts]
    reducer = TopKReducer(TopK(TaskVector(0), density), delta.numel())
    if sample:
        for a, b in sample:
            reducer.add(0, a, b - a, math(load([torch.zeros(b - a), delta[a:b]], a)))
        reducer.narrow_by_sample()
    for passes in range(1, 10):
        for a, piece, n in pieces:
            reducer.add(0, a, n, piece)
        if reducer.end():
            return reducer.value, passes
    raise AssertionError("no end")


N = 10_007


@BOTH
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [1, 7, N // 5, N // 2, N])
def test_top_k_is_exact(kind: str, k: int, math: Maths) -> None:
    delta = deltas(kind, N)
    expected = expected_threshold(delta, k)
    density = (k + 0.5) / N if k < N else 1.0
    assert TopK(TaskVector(0), density).count(N) == k
    found, passes = select(delta, density, [(0, N)], math)
    assert found == expected
    assert passes == 2


@pytest.mark.parametrize("kind", KINDS)
@given(
    cuts=st.lists(st.integers(1, N - 1), max_size=5),
    k=st.integers(1, N),
    sample=st.lists(st.tuples(st.integers(0, N - 1), st.integers(1, 900)), max_size=4),
)
@settings(max_examples=15, deadline=None)
def test_top_k_is_exact_for_any_pieces_and_any_sample(
    kind: str, cuts: list[int], k: int, sample: list[tuple[int, int]]
) -> None:
    # A sample is a guess: too small, from the wrong place or misleading, the counts correct it.
    delta = deltas(kind, N, seed=1)
    density = (k + 0.5) / N if k < N else 1.0
    looks = [(a, min(N, a + length)) for a, length in sample]
    found, passes = select(delta, density, cuts_of(N, cuts), KernelMath, looks)
    assert found == expected_threshold(delta, k)
    assert passes <= 4


def test_a_sample_that_misleads_costs_a_pass_and_nothing_else() -> None:
    delta = torch.cat([torch.zeros(5000), deltas("gaussian", 5000)])
    found, passes = select(delta, 0.1, [(0, 10_000)], KernelMath, sample=[(0, 5000)])
    assert found == expected_threshold(delta, 1000)
    honest, fewer = select(delta, 0.1, [(0, 10_000)], KernelMath, sample=[(2500, 7500)])
    assert honest == found
    assert fewer <= passes


@BOTH
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_top_k_stops_at_a_value_that_is_not_finite(value: float, math: Maths) -> None:
    delta = deltas("gaussian", 1000)
    delta[777] = value
    with pytest.raises(NotFiniteError):
        select(delta, 0.2, [(0, 500), (500, 1000)], math)


@pytest.mark.parametrize("place", [0, 511, 512, 1000])
@pytest.mark.parametrize("elect", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_merge_counts_what_is_not_finite_in_its_output(place: int, elect: bool, value: float) -> None:
    for has_base in (True, False):
        tensors = [torch.ones(1001), deltas("gaussian", 1001), deltas("gaussian", 1001, 1)]
        tensors[-1][place] = value
        piece = load(tensors, has_base=has_base)
        vectors = (TaskVector(0), TaskVector(1))
        rule = TaskVectorMerge(vectors, elect=elect) if has_base else WeightedSum((1.0, 1.0, 1.0))
        for math in MATHS:
            assert math(piece).apply(rule, Operand(piece.models[-1].offset, "F32")).not_finite == 1
            piece = load(tensors, has_base=has_base)


# --- fixed-order sums


def vector_of(drop: int = 0, cut: Cut | None = None) -> TaskVector:
    return TaskVector(0, drop=drop, cut=cut)


REMOVALS = [
    vector_of(),
    vector_of(drop=2**31),
    vector_of(drop=2**32),
    vector_of(cut=Cut(int(np.float32(0.7).view(np.uint32)), "all")),
    vector_of(drop=2**30, cut=Cut(int(np.float32(0.25).view(np.uint32)), "thin", 2**31)),
]


@pytest.mark.parametrize("vector", REMOVALS)
@pytest.mark.parametrize("kind", ["gaussian", "constant", "wide"])
@given(cuts=st.lists(st.integers(1, 6), max_size=5))
@settings(max_examples=12, deadline=None)
def test_abs_sums_have_the_same_bits_for_any_cut_at_4096(
    kind: str, vector: TaskVector, cuts: list[int]
) -> None:
    n = 5 * 4096 + 1234
    delta = deltas(kind, n)

    def total(parts: Sequence[tuple[int, int]], math: Maths) -> float:
        reducer = SumsReducer(AbsSum(vector), [(0, n)])
        for a, b in reversed(parts):  # in any order, too
            reducer.add(0, a, b - a, math(load([torch.zeros(b - a), delta[a:b]], a)))
        assert reducer.end()
        assert isinstance(reducer.value, float)
        return reducer.value

    whole = total([(0, n)], KernelMath)
    parts = cuts_of(n, [4096 * c for c in cuts])
    assert total(parts, KernelMath).hex() == whole.hex()
    assert total([(0, n)], MATHS[1]).hex() == whole.hex()
    if vector == vector_of():
        assert whole == pytest.approx(float(delta.double().abs().sum()), rel=1e-14)


@BOTH
@pytest.mark.parametrize("needed", [1, 2, 99, 100])
@pytest.mark.parametrize("cuts", [[], [4096], [4096, 3 * 4096]])
def test_the_last_needed_tie_is_found_across_pieces(needed: int, cuts: list[int], math: Maths) -> None:
    n = 4 * 4096 + 77
    delta = deltas("gaussian", n)
    places = np.sort(np.random.default_rng(0).choice(n, 100, replace=False))
    delta[torch.from_numpy(places)] = torch.where(torch.arange(100) % 2 == 0, 9.5, -9.5)
    key = int(np.float32(9.5).view(np.uint32))
    reducer = TieIndexReducer(TieIndex(vector_of(), Threshold(key, 100, needed)), n)
    while True:
        parts = cuts_of(n, cuts) if reducer.wants is None else [reducer.wants[1:]]
        for a, b in parts:
            b = min(b, n)
            reducer.add(0, a, b - a, math(load([torch.zeros(b - a), delta[a:b]], a)))
        if reducer.end():
            break
    assert reducer.value == (0, int(places[needed - 1]) + 1)


# --- sums over columns


@pytest.mark.parametrize(
    "vectors", [(), (TaskVector(0), TaskVector(1, drop=2**30, rescale=1.25))], ids=["models", "task vectors"]
)
@pytest.mark.parametrize("cuts", [[], [1], [1, 2, 3]], ids=str)
def test_column_dots_have_the_same_bits_for_any_cut_between_runs_of_rows_and_any_block(
    cuts: list[int], vectors: tuple[TaskVector, ...]
) -> None:
    rows, columns = 203, 100
    run = 64 * columns
    assert rows_at_once(columns) == 64
    tensors = [
        deltas(kind, rows * columns, seed) for seed, kind in enumerate(("gaussian", "lattice", "wide"))
    ]
    tensors[1][77] = float("nan")  # no part in sums
    math = [
        KernelMath,
        *(partial(TorchMath, device="cpu", at_once=b) for b in (100, 300, 3200, 6400, 7000, 1 << 20)),
    ]
    found = []
    for one in math:
        sums = np.zeros((3 if vectors else 6, columns))
        for a, b in cuts_of(rows * columns, [cut * run for cut in cuts]):
            piece = load([tensor[a:b] for tensor in tensors], a)
            one(replace(piece, shape=((b - a) // columns, columns))).add_column_dots(vectors, sums)
        found.append(sums)
    assert all(np.array_equal(sums, found[0]) for sums in found)
    where = Where("t", 0, KEYS)
    terms = terms_of(vectors, tensors[1:], tensors[0], where)
    x = [term.nan_to_num(nan=0.0).double().numpy().reshape(rows, columns) for term in terms]
    for i, vector in enumerate(vectors):
        x[i] = vector.rescale * x[i]
    pair = 0
    for i in range(len(x)):
        for j in range(i, len(x)):
            total = np.zeros(columns)
            for first in range(0, rows, 64):
                total += np.add.accumulate(x[i][first : first + 64] * x[j][first : first + 64], axis=0)[-1]
            assert np.array_equal(total, found[0][pair])
            pair += 1


@pytest.mark.parametrize("selection", ["none", "spread", "importance"])
def test_sums_of_squares_have_the_same_bits_for_any_cut_and_any_block(selection: str) -> None:
    n, length = 5 * 4096 + 1234 - 14, 100
    n -= n % length
    tensors = [deltas(kind, n, seed) for seed, kind in enumerate(("gaussian", "lattice", "wide"))]
    vectors = (TaskVector(0, drop=2**30, rescale=1.25), TaskVector(1))
    scores = {"spread": Spread(vectors), "importance": Importance(vectors[0])}
    chosen = None if selection == "none" else Selection(scores[selection], Cut(0x3C000000, "index", 9000))
    found = []
    for math in (KernelMath, *(partial(TorchMath, device="cpu", at_once=b) for b in (4096, 8192, 1 << 20))):
        for cuts in [], [4096], [4096, 3 * 4096]:
            if selection == "importance" and (cuts or math is not KernelMath):
                continue  # its rows would be cut
            parts = []
            for a, b in cuts_of(n, cuts):
                piece = load([tensor[a:b] for tensor in tensors], a)
                if selection == "importance":
                    piece = replace(piece, shape=(n // length, length))
                parts.append(math(piece).squares(vectors, chosen))
            found.append(np.concatenate(parts))
    assert all(np.array_equal(parts, found[0]) for parts in found)
    where = Where("t", 0, KEYS, length)
    mask = chosen.mask(tensors[1:], tensors[0], where) if chosen else torch.ones(n, dtype=torch.bool)
    for i, vector in enumerate(vectors):
        left = vector.rescale * vector.surviving(tensors[1 + i], tensors[0], where).double()
        assert np.array_equal(block_sums((left * left * mask).numpy()), found[0][:, i])
    assert int(mask.sum()) > 0


@BOTH
def test_what_computes_a_piece_lets_go_of_its_buffer_at_once(math: Maths) -> None:
    """A reference cycle would keep the buffer until garbage is collected, beside all that memory is granted for."""
    vectors = (TaskVector(0), TaskVector(1))
    gc.disable()
    try:
        one = math(load([deltas("gaussian", 1000, seed) for seed in range(3)]))
        one.squares(vectors, None)
        one.count_keys(Spread(vectors), 0, (1 << 31) - 1, 15, np.zeros(1 << 16, np.int32))
        one.dots(vectors, 1000)
        gone = weakref.ref(one)
        del one
        assert gone() is None
    finally:
        gc.enable()
