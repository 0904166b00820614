"""TIES by hand: trims, elections and means of a few elements (https://arxiv.org/abs/2306.01708)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from streammerge.algebra.rules import Inputs, TaskVectorMerge
from streammerge.algebra.task_vectors import Cut, TaskVector, Where
from streammerge.methods.registry import get_method
from streammerge.methods.tensor_context import TensorContext
from streammerge.statistics.kinds import (
    SignTotal,
    Threshold,
    TieIndex,
    TopK,
)
from tests.methods.by_hand import DELTAS, KEYS, call, follow, parameters_of

# Trimmed to the top half of each: the thresholds are 0.25, 0.5 and 0.75.
#   0.5  -0.25   0    0
#   0     0.5    0   -1
#  -1     0      0    0.75
# Totals: -0.5, +0.25, 0, -0.25; so the signs elected are -, +, none, -.
# Disjoint means: -1, 0.5, 0, -1.
TRIMMED_AT = [0.25, 0.5, 0.75]


TIES = [0.0, 2.5, 3.0, 3.0]


def key(magnitude: float) -> int:
    return int(np.float32(magnitude).view(np.uint32))


# --- TIES (https://arxiv.org/abs/2306.01708)


def cut_at(magnitudes: Sequence[float], **more: Any) -> TaskVectorMerge:
    vectors = tuple(TaskVector(i, cut=Cut(key(m), "all")) for i, m in enumerate(magnitudes))
    return TaskVectorMerge(vectors, elect=True, normalize=True, **more)


def test_ties_trims_elects_and_takes_the_disjoint_mean() -> None:
    assert call(cut_at(TRIMMED_AT), DELTAS) == TIES


def test_ties_scales_by_lambda() -> None:
    assert call(cut_at(TRIMMED_AT, scale=0.5), DELTAS) == [0.5, 2.25, 3.0, 3.5]


def test_the_method_asks_for_the_top_half_and_returns_that_rule() -> None:
    wanted = follow("ties", 3, density=0.5)
    assert [(r.vector.model, r.density, r.count(4), r.extent) for r in wanted] == [
        (i, 0.5, 2, "tensor") for i in range(3)
    ]
    thresholds: list[Any] = [Threshold(key(m), 1, 1) for m in TRIMMED_AT]
    rule = follow("ties", 3, thresholds, density=0.5)
    assert call(rule, DELTAS) == TIES
    assert call(follow("ties", 3, thresholds, density=0.5, ties="all"), DELTAS) == TIES
    # `drop` removes the thresholds too: 0.5; -1 in the last place; -1 in the first, which outweighs 0.5.
    dropped = follow("ties", 3, thresholds, density=0.5, ties="drop")
    assert call(dropped, DELTAS) == [0.0, 2.0, 3.0, 3.0]


def test_the_sum_of_the_agreeing_entries_is_left_undivided_without_normalize() -> None:
    deltas = [[0.5, 0.25], [0.25, -1.0], [-0.5, -0.25]]
    vectors = tuple(TaskVector(i) for i in range(3))
    assert call(TaskVectorMerge(vectors, elect=True), deltas, [0.0, 0.0]) == [0.75, -1.25]
    assert call(TaskVectorMerge(vectors, elect=True, normalize=True), deltas, [0.0, 0.0]) == [0.375, -0.625]


def test_weights_multiply_before_the_election_and_divide_after() -> None:
    # Weights 3, 1, 1 turn the first column: 1.5 against 0.75.  Mean: (3 * 0.5) / 3.
    vectors = (TaskVector(0, 3.0), TaskVector(1), TaskVector(2))
    deltas = [[0.5, -0.5], [-0.5, 1.0], [-0.25, 1.0]]
    merge = TaskVectorMerge(vectors, elect=True, normalize=True)
    assert call(merge, deltas, [0.0, 0.0]) == [0.5, 1.0]
    equal = TaskVectorMerge(tuple(TaskVector(i) for i in range(3)), elect=True, normalize=True)
    assert call(equal, deltas, [0.0, 0.0]) == [-0.375, 1.0]


@pytest.mark.parametrize(("sign", "expected"), [(0, [0.0, 0.0]), (1, [0.5, 0.0]), (-1, [-0.5, 0.0])])
def test_an_undecided_element_goes_where_zero_sign_says(sign: int, expected: list[float]) -> None:
    merge = TaskVectorMerge((TaskVector(0), TaskVector(1)), elect=True, normalize=True, zero_sign=sign)
    assert call(merge, [[0.5, 0.0], [-0.5, 0.0]], [0.0, 0.0]) == expected


def test_the_majority_of_elected_signs_decides_and_a_draw_is_negative() -> None:
    deltas = [[0.5, 1.0, 1.0, -1.0], [-0.5, 0.0, 0.0, 0.0]]
    (statistic,) = follow("ties", 2, zero_sign="majority")
    assert isinstance(statistic, SignTotal)
    base = torch.zeros(4)
    total = statistic.merge.sign_total(Inputs([torch.tensor(d) for d in deltas], base, Where("t", 0, KEYS)))
    assert total == 1
    for answer, expected in [(total, 0.5), (0, -0.5), (-3, -0.5)]:
        rule = follow("ties", 2, [answer], zero_sign="majority")
        assert call(rule, deltas, [0.0] * 4) == [expected, 1.0, 1.0, -1.0]


def test_ties_is_antisymmetric_under_a_change_of_sign() -> None:
    mirrored = [[-x for x in delta] for delta in DELTAS]
    zero = [0.0] * 4
    assert call(cut_at(TRIMMED_AT), mirrored, zero) == [-x for x in call(cut_at(TRIMMED_AT), DELTAS, zero)]


def test_the_paper_preset_is_the_published_code() -> None:
    preset = dict(get_method("ties").presets["paper"])
    assert preset == {
        "density": 0.2,
        "trim_scope": "model",
        "count": "floor+1",
        "ties": "all",
        "zero_sign": "majority",
    }
    wanted = follow("ties", 3, **preset)
    assert [(r.extent, r.count(10), r.count(4)) for r in wanted] == [("model", 3, 1)] * 3


@pytest.mark.parametrize(
    ("density", "n", "floor", "plus_one"),
    [
        (0.2, 10, 2, 3),
        (0.29, 100, 28, 29),
        (1 - 0.9, 1000, 99, 100),
        (0.2, 4, 1, 1),
        (0.001, 1, 1, 1),
        (0.999, 1, 1, 1),
        (0.5, 3, 1, 2),
        (0.999, 1000, 999, 1000),
    ],
)
def test_k_is_the_references_formula(density: float, n: int, floor: int, plus_one: int) -> None:
    assert TopK(TaskVector(0), density).count(n) == floor
    assert TopK(TaskVector(0), density, plus_one=True).count(n) == plus_one


def test_ties_at_the_threshold_are_kept_by_policy() -> None:
    delta = [0.5, 0.5, 0.5, 1.0]
    threshold = Threshold(key(0.5), 3, 1)

    def kept(policy: str, *more: list[Any]) -> list[float]:
        rule = follow("ties", 1, [threshold], *more, density=0.5, ties=policy)
        return call(rule, [delta], [0.0] * 4)

    assert kept("all") == delta
    assert kept("drop") == [0.0, 0.0, 0.0, 1.0]
    (statistic,) = follow("ties", 1, [threshold], density=0.5, ties="index")
    assert statistic == TieIndex(TaskVector(0), threshold)
    assert kept("index", [(0, 1)]) == [0.5, 0.0, 0.0, 1.0]
    words = Where("t", 0, KEYS).words("ties", 0, 4, torch.device("cpu")).tolist()
    limit = math.floor(2**32 / 3 + 0.5)
    assert kept("thin") == [d if d == 1.0 or w < limit else 0.0 for d, w in zip(delta, words, strict=True)]


def test_a_tie_index_in_another_tensor_keeps_all_or_none_here() -> None:
    threshold = Threshold(key(0.5), 3, 1)
    for ordinal, expected in [(3, [0.5, 0.5]), (5, [0.5, 0.0]), (9, [0.0, 0.0])]:
        # The ties end at element 1 of tensor 5.
        parameters = parameters_of("ties", 1, density=0.5, ties="index", trim_scope="model")
        rule = get_method("ties").start(TensorContext(1, ordinal), parameters, [[threshold], [(5, 1)]])
        assert not isinstance(rule, list)
        assert call(rule, [[0.5, 0.5]], [0.0, 0.0]) == expected


def test_density_one_keeps_all_zero_keeps_nothing_and_neither_asks() -> None:
    assert call(follow("ties", 2, density=(1.0, 0.0)), [[0.5], [4.0]], [1.0]) == [1.5]
    assert isinstance(follow("ties", 2), TaskVectorMerge)
