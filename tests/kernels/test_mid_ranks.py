"""Mid-ranks by counting against their definition by sorting, over the values that betray: every bit must agree."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from streammerge.kernels.mid_ranks import ranking, shares_by_rank
from streammerge.kernels.operands import CODES, Operand, Operands, RankDrops, Span
from streammerge.kernels.ranks import ranked_abs_sums

LOW, SPREAD = 0.35, 0.3
BETRAYING = [0.0, -0.0, 1e-45, -1e-45, 1e-38, 2e-38, 1.0, -1.0, 1.0000001, 3.4e38, -3.4e38, np.inf, -np.inf]
NANS = np.array([0x7F800001, 0xFFC00000, 0x7FFFFFFF], np.uint32).view(np.float32)


def by_definition(row: np.ndarray) -> np.ndarray:
    """Return low + spread * (mid-rank - 1) / (n - 1), in the order of operations of `RankDrop.probabilities`."""
    patterns = row.view(np.uint32) & 0x7FFFFFFF
    ordered = np.sort(patterns)
    first, last = np.searchsorted(ordered, patterns), np.searchsorted(ordered, patterns, side="right")
    place: np.ndarray = LOW + SPREAD * (0.5 * (first + last - 1.0) / (len(row) - 1))
    return place


def check(*rows: np.ndarray) -> None:
    """Check rows of one length one after the other, so that buffers that are not reset show."""
    buffers = ranking(len(rows[0]))
    for row in rows:
        shares = np.full(len(row), np.nan)
        shares_by_rank(row, len(row), LOW, SPREAD, buffers, shares)
        assert (shares == by_definition(row)).all()


@settings(deadline=None, max_examples=40)
@given(st.integers(2, 150), st.integers(0, 2**32 - 1), st.lists(st.sampled_from(range(16)), min_size=1))
@example(2, 0, [0])
def test_values_that_betray_in_any_mixture(n: int, seed: int, kinds: list[int]) -> None:
    rng = np.random.default_rng(seed)
    values = np.concatenate([np.array(BETRAYING, np.float32), NANS])[kinds]
    row = rng.choice(values, n)
    near = (row.view(np.uint32) ^ rng.integers(0, 2, n, np.uint32)).view(np.float32)
    check(row, near, rng.standard_normal(n, np.float32), row)


@pytest.mark.parametrize("n", [2, 3, 127, 129, 2048, 5000, 40_000])
def test_rows_of_every_spread(n: int) -> None:
    rng = np.random.default_rng(n)
    normal = rng.standard_normal(n, np.float32) * np.float32(1e-3)
    lattice = np.round(normal * 2**13).astype(np.float32) * np.float32(2.0**-13)
    heavy = np.exp(rng.standard_normal(n) * 20).astype(np.float32)  # nearly all in one bucket
    few = np.where(rng.random(n) < 0.5, lattice, np.nextafter(lattice, np.float32(1)))
    outlier = normal.copy()
    outlier[-1] = 3e38  # all others in one bucket
    denormal = (rng.integers(0, 50, n).astype(np.uint32)).view(np.float32)
    check(
        normal, lattice, heavy, np.full(n, -2.5, np.float32), few, outlier, denormal, np.zeros(n, np.float32)
    )


@pytest.mark.parametrize(("rows", "length"), [(3, 4096), (5, 1000), (4100, 1), (700, 13)])
def test_sums_over_whole_rows_add_in_eight_lanes(rows: int, length: int) -> None:
    """Without a spread and with probability 1 everything survives: partial sums of 4096, element i in lane i % 8."""
    n = rows * length
    rng = np.random.default_rng(length)
    arena = np.concatenate([rng.standard_normal(2 * n, np.float32).view(np.uint32), np.zeros(8, np.uint32)])
    arena[n + 5] = 0x7FC00000
    base = Operand(arena.view(np.uint16), arena, 0, CODES["F32"])
    model = Operands(
        arena.view(np.uint16), arena, np.array([4 * n], np.int64), np.array([CODES["F32"]], np.int64)
    )
    drops = RankDrops(np.ones(1), np.zeros(1), False, np.zeros((1, 4), np.uint32))
    partials = np.full(-(-n // 4096), np.nan)
    ranked_abs_sums(model, base, Span(0, n), length, drops, partials)
    values = arena.view(np.float32)
    sizes = np.abs(values[n : 2 * n] - values[:n]).astype(np.float64)
    sizes = np.append(np.where(np.isnan(sizes), 0, sizes), np.zeros(-n % 4096)).reshape(-1, 512, 8)
    lanes = np.cumsum(sizes, axis=1)[:, -1]
    pairs = lanes[:, ::2] + lanes[:, 1::2]
    assert (partials == (pairs[:, 0] + pairs[:, 1]) + (pairs[:, 2] + pairs[:, 3])).all()
