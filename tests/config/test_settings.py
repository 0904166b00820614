"""Settings: scalars, gradients and filters, and the depth at which a tensor lies."""

from __future__ import annotations

import math
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streammerge.checkpoint.names import count_layers, layer_fraction
from streammerge.config import Clause, Setting, parse_setting, value_for
from streammerge.errors import ConfigError

PATH = "config.yml: models[1].parameters.weight"

STRUCTURES = [
    (0.5, (Clause(None, (0.5,)),)),
    (True, (Clause(None, (True,)),)),
    ("paper", (Clause(None, ("paper",)),)),
    ([0, 0.5, 1], (Clause(None, (0, 0.5, 1)),)),
    ([True, False], (Clause(None, (True, False)),)),
    ({"value": 1}, (Clause(None, (1,)),)),  # a bare clause
    ({"filter": "mlp", "value": [0, 1]}, (Clause("mlp", (0, 1)),)),
    ([{"filter": "*", "value": 1}, {"value": 2}], (Clause("*", (1,)), Clause(None, (2,)))),
    ([{"filter": None, "value": "a"}], (Clause(None, ("a",)),)),
    (10**300, (Clause(None, (10**300,)),)),
]


@pytest.mark.parametrize(("value", "clauses"), STRUCTURES, ids=repr)
def test_each_form_of_a_setting_is_read(value: object, clauses: tuple[Clause, ...]) -> None:
    setting = parse_setting(value, PATH)
    assert setting == Setting(PATH, clauses)
    assert pickle.loads(pickle.dumps(setting)) == setting
    assert hash(setting) == hash(parse_setting(value, PATH))


REFUSED = [
    (None, ": null is not a value"),
    (math.nan, ": nan is not a finite number"),
    (math.inf, ": inf is not a finite number"),
    (-math.inf, ": -inf is not a finite number"),
    (10**400, ": an integer of many digits is not a finite number"),
    ([], ": an empty list"),
    ([[]], "[0]: an empty list is not a value"),
    ([1, [2]], "[1]: a list is not a value"),
    ([1, None], "[1]: null is not a value"),
    ([0.5, math.nan], "[1]: nan is not a finite number"),
    ([1, "x"], ": a gradient is all numbers, all bools or all strings"),
    ([1, True], ": a gradient is all numbers"),
    (["a", True], ": a gradient is all numbers"),
    ({}, ": no 'value'"),
    ({"a": 1}, ": unknown key 'a' (known: filter, value)"),
    ({"filter": "mlp", "valeu": 1}, ": unknown key 'valeu' (did you mean 'value'?)"),
    ({"filter": "mlp"}, ": no 'value'"),
    ({"filter": 3, "value": 1}, ".filter: must be a string, not 3 (quote it)"),
    ({"filter": ["a"], "value": 1}, ".filter: must be a string, not a list"),
    ({"value": None}, ".value: null is not a value"),
    ({"value": []}, ".value: an empty list"),
    ({"value": {"value": 1}}, ".value: a map is not a value"),
    ([{"value": 1}, 2], "[1]: 2 among {filter, value} clauses"),
    ([2, {"value": 1}], "[0]: 2 among {filter, value} clauses"),
    ([{"value": 1}, {"filter": "a", "value": [1, "b"]}], "[1].value: a gradient is all numbers"),
    ([{"value": [{"value": 1}]}], "[0].value[0]: a map is not a value"),
]


@pytest.mark.parametrize(("value", "words"), REFUSED, ids=repr)
def test_other_forms_are_refused_where_they_stand(value: object, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_setting(value, PATH)
    assert str(caught.value).startswith(PATH + words)


VALUES = [
    (0.5, "any", 0.3, 0.5),
    ([0, 1], "any", 0.0, 0),
    ([0, 1], "any", 1.0, 1),
    ([0, 1], "any", 0.25, 0.25),
    ([0, 0.5, 2], "any", 0.5, 0.5),
    ([0, 0.5, 2], "any", 0.75, 1.25),
    ([3], "any", 0.7, 3),
    ([True, False], "any", 0.99, True),  # bools and strings step
    ([True, False], "any", 1.0, False),
    (["a", "b", "c"], "any", 0.5, "b"),
    (["a", "b", "c"], "any", 0.49, "a"),
    ([{"filter": "mlp", "value": 1}, {"filter": "self", "value": 2}], "h.0.self_attn", 0, 2),
    ([{"filter": "mlp", "value": 1}, {"filter": "up", "value": 2}], "h.0.mlp.up", 0, 1),  # first wins
    ([{"filter": "mlp", "value": 1}], "h.0.self_attn", 0, None),
    ([{"filter": "h.*", "value": 1}], "h.0.self_attn", 0, None),  # text, not a pattern
    ([{"filter": "*", "value": 1}], "h.0.self_attn", 0, 1),
    ([{"filter": "mlp", "value": [0, 2]}, {"value": 9}], "h.1.mlp", 0.5, 1.0),
    ([{"filter": "mlp", "value": [0, 2]}, {"value": 9}], "lm_head", 0.0, 9),
]


@pytest.mark.parametrize(("value", "tensor", "t", "expected"), VALUES, ids=repr)
def test_the_value_for_a_tensor_follows_filters_and_depth(
    value: object, tensor: str, t: float, expected: object
) -> None:
    found = value_for(parse_setting(value, PATH), tensor, t)
    assert found == expected
    assert isinstance(found, bool) == isinstance(expected, bool)


def _reference(points: list[float], t: float) -> float:
    """Walk the segments of the polyline."""
    n = len(points) - 1
    for i in range(n):
        if i / n <= t <= (i + 1) / n:
            return points[i] + (points[i + 1] - points[i]) * (t * n - i)
    return points[-1]


_POINTS = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=9)


