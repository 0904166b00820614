"""Filters and `exclude` that are in no tensor's name are told, with what they may mean."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from streammerge.api import plan
from tests.conftest import config_for

SHAPES = {
    "lm_head.weight": (4, 4),
    "model.layers.0.self_attn.q_proj.weight": (4, 4),
    "model.layers.0.mlp.up.weight": (4, 4),
}


@pytest.fixture
def warnings_of(make_models: Callable[..., list[Path]]) -> Callable[..., str]:
    paths = make_models(shapes=SHAPES)

    def told(method: str = "ties", **top: Any) -> str:
        return "\n".join(plan(config_for(method, paths, **top)).warnings)

    return told


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("lm_haed", "exclude[0]: 'lm_haed' matches no tensor (did you mean 'lm_head.weight'?)"),
        ("^lm_haed\\.weight$", "(did you mean 'lm_head.weight'?)"),
        ("self_atn", "matches no tensor (did you mean 'model.layers.0.self_attn.q_proj.weight'?)"),
        ("vision_tower", "exclude[0]: 'vision_tower' matches no tensor"),
    ],
)
def test_an_exclude_that_matches_nothing_is_told(
    pattern: str, words: str, warnings_of: Callable[..., str]
) -> None:
    assert words in warnings_of(exclude=[pattern])


def test_a_filter_in_no_name_is_told_once_with_the_part_it_may_mean(warnings_of: Callable[..., str]) -> None:
    clauses = [{"filter": "self_atn", "value": 0.5}, {"filter": "experts", "value": 0.1}, {"value": 0.3}]
    told = warnings_of(parameters={"density": clauses, "weight": clauses})
    assert told.count("filter 'self_atn' is in no tensor's name (did you mean 'self_attn'?)") == 1
    assert "filter 'experts' is in no tensor's name" in told


def test_what_matches_is_not_told_of(warnings_of: Callable[..., str]) -> None:
    clauses = [{"filter": "self_attn", "value": 0.5}, {"filter": "*", "value": 0.3}]
    assert "no tensor" not in warnings_of(parameters={"density": clauses}, exclude=["head", "up\\.weight$"])


def test_a_density_of_nought_is_told(warnings_of: Callable[..., str]) -> None:
    assert "parameters.density: the models contribute nothing" in warnings_of(parameters={"density": 0})
    assert "contribute nothing" not in warnings_of(parameters={"density": [0, 1]})
