"""Tables small enough to work out by hand, one per paper; all numbers are exact in binary."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from streammerge.algebra.rules import CopyOf, FisherMean, Formula, TaskVectorMerge, WeightedSum
from streammerge.algebra.task_vectors import TaskVector, Where
from streammerge.errors import ConfigError
from streammerge.methods.catalog import load_builtin
from streammerge.methods.registry import get_method
from streammerge.methods.tensor_context import TensorContext
from streammerge.numerics.philox import RandomKeys
from streammerge.statistics.kinds import (
    AbsSum,
    SquareTotal,
    Touched,
    Touches,
)
from tests.methods.by_hand import BASE, DELTAS, KEYS, call, follow, parameters_of

load_builtin()


# --- task arithmetic (https://arxiv.org/abs/2212.04089)


@pytest.mark.parametrize(
    ("weights", "more", "expected"),
    [
        ((1.0, 1.0), {}, [1.75, 1.75]),  # addition
        ((1.0, 1.0), {"lambda": 0.5}, [1.375, 1.875]),
        ((1.0, 1.0), {"normalize": True}, [1.375, 1.875]),  # addition, divided by the sum of weights
        ((-1.0, 0.0), {}, [0.5, 2.0]),  # negation of the first
        ((1.0, -1.0), {"normalize": True}, [1.25, 2.25]),  # a sum of zero divides nothing
    ],
)
def test_task_vectors_are_added_and_negated(
    weights: tuple[float, ...], more: dict[str, Any], expected: list[float]
) -> None:
    rule = follow("task_arithmetic", 2, weight=weights, **more)
    assert call(rule, [[0.5, 0.0], [0.25, -0.25]], [1.0, 2.0]) == expected


def test_an_analogy_is_c_plus_b_minus_a() -> None:
    # A is to B as C is to D, with the ancestor as base: D = base + (C + B - A).
    a, b, c = [0.5, 0.0, 0.25], [0.5, 1.0, 0.25], [0.0, 0.0, -2.0]
    rule = follow("task_arithmetic", 3, weight=(-1.0, 1.0, 1.0))
    assert call(rule, [a, b, c], [1.0, 1.0, 1.0]) == [1.0, 2.0, -1.0]


# --- DARE (https://arxiv.org/abs/2311.03099)


def test_dare_divides_what_survives_by_its_probability() -> None:
    rule = follow("dare_linear", 1, density=0.25)
    (vector,) = rule.vectors
    assert vector == TaskVector(0, rescale=4.0, drop=3 << 30)
    words = Where("t", 0, KEYS).words("dare", 0, 4, torch.device("cpu")).tolist()
    expected = [4 * d if w >= 3 << 30 else 0.0 for d, w in zip(DELTAS[0], words, strict=True)]
    assert call(rule, DELTAS[:1], [0.0] * 4) == expected
    unscaled = follow("dare_linear", 1, density=0.25, rescale="none")
    assert call(unscaled, DELTAS[:1], [0.0] * 4) == [x / 4 for x in expected]


def test_dare_is_unbiased_with_the_variance_of_the_paper() -> None:
    # METHODS section 4, test 8: E = delta, Var = delta^2 p / (1 - p); 400 seeds x 256 elements.
    seeds, n, density = 400, 256, 0.25
    delta = (torch.arange(n) + 1) / 256
    rule = follow("dare_linear", 1, density=density)
    base = torch.zeros(n)
    draws = torch.stack([rule([delta], base, Where("t", 0, RandomKeys(s, ("a",)))) for s in range(seeds)])
    variance = delta.double() ** 2 * (1 - density) / density
    z2 = float(((draws.mean(0) - delta) ** 2 / (variance / seeds)).sum())
    assert abs((z2 / n) ** (1 / 3) - (1 - 2 / (9 * n))) < 5 * math.sqrt(2 / (9 * n))
    ratio = float((((draws - delta) ** 2).mean(0) / variance).mean())
    # (d/q - d)^2 takes two values: 9 d^2 (1 in 4) and d^2; over the variance 3 d^2 its deviation is 1.155.
    assert abs(ratio - 1) < 5 * 1.155 / math.sqrt(seeds * n)


def test_dare_by_l1_restores_the_norm() -> None:
    wanted = follow("dare_linear", 1, density=0.5, rescale="l1")
    whole, masked = TaskVector(0), TaskVector(0, drop=1 << 31)
    assert wanted == [AbsSum(whole), AbsSum(masked)]
    rule = follow("dare_linear", 1, [3.0, 2.0], density=0.5, rescale="l1")
    assert [v.rescale for v in rule.vectors] == [1.5]
    nothing_left = follow("dare_linear", 1, [3.0, 0.0], density=0.5, rescale="l1")
    assert [v.rescale for v in nothing_left.vectors] == [1.0]


@pytest.mark.parametrize("density", [0.0, 1.0])
def test_dare_at_the_ends_is_the_base_or_task_arithmetic(density: float) -> None:
    for name in ("dare_linear", "dare_ties"):
        rule = follow(name, 1, density=density)
        assert call(rule, DELTAS[:1]) == [b + density * d for b, d in zip(BASE, DELTAS[0], strict=True)]


def test_dare_ties_sums_the_agreeing_survivors() -> None:
    rule = follow("dare_ties", 3)
    # Untrimmed totals: -0.25, +0.375, +0.25, -0.1875.
    assert call(rule, DELTAS) == [1.0 - 1.0, 2.0 + 0.625, 3.0 + 0.375, 4.0 - 1.0]
    mean = follow("dare_ties", 3, normalize=True)
    assert call(mean, DELTAS) == [0.0, 2.0 + 0.3125, 3.0 + 0.1875, 3.0]


# --- RAM (https://arxiv.org/abs/2601.13572)

RAM_DELTAS = [[1.0, 0.5, 0.0, 0.25], [0.0, 0.25, 0.0, 0.125], [0.0, -0.5, 0.0, 0.0]]


# Above 1/8: the first alone; all three; none; the first alone (1/8 is not above it).


def test_ram_takes_what_one_model_touched_whole_and_averages_what_several_did() -> None:
    rule = follow("ram", 3, epsilon=0.125)
    assert call(rule, RAM_DELTAS, [0.0] * 4) == [1.0, 0.25 / 3, 0.0, 0.25]


def test_ramplus_makes_what_one_model_touched_larger_by_what_it_shares() -> None:
    (statistic,) = follow("ramplus_tl", 3, epsilon=0.125)
    assert isinstance(statistic, Touches)
    touched = Touched((2, 0, 0), (1, 1, 1))  # rho = 1/2 for the first; the others have nothing alone
    rule = follow("ramplus_tl", 3, [touched], epsilon=0.125, r=0.5, alpha=1.0)
    assert rule.factors == (1.25, 1.0, 1.0)
    assert call(rule, RAM_DELTAS, [0.0] * 4) == [1.25, 0.25 / 3, 0.0, 0.3125]
    clipped = follow("ramplus_tl", 3, [touched], epsilon=0.125, r=0.5, alpha=0.25)
    assert call(clipped, RAM_DELTAS, [0.0] * 4) == [1.125, 0.25 / 3, 0.0, 0.28125]


# --- averages


@pytest.mark.parametrize(
    ("weights", "more", "expected"),
    [
        ((1.0, 1.0), {}, [2.0, 3.0]),
        ((3.0, 1.0), {}, [1.5, 2.5]),
        ((0.75, 0.25), {"normalize": False}, [1.5, 2.5]),
        ((1.0, 1.0), {"normalize": False}, [4.0, 6.0]),
        ((2.0, -1.0), {}, [-1.0, 0.0]),
    ],
)
def test_linear_is_the_weighted_average(
    weights: tuple[float, ...], more: dict[str, Any], expected: list[float]
) -> None:
    rule = follow("linear", 2, weight=weights, **more)
    assert isinstance(rule, WeightedSum)
    assert (
        rule([torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])], None, Where("t", 0, KEYS)).tolist()
        == expected
    )


@pytest.mark.parametrize("weights", [(1.0, -1.0), (-1.0, 0.5), (0.0, 0.0)])
def test_linear_refuses_weights_without_a_positive_sum(weights: tuple[float, ...]) -> None:
    with pytest.raises(ConfigError, match="positive weights or normalize: false"):
        follow("linear", 2, weight=weights)
    assert follow("linear", 2, weight=weights, normalize=False) == WeightedSum(weights)


# Two models, four parameters (Matena and Raffel, equation 3), the plain formula:
#   theta_1   1     2     3    -4         F_1   1    0   0.25   3
#   theta_2   5     6     7     4         F_2   3    2   0      1
#   certainties 1:3, 0:2, 0.25:0 and 3:1, so the means are 4, 6, 3 and -2; with the second's weight doubled,
#   1:6, 0:4, 0.25:0 and 3:2, so 31/7, 6, 3 and -4/5.
FISHER_MODELS = [[1.0, 2.0, 3.0, -4.0], [5.0, 6.0, 7.0, 4.0]]


DIAGONALS = [[1.0, 0.0, 0.25, 3.0], [3.0, 2.0, 0.0, 1.0]]


def fisher_merge(diagonals: Sequence[Sequence[float]], *answers: list[Any], **given: Any) -> list[float]:
    rule = get_method("fisher").start(
        TensorContext(2, fisher=True), parameters_of("fisher", 2, **given), list(answers)
    )
    assert isinstance(rule, FisherMean)
    models = [torch.tensor(values) for values in FISHER_MODELS]
    merged = rule(models, None, Where("t", 0, KEYS), [torch.tensor(values) for values in diagonals])
    return merged.tolist()


def test_fisher_is_the_average_weighed_by_certainty() -> None:
    plain = {"normalize": False, "floor": 0.0}
    assert fisher_merge(DIAGONALS, **plain) == [4.0, 6.0, 3.0, -2.0]
    assert fisher_merge(DIAGONALS, **plain, weight=(1.0, 2.0)) == pytest.approx([31 / 7, 6.0, 3.0, -0.8])


def test_fisher_divides_each_diagonal_by_its_norm() -> None:
    # Norms 4 and 2: the certainties become 0.25:1.5, 0:1, 0.0625:0 and 0.75:0.5.
    squares: list[Any] = [SquareTotal(16.0, 4), SquareTotal(4.0, 4)]
    merged = fisher_merge(DIAGONALS, squares, floor=0.0)
    assert merged == pytest.approx([31 / 7, 6.0, 3.0, -0.8])


def test_fisher_knows_what_to_do_where_no_model_knows_anything() -> None:
    unknown = [[0.0] * 4, [0.0] * 4]
    plain = {"normalize": False, "floor": 0.0}
    assert fisher_merge(unknown, **plain) == FISHER_MODELS[0]
    assert fisher_merge(unknown, **plain, fallback="average") == [3.0, 4.0, 5.0, 0.0]
    # A raw floor of 1 on the target alone decides everything; on all, it makes the plain average.
    assert fisher_merge(unknown, normalize=False, floor=1.0, floor_units="raw") == FISHER_MODELS[0]
    on_all = fisher_merge(unknown, normalize=False, floor=1.0, floor_units="raw", floor_on="all")
    assert on_all == [3.0, 4.0, 5.0, 0.0]
    # Raised to 2: 2:3, 2:2, 2:2, 3:2; raised by 2: 3:5, 2:4, 2.25:2 and 5:3.
    to = fisher_merge(DIAGONALS, normalize=False, floor=2.0, floor_units="raw", floor_on="all")
    assert to == pytest.approx([3.4, 4.0, 5.0, -0.8])
    by = fisher_merge(
        DIAGONALS, normalize=False, floor=2.0, floor_units="raw", floor_on="all", floor_how="add"
    )
    assert by == pytest.approx([3.5, 14 / 3, 83 / 17, -1.0])


def test_passthrough_copies_or_scales() -> None:
    assert follow("passthrough", 1) == CopyOf(0)
    assert follow("passthrough", 1, scale=1.0) == CopyOf(0)
    assert follow("passthrough", 1, scale=0.5) == WeightedSum((0.5,))


# --- precision


def test_sums_run_in_fp64_and_deltas_in_fp32() -> None:
    # 2^24 + 1 is no fp32 number: the sum of these two models is not lost, ...
    models = [torch.tensor([2.0**24]), torch.tensor([1.0])]
    where = Where("t", 0, KEYS)
    assert WeightedSum((1.0, 1.0))(models, None, where).tolist() == [2.0**24 + 1]
    # ... while delta = fl32(theta - theta_0) is rounded, by definition.
    rule = TaskVectorMerge((TaskVector(0),))
    assert rule(models[:1], torch.tensor([-1.0]), where).tolist() == [2.0**24 - 1]


def test_a_plain_formula_sees_the_pieces_and_its_parameters() -> None:
    formula = Formula(lambda models, base, t: base + t * (models[0] - base), {"t": 0.5})
    assert formula([torch.tensor([3.0])], torch.tensor([1.0]), Where("t", 0, KEYS)).tolist() == [2.0]