@given(_POINTS, st.floats(0, 1))
def test_a_gradient_is_the_polyline_through_its_points(points: list[float], t: float) -> None:
    value = value_for(parse_setting(points, PATH), "x", t)
    assert isinstance(value, float)
    assert math.isclose(value, _reference(points, t), rel_tol=1e-9, abs_tol=1e-6)
    slack = 1e-15 * max(map(abs, points))
    assert min(points) - slack <= value <= max(points) + slack


@given(_POINTS)
def test_a_gradient_meets_its_ends_exactly(points: list[float]) -> None:
    setting = parse_setting(points, PATH)
    assert value_for(setting, "x", 0.0) == points[0]
    assert value_for(setting, "x", 1.0) == points[-1]


@given(
    st.lists(st.tuples(st.none() | st.sampled_from(["*", "a", "b", "ab", ""]), st.integers()), min_size=1),
    st.text("ab."),
)
def test_the_first_matching_clause_decides(clauses: list[tuple[str | None, int]], name: str) -> None:
    setting = parse_setting([{"filter": text, "value": value} for text, value in clauses], PATH)
    matching = [value for text, value in clauses if text in (None, "*") or str(text) in name]
    assert value_for(setting, name, 0.0) == (matching[0] if matching else None)


def _llama(n_layers: int, parts: tuple[str, ...] = ("self_attn.q_proj", "mlp.up_proj")) -> list[str]:
    layers = [f"model.layers.{i}.{part}.weight" for i in range(n_layers) for part in parts]
    return ["model.embed_tokens.weight", *layers, "model.norm.weight", "lm_head.weight"]


FRACTIONS = [
    (_llama(5), "model.layers.0.mlp.up_proj.weight", 0.0),
    (_llama(5), "model.layers.1.mlp.up_proj.weight", 0.25),
    (_llama(5), "model.layers.4.mlp.up_proj.weight", 1.0),
    # Tensors outside the layers, the last ones too, are at 0 as in mergekit.
    (_llama(5), "model.embed_tokens.weight", 0.0),
    (_llama(5), "model.norm.weight", 0.0),
    (_llama(5), "lm_head.weight", 0.0),
    # An only layer is at 1.
    (_llama(1), "model.layers.0.mlp.up_proj.weight", 1.0),
    # Experts do not count, whatever their number, nor in a model of one layer.
    (_llama(3, ("mlp.experts.0.w1", "mlp.experts.7.w1")), "model.layers.1.mlp.experts.7.w1.weight", 0.5),
    (_llama(1, ("mlp.experts.0.w1", "mlp.experts.7.w1")), "model.layers.0.mlp.experts.0.w1.weight", 1.0),
    # Two stacks are counted apart.
    ([f"{s}.block.{i}.k" for s in "ed" for i in range(3 if s == "e" else 5)], "e.block.1.k", 0.5),
    ([f"{s}.block.{i}.k" for s in "ed" for i in range(3 if s == "e" else 5)], "d.block.1.k", 0.25),
    # Gaps, and stacks that do not begin at 0, keep the places that the numbers say.
    (["features.0.weight", "features.3.weight", "features.4.weight"], "features.3.weight", 0.75),
    ([f"layers.{i}.w" for i in range(16, 33)], "layers.16.w", 0.5),
    # A bare Sequential; and a module wrapped under a lone leading 0.
    (["0.weight", "2.weight", "4.weight"], "2.weight", 0.5),
    ([f"0.auto_model.encoder.layer.{i}.w" for i in range(3)], "0.auto_model.encoder.layer.1.w", 0.5),
    (["0.auto_model.embeddings.w", "0.auto_model.layer.0.w"], "0.auto_model.embeddings.w", 0.0),
    # Components that only look like numbers.
    (["h.x1.w", "h.²." + "w", "h.-1.w"], "h.²." + "w", 0.0),
    (["h." + "9" * 5000 + ".w"], "h." + "9" * 5000 + ".w", 0.0),
]


@pytest.mark.parametrize(("names", "tensor", "fraction"), FRACTIONS, ids=range(len(FRACTIONS)))
def test_depth_is_read_from_names_alone(names: list[str], tensor: str, fraction: float) -> None:
    assert layer_fraction(tensor, count_layers(names)) == fraction


@given(st.lists(st.text("a.01", max_size=12)), st.text("a.01", max_size=12))
def test_depth_lies_between_0_and_1_for_any_names(names: list[str], other: str) -> None:
    counts = count_layers(names)
    assert counts == count_layers(reversed(names))
    assert all(0 <= layer_fraction(name, counts) <= 1 for name in [*names, other])
