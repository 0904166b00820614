"""Schedules: tables worked by hand, what each is defined as, and what no config can ask for."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest

from streammerge.config import parse_config
from streammerge.config.schedules import KINDS, Schedule, parse_schedule
from streammerge.errors import ConfigError

DECAYS = {"ema": ["0.5", ".9", "0.999", "1e-3"], "wsm": ["linear", "sqrt", "cosine"]}
ALL = [Schedule(kind, decay) for kind in KINDS for decay in DECAYS.get(kind, [""])]

BY_HAND = [
    ("sma", [1 / 4, 1 / 4, 1 / 4, 1 / 4]),
    ("sma", [1.0]),
    ("wma", [0.1, 0.2, 0.3, 0.4]),
    ("ema:0.5", [1 / 8, 1 / 8, 1 / 4, 1 / 2]),
    ("ema:0.9", [0.81, 0.09, 0.1]),  # 0.9 * 0.9, 0.9 * 0.1, 0.1
    ("wsm:linear", [1 / 4, 1 / 4, 1 / 4, 1 / 4, 0]),  # d = 3/4, 2/4, 1/4, 0
    ("wsm:sqrt", [0.5, math.sqrt(0.5) - 0.5, math.sqrt(0.75) - math.sqrt(0.5), 1 - math.sqrt(0.75), 0]),
    ("wsm:cosine", [1 / 4, 1 / 2, 1 / 4, 0]),  # d = (1 + cos 60°) / 2 = 3/4, 1/4, 0
    ("wsm:cosine", [1.0]),  # the trunk alone
    ("wsm:linear", [1.0, 0.0]),
]


@pytest.mark.parametrize(("text", "coefficients"), BY_HAND)
def test_the_coefficients_are_those_worked_by_hand(text: str, coefficients: list[float]) -> None:
    found = parse_schedule(text, "schedule").coefficients(len(coefficients))
    np.testing.assert_allclose(found, coefficients, rtol=4e-16, atol=1e-16)
    assert [c == 0 for c in found] == [c == 0 for c in coefficients]


@pytest.mark.parametrize("schedule", ALL, ids=str)
def test_the_coefficients_are_shares_that_sum_to_one(schedule: Schedule) -> None:
    for n in (1, 2, 3, 7, 8, 64, 101):
        coefficients = schedule.coefficients(n)
        assert len(coefficients) == n
        assert all(0 <= c <= 1 for c in coefficients)
        assert abs(sum(map(Fraction, coefficients)) - 1) < 1e-16 * n


def test_every_kind_is_in_the_tables() -> None:
    assert (
        {schedule.kind for schedule in ALL} == set(KINDS) == {text.partition(":")[0] for text, _ in BY_HAND}
    )


def test_a_moving_average_is_its_recursion() -> None:
    weights = np.random.default_rng(0).normal(size=(9, 50))
    mean = weights[0]
    for one in weights[1:]:
        mean = 0.8 * mean + 0.2 * one
    np.testing.assert_allclose(Schedule("ema", "0.8").coefficients(9) @ weights, mean, rtol=1e-13)


@pytest.mark.parametrize(
    ("decay", "f"),
    [
        ("linear", lambda x: 1 - x),
        ("sqrt", lambda x: 1 - math.sqrt(x)),
        ("cosine", lambda x: (1 + math.cos(math.pi * x)) / 2),
    ],
)
def test_a_decay_scales_the_updates_after_the_trunk(decay: str, f: object) -> None:
    """W_0 + sum_i f(i / n) (W_i - W_(i-1)): what a decayed learning rate does to the updates between checkpoints."""
    assert callable(f)
    weights = np.random.default_rng(1).normal(size=(12, 50))
    decayed = weights[0] + sum(f(i / 11) * (weights[i] - weights[i - 1]) for i in range(1, 12))
    np.testing.assert_allclose(Schedule("wsm", decay).coefficients(12) @ weights, decayed, rtol=1e-12)


AVERAGE = "merge_method: linear\ncheckpoints: {directory: run, %s}"


@pytest.mark.parametrize(
    ("text", "schedule"),
    [
        ("schedule: wma", "wma"),
        ("last: 3", "sma"),
        ("schedule: {kind: ema, decay: 0.9}", "ema:0.9"),
        ("schedule: ema:0.9", "ema:0.9"),
        ("schedule: {kind: ema, decay: 1.0e-05}", "ema:1e-05"),
        ("schedule: {kind: wsm, decay: sqrt}", "wsm:sqrt"),
    ],
)
def test_a_config_names_a_schedule(text: str, schedule: str) -> None:
    asked = parse_config(AVERAGE % text).checkpoints
    assert asked is not None
    assert str(asked.schedule) == schedule
    assert asked.places == ("run",)


HOSTILE = [
    (AVERAGE % "schedule: smaa", "did you mean 'sma'?"),
    (AVERAGE % "schedule: [sma]", "must be one of sma, wma, ema, wsm"),
    (AVERAGE % "schedule: {decay: 0.9}", "'kind' is missing"),
    (AVERAGE % "schedule: {kind: ema, dekay: 0.9}", "did you mean 'decay'?"),
    (AVERAGE % "schedule: sma:0.5", "'sma' has none"),
    (AVERAGE % "schedule: ema", "decay: is missing: of 'ema'"),
    (AVERAGE % "schedule: ema:1.5", "is not '1.5'"),
    (AVERAGE % "schedule: {kind: ema, decay: true}", "is not true"),
    (AVERAGE % "schedule: ema:1e-999999999", "is not '1e-999999999'"),
    (AVERAGE % "schedule: ema:.0", "is not '.0'"),
    (AVERAGE % "schedule: wsm:exp", "linear, sqrt, cosine"),
    (AVERAGE % "last: 0", "whole number of at least 1"),
    (AVERAGE % "last: true", "whole number of at least 1"),
    (AVERAGE % "lasts: 3", "did you mean 'last'?"),
    ("merge_method: linear\ncheckpoints: {last: 3}", "directory: is missing"),
    ("merge_method: linear\ncheckpoints: run", "must be a map (directory: …)"),
    ("merge_method: linear\ncheckpoints: {directory: []}", "an empty list"),
    ("merge_method: ties\ncheckpoints: {directory: run}", "merge_method: linear"),
    (AVERAGE % "last: 3" + "\nmodels: [a, b]", "'models' and 'checkpoints' cannot both be set"),
    (AVERAGE % "last: 3" + "\nbase_model: a", "base_model: an average of `checkpoints` has none"),
    (AVERAGE % "last: 3" + "\nparameters: {weight: 2}", "the schedule gives the weights"),
]


@pytest.mark.parametrize(("text", "words"), HOSTILE)
def test_what_no_schedule_is_is_refused_with_the_cure(text: str, words: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse_config(text)
    assert words in str(refused.value)
