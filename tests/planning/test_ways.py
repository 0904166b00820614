"""Where each method is computed with a GPU: the law of every registered method, and the table of the page on GPUs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from streammerge.methods.registry import all_methods, get_method
from streammerge.planning.backend import NO_RULE, NO_STATISTICS, Way, way_of
from tests.laws.test_methods import BUILTIN, VARIANTS

PAGE = Path(__file__).parents[2] / "docs" / "use" / "gpu.md"
ROWS = {
    "kernels": "kernels on the GPU",
    "torch": "torch on the GPU, in steps",
    NO_RULE: "CPUs, since no kernel there applies their rule",
}


def way(name: str, parameters: dict[str, Any]) -> Way:
    method = get_method(name)
    n = min(2, method.n_models[1] or 2)
    own = {
        key: (value,) * n if method.parameters[key].per_model and not isinstance(value, tuple) else value
        for key, value in parameters.items()
        if key in method.parameters
    }
    return way_of(method, n, own)


def row_of(found: Way) -> str:
    """Return the row of the table that a method belongs in."""
    if found.place != "CPUs":
        return ROWS[found.place]
    return ROWS[found.why]


def rows() -> dict[str, str]:
    """Return the cells of the page's table by the text of their row."""
    table = PAGE.read_text().partition("## Where each method is computed")[2].partition("## How")[0]
    return dict(re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", table, re.M))


def test_every_method_stands_in_the_row_of_where_it_is_computed() -> None:
    said = {
        name: text
        for text, cell in rows().items()
        if text in ROWS.values()
        for name in re.findall(r"`(\w+)`(?! with)", cell)
        if name in all_methods()
    }
    assert said == {name: row_of(way(name, {})) for name in BUILTIN}


@pytest.mark.parametrize(("name", "parameters"), VARIANTS)
def test_a_parameter_that_changes_where_is_named_on_the_page(name: str, parameters: dict[str, Any]) -> None:
    found = way(name, parameters)
    assert found.place != "CPUs" or found.why
    if (text := row_of(found)) != row_of(way(name, {})):
        options = re.findall(rf"`{name}` with `(\w+): (\w+)`", rows()[text])
        assert any(str(parameters.get(key)).lower() == value for key, value in options), (name, parameters)


def test_a_rule_with_a_kernel_and_statistics_without_one_is_told_apart() -> None:
    from dataclasses import replace

    from streammerge.backends.gpu.backend import FUSED

    bare = replace(FUSED, fuses=lambda rule, calls: not calls)
    assert way_of(get_method("ties"), 2, {"density": (0.5, 0.5)}, bare) == Way("CPUs", NO_STATISTICS)
    assert way_of(get_method("linear"), 2, None, bare) == Way("kernels")
