"""People see a quantised model by its logical names and shapes, and how it is stored."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from streammerge import inspect_model, merge
from tests.checkpoint.quantized.formats import write
from tests.cli.running import Cli, cli

__all__ = ["cli"]

WEIGHT = "model.layers.0.mlp.down_proj.weight"
PACKED, TITLE = "pack-quantized 4 bits", "compressed-tensors pack-quantized, INT4"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for i, name in enumerate((PACKED, "gptq 4 bits")):
        write(tmp_path / "ab"[i], name, i, 64, 96)
    return tmp_path


def test_inspect_shows_logical_tensors_and_how_they_are_stored(here: Path, cli: Cli) -> None:
    index = inspect_model("a")
    assert (index[WEIGHT].shape, index.stored_formats) == ((64, 96), {TITLE: 2})
    shown = json.loads(cli("inspect", "a", "--json").out)["tensors"]
    (entry,) = (tensor for tensor in shown if tensor["name"] == WEIGHT)
    assert (entry["dtype"], entry["shape"], entry["stored_as"]) == ("I32", [64, 96], TITLE)
    assert entry["nbytes"] == 64 * 96 // 2 + 64 * 3 * 2
    assert "[64, 96]" in (text := cli("inspect", "a").out)
    assert f": {TITLE}" in text


def test_a_plan_and_the_card_name_the_format_of_each_input(here: Path, cli: Cli) -> None:
    config = {"merge_method": "linear", "models": [{"model": n, "parameters": {"weight": 0.5}} for n in "ab"]}
    Path("config.json").write_text(json.dumps(config))
    text = cli("plan", "config.json").out
    assert f"quantised a: 2 tensors as {TITLE}\n          b: 2 tensors as GPTQ INT4" in text
    planned = json.loads(cli("plan", "config.json", "--json").out)
    assert planned["quantised"] == {"a": {TITLE: 2}, "b": {"GPTQ INT4": 2}}
    merge(config, "out")
    card = Path("out/README.md").read_text()
    assert f"- `a`, stored as {TITLE}\n- `b`, stored as GPTQ INT4\n" in card
