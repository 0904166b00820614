"""A command that is refused for too little `--memory` is accepted with the number that its message asks for."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import streammerge
from streammerge import compare
from streammerge.api import plan, sweep
from streammerge.errors import BudgetError
from streammerge.planning.memory.budget import MIB
from streammerge.testing.models import config_for, write_models
from streammerge.units import parse_size
from tests.checkpoint.tokenizers.test_files import words, write

Run = Callable[[str | int], object]

STAGES = """
name: first
merge_method: ties
base_model: {0}
models: [{{model: {1}}}, {{model: {2}}}]
parameters: {{density: 0.3}}
---
name: second
merge_method: della
base_model: first
models: [{{model: {2}}}]
parameters: {{density: 0.5}}
---
merge_method: slerp
base_model: first
models: [{{model: second}}]
parameters: {{t: 0.3}}
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    shapes = {f"model.layers.{i}.w.weight": (8, 8) for i in range(3)}
    return write_models(tmp_path_factory.mktemp("models"), dtype=torch.bfloat16, shapes=shapes)


@pytest.fixture(scope="module")
def with_tokens(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("tokens")
    return [write(folder / texts, words(texts), seed=i).path for i, texts in enumerate(("abcd", "efgh"))]


def refused_then_accepted(run: Run) -> str:
    """Run with hardly any memory, then with what the message asks for; return the message."""
    with pytest.raises(BudgetError) as refused:
        run(MIB)
    asked = re.search(r"give at least (?:--memory )?(\d+ MiB)", str(refused.value))
    assert asked is not None, refused.value
    assert refused.value.least is not None
    run(asked[1])
    with pytest.raises(BudgetError):
        run(parse_size(asked[1]) - 3 * MIB)
    return str(refused.value)


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize(
    ("top", "parameters"),
    [
        ({}, {"density": 0.3}),
        ({"lines": {"alpha": 0.5, "beta": 1.0}}, {"density": 0.3, "trim_scope": "model"}),
        ({"output": "lora", "rank": 4}, {"density": 0.3}),
    ],
)
def test_of_a_merge(
    kernels: bool, top: dict[str, Any], parameters: dict[str, Any], models: list[Path]
) -> None:
    config = config_for("ties", models, parameters=parameters, **top)
    refused_then_accepted(lambda memory: plan(config, memory=memory, device="cpu", kernels=kernels))


@pytest.mark.parametrize("kernels", [True, False])
def test_of_stages(kernels: bool, models: list[Path]) -> None:
    config = STAGES.format(*models)
    said = refused_then_accepted(lambda memory: plan(config, memory=memory, device="cpu", kernels=kernels))
    assert "(what comes after it needs more)" in said  # the first stage alone would be content with less


def test_of_new_tokens(with_tokens: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_for("linear", with_tokens[:1] + with_tokens, tokenizer_source="union")
    refused_then_accepted(lambda memory: plan(config, memory=memory, device="cpu"))
    monkeypatch.setattr("streammerge.planning.make.NEW_TOKEN_NBYTES", 1 << 28)
    refused_then_accepted(lambda memory: plan(config, memory=memory, device="cpu"))


def test_of_a_sweep_whose_later_points_need_more(models: list[Path], tmp_path: Path) -> None:
    grid = {"trim_scope": ["tensor", "model"], "density": [1, 0.3], "weight": [0.5]}
    config = config_for("ties", models, parameters={}, sweep=grid)
    refused_then_accepted(
        lambda memory: sweep(
            config, tmp_path / "out", memory=memory, device="cpu", on_event=lambda e: None, overwrite=True
        )
    )


def test_of_pages(models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("vl_convert")
    for drawing in ("reporting.write_report", "comparing.comparison_page", "comparing.write_page"):
        monkeypatch.setattr(f"streammerge.api.{drawing}", lambda *values: "")
    config = config_for("ties", models, parameters={"density": 0.3})
    merge = partial(
        streammerge.merge, config, tmp_path / "out", device="cpu", on_event=lambda e: None, overwrite=True
    )
    refused_then_accepted(lambda memory: merge(memory=memory, report=tmp_path / "page.html"))
    told: list[str] = []

    def compared(memory: str | int) -> None:
        compare(
            models[1:],
            models[0],
            memory=memory,
            device="cpu",
            html=tmp_path / "page.html",
            on_event=told.append,
        )

    refused_then_accepted(compared)
