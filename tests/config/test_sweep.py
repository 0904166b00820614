"""The key `sweep`: the points of a grid, their configs and names, and what is refused."""

from __future__ import annotations

import re

import pytest

from streammerge.api.deciding import settle
from streammerge.config.points import directory_name, points_of
from streammerge.config.reading import config_from_mapping, parse_config
from streammerge.config.strict_yaml import load_documents, load_yaml
from streammerge.errors import ConfigError

TIES = """
merge_method: ties
base_model: b
models:
  - {model: m1, parameters: {weight: 0.5, density: 0.9}}
  - {model: m2, parameters: {density: 0.9}}
parameters: {lambda: 1.0, normalize: true}
"""


def test_the_grid_is_the_product_with_the_configs_own_spelling() -> None:
    points = points_of(parse_config(f"{TIES}sweep:\n  lambda: [0.30, 1e-1]\n  density: [.1, 0.2]\n"))
    assert [point.name for point in points] == [
        "lambda=0.30,density=.1",
        "lambda=0.30,density=0.2",
        "lambda=1e-1,density=.1",
        "lambda=1e-1,density=0.2",
    ]
    assert points[2].spelled == (("lambda", "1e-1"), ("density", ".1"))


def test_a_swept_value_stands_at_the_top_and_nowhere_else() -> None:
    point = points_of(parse_config(f"{TIES}sweep: {{density: [0.2]}}\n"))[0]
    assert load_yaml(point.config.text, "") == {
        "merge_method": "ties",
        "base_model": "b",
        "models": [{"model": "m1", "parameters": {"weight": 0.5}}, {"model": "m2"}],
        "parameters": {"lambda": 1.0, "normalize": True, "density": 0.2},
    }
    assert not point.config.sweep
    assert parse_config(point.config.text).models[1].parameters == {}
    assert point.config.parameters["density"].path == "config.yml: sweep.density"


def test_values_below_slices_and_modules_are_removed_too() -> None:
    source = {"model": "m", "layer_range": [0, 1], "parameters": {"weight": 1, "density": 0.4}}
    part = {"sources": [source], "parameters": {"weight": 2}}
    config = {
        "merge_method": "ties",
        "base_model": "b",
        "modules": {"text": {"slices": [part], "parameters": {"weight": 3}}},
        "sweep": {"weight": [0.5, 4]},
    }
    for point, value in zip(points_of(config_from_mapping(config)), (0.5, 4), strict=True):
        data = load_yaml(point.config.text, "")
        assert data["parameters"] == {"weight": value}  # type: ignore[call-overload, index]
        assert str(data).count("weight") == 1
        assert str(data).count("density") == 1


def test_only_the_output_of_several_documents_is_swept() -> None:
    first = "name: a\nmerge_method: linear\nmodels: [m1, m2]\n"
    last = "merge_method: linear\nmodels: [a, m3]\n"
    points = points_of(parse_config(f"{first}---\n{last}sweep: {{weight: [1, 2]}}\n"))
    assert [point.name for point in points] == ["weight=1", "weight=2"]
    stages, output = load_documents(points[1].config.text, "")
    assert stages == load_yaml(first, "")
    assert output == {"merge_method": "linear", "models": ["a", "m3"], "parameters": {"weight": 2}}
    assert [stage.name for stage in points[1].config.stages] == ["a"]
    with pytest.raises(ConfigError, match="only the output can be swept: move it to that document"):
        parse_config(f"{first}sweep: {{weight: [1, 2]}}\n---\n{last}")


@pytest.mark.parametrize(
    ("sweep", "words"),
    [
        (
            "[1]",
            "sweep: a sweep is a map of parameters, each with a list of values (lambda: [0.3, 0.5]), not a list",
        ),
        ("{}", "not an empty map"),
        ("{lambda: 0.3}", "sweep.lambda: must be a list of values, not 0.3 (write [0.3])"),
        ("{lambda: []}", "sweep.lambda: an empty list (give at least one value)"),
        ("{lambda: [0.3, [1]]}", "sweep.lambda[1]: a list is not a single value"),
        ("{lambda: [0.3, null]}", "sweep.lambda[1]: null is not a single value"),
        ("{lambda: [{value: 1}]}", "(gradients and filters cannot be swept)"),
        ("{lambda: [.nan]}", "sweep.lambda[0]: nan is not a finite number"),
        ("{lambda: [0.3, 1, 0.30]}", "sweep.lambda[2]: 0.3 is given already, as config.yml: sweep.lambda[0]"),
        ('{lambda: [0.3, "0.3"]}', "sweep.lambda[1]: '0.3' is given already, as config.yml: sweep.lambda[0]"),
        ('{lambda: [true, "true"]}', "two points are called 'lambda=true'"),
        (f"{{lambda: {list(range(40))}, density: {list(range(40))}}}", "1600 points, at most 1024"),
    ],
)
def test_bad_sweeps_are_refused_in_one_line(sweep: str, words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)) as caught:
        points_of(parse_config(f"{TIES}sweep: {sweep}\n"))
    assert "\n" not in str(caught.value)


def test_one_merge_refuses_a_sweep_and_names_the_command() -> None:
    config = parse_config(f"{TIES}sweep: {{lambda: [0.3]}}\n")
    with pytest.raises(
        ConfigError, match=r"sweep: a sweep is several merges: run `streammerge sweep CONFIG OUT`"
    ):
        settle(config)


@pytest.mark.parametrize(
    ("value", "name"),
    [
        ("../x", "k=..%2Fx"),
        ("a,b=c", "k=a%2Cb%3Dc"),
        ("a b\n", "k=a%20b%0A"),
        ("ü%", "k=%C3%BC%25"),
        ("x.safetensors", "k=x%2Esafetensors"),
    ],
)
def test_values_that_a_path_cannot_hold_are_escaped(value: str, name: str) -> None:
    assert directory_name((("k", value),)) == name


def test_long_names_are_cut_and_stay_distinct() -> None:
    names = {directory_name((("k", "x" * 300 + end),)) for end in "ab"}
    assert len(names) == 2
    assert all(len(name) == 200 for name in names)
