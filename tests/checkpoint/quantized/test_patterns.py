"""Expressions for names of layers match as Python's own do, and hostile ones are told at once."""

from __future__ import annotations

import re

import pytest

from streammerge.checkpoint.quantized.patterns import matches
from tests.formats.safetensors_files import within

NAMES = (
    "model.layers.0.self_attn.q_proj",
    "model.layers.11.mlp.experts.3.gate_proj",
    "model.layers.11.mlp.experts.3.gate_proj.x",
    "language_model.model.layers.1.mlp.down_proj",
    "lm_head",
    "",
)
EXPRESSIONS = (
    r".*self_attn\.(q|k|v|o)_proj$",
    r".*mlp\.experts\..*\.(gate|up|down)_proj$",
    r"model\.layers\.\d\d\..*",
    r"^model\.layers\.[0-3]\.self_attn.+q_proj",
    r".*layers.*layers.*",
    r"lm_head",
    r".*(?:gate|down)_proj",
    r".+",
    r"",
    r"lm_head|.x",
    r"^language_model\.",
)


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_an_expression_matches_what_python_matches(expression: str) -> None:
    for name in NAMES:
        assert matches(expression, name) == (re.match(expression, name) is not None), name


@pytest.mark.parametrize(
    "expression",
    ["(a+)+$", "(a|a)" * 60, "a?" * 40 + "a" * 40, "(.*a){20}", "(", "[", "(?!x).*", "\\1", "x.*a|b"],
)
def test_others_are_refused_at_once(expression: str) -> None:
    with within(1.0), pytest.raises(ValueError, match="free"):
        matches(expression, "a" * 400 + "!")
