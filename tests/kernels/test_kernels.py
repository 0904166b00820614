"""The fused kernels against exact oracles: integers and fractions, never another float."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from streammerge.algebra.block import Block, BlockMath, Operand
from streammerge.algebra.gram_matrix import rows_at_once
from streammerge.algebra.rules import TaskVectorMerge, WeightedSum
from streammerge.algebra.scores import Importance, Selection, Spread
from streammerge.algebra.task_vectors import Cut, TaskVector, Where, terms_of
from streammerge.backends.cpu.math import KernelMath
from streammerge.backends.torch.math import TorchMath, round_to
from streammerge.kernels.blocks import CODES, round_out, widen
from streammerge.numerics.ordered_sum import block_sums
from streammerge.numerics.philox import RandomKeys
from streammerge.statistics.kinds import AbsSum, Threshold, TieIndex, TopK
from streammerge.statistics.reducers import (
    NotFiniteError,
    SumsReducer,
    TieIndexReducer,
    TopKReducer,
)

KEYS = RandomKeys(3, ("one", "two"))
TORCH = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
FORMATS = {"BF16": (8, -126, 127), "F16": (11, -14, 15), "F32": (24, -126, 127)}
"""Precision, least and greatest exponent of a normal number."""


# --- widening


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_widening_is_exact_for_all_65536_patterns(dtype: str) -> None:
    patterns = np.arange(1 << 16, dtype=np.uint16)
    out = np.empty(1 << 16, np.float32)
    widen(patterns, patterns.view(np.uint32), 0, CODES[dtype], 1 << 16, out)
    expected = torch.from_numpy(patterns.view(np.int16)).view(TORCH[dtype]).float().numpy()
    number = ~np.isnan(expected)
    assert (out[number].view(np.uint32) == expected[number].view(np.uint32)).all()
    assert np.isnan(out[~number]).all()


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=20), st.integers(0, 5))
def test_fp32_passes_through_bit_for_bit_at_any_offset(patterns: list[int], before: int) -> None:
    arena = np.array([0] * before + patterns, np.uint32)
    out = np.empty(len(patterns), np.float32)
    widen(arena.view(np.uint16), arena, 4 * before, CODES["F32"], len(patterns), out)
    assert out.view(np.uint32).tolist() == patterns


# --- rounding


def exactly_rounded(value: float, dtype: str) -> float:
    """Round to nearest, ties to even, by fractions alone; overflow from half an ulp above the greatest."""
    precision, least, greatest = FORMATS[dtype]
    if value == 0 or not np.isfinite(value):
        return value
    exact = abs(Fraction(value))
    exponent = max(np.frexp(abs(value))[1] - 1, least)
    unit = Fraction(2) ** (int(exponent) - (precision - 1))
    rounded = round(exact / unit) * unit  # Fraction.__round__: ties to even
    limit = (2 - Fraction(2) ** (1 - precision)) * Fraction(2) ** greatest
    magnitude = np.inf if rounded > limit else float(rounded)
    return float(np.copysign(magnitude, value))


def rounded_by_kernel(values: np.ndarray, dtype: str) -> tuple[np.ndarray, int]:
    """Return the bits, and the number of values that are not finite."""
    arena = np.zeros(len(values) + 2, np.uint32)
    bad = round_out(values, len(values), arena.view(np.uint16), arena, 0, CODES[dtype])
    width = np.uint32 if dtype == "F32" else np.uint16
    return arena.view(width)[: len(values)].copy(), bad


def bits_of(values: Sequence[float], dtype: str) -> np.ndarray:
    """Return the bits of values that the format holds exactly."""
    tensor = torch.tensor(list(values), dtype=torch.float64).to(TORCH[dtype])
    if dtype == "F32":
        return tensor.view(torch.int32).numpy().view(np.uint32)
    return tensor.view(torch.int16).numpy().view(np.uint16)


def check_rounding(values: np.ndarray, dtype: str) -> None:
    expected = [exactly_rounded(float(v), dtype) for v in values]
    bits, bad = rounded_by_kernel(values, dtype)
    assert (bits == bits_of(expected, dtype)).all()
    assert bad == sum(not np.isfinite(v) for v in expected)
    by_torch = round_to(torch.from_numpy(values), dtype)
    width = torch.int32 if dtype == "F32" else torch.int16
    assert (by_torch.view(width).numpy().view(bits.dtype) == bits).all()


def neighbours(values: np.ndarray) -> np.ndarray:
    """The values, the fp64 and fp32 numbers next to them, and all negated."""
    with np.errstate(over="ignore"):
        single = values.astype(np.float32)
        near = [values, np.nextafter(values, np.inf), np.nextafter(values, -np.inf)]
        near += [np.nextafter(single, np.float32(s)).astype(np.float64) for s in (np.inf, -np.inf)]
        near += [np.nextafter(near[-1], np.inf), np.nextafter(near[-2], -np.inf)]
    everything = np.concatenate(near)
    everything = everything[np.isfinite(everything)]
    return np.concatenate([everything, -everything])


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_every_sixteen_bit_number_and_every_halfway_case_round_exactly(dtype: str) -> None:
    # All non-negative finite patterns, subnormals included, and the midpoint above each.
    patterns = np.arange(0x7F80 if dtype == "BF16" else 0x7C00, dtype=np.uint16)
    numbers = torch.from_numpy(patterns.view(np.int16)).view(TORCH[dtype]).double().numpy()
    precision, _, greatest = FORMATS[dtype]
    above = np.append(numbers[1:], 2.0 ** (greatest + 1))
    middle = (numbers + above) / 2
    even = np.where(patterns % 2 == 0, patterns, patterns + 1)
    for values, expected in [
        (numbers, patterns),
        (middle, even),
        (np.nextafter(middle, np.inf), patterns + 1),
        (np.nextafter(middle, -np.inf), patterns),
        # A double-rounding trap: the nearest fp32 number is the midpoint itself.
        (middle + (above - numbers) * 2.0**-25, patterns + 1),
        (middle - (above - numbers) * 2.0**-25, patterns),
    ]:
        bits, _ = rounded_by_kernel(values, dtype)
        assert (bits == expected).all()
        assert (
            round_to(torch.from_numpy(values), dtype).view(torch.int16).numpy().view(np.uint16) == bits
        ).all()
        negative, _ = rounded_by_kernel(-values, dtype)
        assert (negative == (expected | 0x8000)).all()
    assert precision in (8, 11)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_rounding_is_exact_around_every_edge_of_a_format(dtype: str) -> None:
    precision, least, greatest = FORMATS[dtype]
    exponents = np.array(
        [
            least - precision - 1,
            least - precision,
            least - precision + 1,
            least - 1,
            least,
            least + 1,
            -1,
            0,
            1,
            greatest - 1,
            greatest,
        ]
    )
    fractions = np.array([1.0, 1.5, 1.25, 2 - 2.0 ** (1 - precision), 2 - 2.0**-precision, 1 + 2.0**-precision,
                          1 + 3 * 2.0**-precision, 1 + 2.0**-precision + 2.0**-30])  # fmt: skip
    values = np.ldexp(fractions[:, None], exponents[None, :]).ravel()
    tiny = np.array([0.0, 5e-324, 1e-310, 2.0**-149, 2.0**-150, 2.0**-150 * (1 + 2.0**-40), 2.0**-151, 2.0**-134,
                     2.0**-24, 2.0**-25, 2.0**-25 * 1.001, 1e300, 65519.99, 65520.0, 3.4028235677973366e38])  # fmt: skip
    check_rounding(neighbours(np.concatenate([values, tiny])), dtype)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@given(values=st.lists(st.floats(allow_nan=False), min_size=1, max_size=30))
@settings(max_examples=60, deadline=None)
def test_rounding_is_exact_for_any_fp64_value(dtype: str, values: list[float]) -> None:
    check_rounding(np.array(values), dtype)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@given(mantissa=st.integers(2**24, 2**25 - 1), low=st.integers(-3, 3), exponent=st.integers(-160, 140))
@example(mantissa=2**24 + 2**16, low=1, exponent=0)
@settings(max_examples=100, deadline=None)
def test_rounding_is_exact_next_to_fp32_halfway_cases(
    dtype: str, mantissa: int, low: int, exponent: int
) -> None:
    value = np.ldexp(float(mantissa * 2**28 + low), exponent - 52)  # 53 bits: fp32 sees all but the last few
    check_rounding(np.array([value, -value]), dtype)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_a_nan_becomes_the_canonical_one_and_is_counted(dtype: str) -> None:
    patterns = np.array(
        [0x7FF8000000000000, 0xFFF8000000000001, 0x7FF0000000000001, 0x7FFFFFFFFFFFFFFF], np.uint64
    )
    bits, bad = rounded_by_kernel(patterns.view(np.float64), dtype)
    assert bad == 4
    assert set(bits.tolist()) == {{"BF16": 0x7FC0, "F16": 0x7E00, "F32": 0x7FC00000}[dtype]}


# --- pieces


def aligned(n: int) -> int:
    return (n + 7) // 8 * 8


def load(tensors: Sequence[torch.Tensor], start: int = 0, has_base: bool = True) -> Block:
    """Lay out [base, models...] in an arena, as the engine does."""
    codes = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.float64: "F64"}
    raws = [t.contiguous().view(torch.uint8).numpy() for t in tensors]
    arena = np.zeros(sum(aligned(len(raw)) for raw in raws) + 64, np.uint8)
    operands, offset = [], 0
    for tensor, raw in zip(tensors, raws, strict=True):
        arena[offset : offset + len(raw)] = raw
        operands.append(Operand(offset, codes[tensor.dtype]))
        offset += aligned(len(raw))
    base = operands.pop(0) if has_base else None
    n = tensors[0].numel()
    return Block(arena, tuple(operands), base, "t", start, n, (n,), KEYS)


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
            return reducer.answer, passes
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
        assert isinstance(reducer.answer, float)
        return reducer.answer

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
    assert reducer.answer == (0, int(places[needed - 1]) + 1)


# --- masks


def survivors(delta: torch.Tensor, vector: TaskVector, start: int) -> np.ndarray:
    """Which elements a kernel merge keeps, seen in its output over a base of zeros."""
    piece = load([torch.zeros(delta.numel()), delta], start)
    out = Operand(piece.models[0].offset, "F32")
    applied = KernelMath(piece).apply(TaskVectorMerge((vector,)), out)
    written = piece.arena[out.offset : out.offset + 4 * delta.numel()].view(np.float32)
    kept = written != 0
    assert not (vector.drop or vector.cut) or applied.kept == (int(kept.sum()),)
    return kept.copy()


KEY = int(np.float32(0.25).view(np.uint32))
CUTS = [
    Cut(KEY, "drop"),
    Cut(KEY, "all"),
    Cut(KEY, "thin", 2**31),
    Cut(KEY, "thin", 2**27),
    Cut(KEY, "index", 1500),
]


@pytest.mark.parametrize("cut", [None, *CUTS])
@pytest.mark.parametrize("drop", [0, 2**31])
@given(cuts=st.lists(st.integers(1, 2999), max_size=4))
@settings(max_examples=8, deadline=None)
def test_masks_do_not_depend_on_the_pieces(drop: int, cut: Cut | None, cuts: list[int]) -> None:
    if drop == 0 and cut is None:
        return
    # Dense ties in one half, sparse ones in the other: the kernel draws words in two ways.
    delta = torch.cat([torch.full((1500,), 0.25), deltas("gaussian", 1500)])
    delta[1600::97] = -0.25
    vector = vector_of(drop, cut)
    whole = survivors(delta, vector, 0)
    pieces = [survivors(delta[a:b], vector, a) for a, b in cuts_of(3000, cuts)]
    assert (np.concatenate(pieces) == whole).all()
    if cut is not None:
        magnitude = delta.abs().numpy()
        assert not whole[magnitude < 0.25].any()
        if drop == 0:
            assert whole[magnitude > 0.25].all()


def test_an_output_may_lie_over_an_input_of_its_width() -> None:
    # `survivors` overwrites the model; here the base is overwritten by a narrower output as well.
    base, theta = deltas("gaussian", 5000), deltas("gaussian", 5000, 1)
    expected = (base.double() + 0.5 * (theta - base).double()).bfloat16()
    piece = load([base, theta])
    assert piece.base is not None
    KernelMath(piece).apply(TaskVectorMerge((TaskVector(0),), scale=0.5), Operand(piece.base.offset, "BF16"))
    written = piece.arena[piece.base.offset : piece.base.offset + 2 * 5000].view(np.int16)
    assert torch.equal(torch.from_numpy(written.copy()).view(torch.bfloat16), expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_election_does_not_hide_what_is_not_finite_in_torch(value: float) -> None:
    tensors = [torch.ones(1001), deltas("gaussian", 1001), deltas("gaussian", 1001, 1)]
    tensors[-1][511] = value
    piece = load(tensors)
    rule = TaskVectorMerge((TaskVector(0), TaskVector(1)), elect=True)
    assert TorchMath(piece, "cpu", 4096).apply(rule, Operand(0, "F32")).not_finite == 1


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
        *(partial(TorchMath, device="cpu", block=b) for b in (100, 300, 3200, 6400, 7000, 1 << 20)),
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
    for math in (KernelMath, *(partial(TorchMath, device="cpu", block=b) for b in (4096, 8192, 1 << 20))):
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
