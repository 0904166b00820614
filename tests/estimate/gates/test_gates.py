"""Gates from prompts equal those of a plain forward of transformers."""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

import streammerge
from streammerge.testing.models import output_bytes
from tests.planning.moe.dense import LAYERS, write_dense, write_header

PROMPTS = [
    (["w3 w4 w5", "w6 w7 w8 w9"], []),
    (["w10"], ["w3 w4 w5", "w20 w21"]),
    (["w30 w31 w32 w33 w34 w35", "w40", "w41 w42"], ["w10"]),
]
"""Positive and negative prompts of each expert; some occur twice."""
SHARED = (["w50 w51"], [])


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("models")
    return [write_dense(folder / str(i), "llama", i) for i in range(2)]


def config_of(models: Sequence[Path], mode: str, prompts: Sequence[Any] = PROMPTS) -> dict[str, Any]:
    def expert(pair: Any) -> dict[str, Any]:
        return {
            "source_model": models[1],
            "positive_prompts": pair[0],
            "negative_prompts": pair[1],
            "noise_scale": 0.1,
        }

    return {
        "base_model": models[0],
        "gate_mode": mode,
        "architecture": "qwen2",
        "experts": [expert(pair) for pair in prompts],
        "shared_experts": [expert(SHARED)],
    }


def expected_gates(folder: Path, mode: str) -> Tensor:
    """Return [layers, experts, hidden] from a plain forward; the shared expert is the last."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)

    def feature(prompt: str) -> Tensor:
        ids = torch.tensor([[1, *(int(word[1:]) for word in prompt.split())]])
        with torch.no_grad():
            states = torch.stack(model(ids, output_hidden_states=True).hidden_states[:-1])[:, 0]
        if mode == "cheap_embed":
            return states[:1].sum(dim=1).expand(LAYERS, -1)
        return states.mean(dim=1) if mode == "hidden_avg" else states[:, -1]

    gates = []
    for positive, negative in (*PROMPTS, SHARED):
        gate = torch.stack([feature(p) for p in positive]).mean(0)
        if negative:
            gate = gate - torch.stack([feature(p) for p in negative]).mean(0)
        gates.append(gate / gate.norm(dim=-1, keepdim=True))
    return torch.stack(gates, dim=1)


@pytest.mark.parametrize("mode", ["hidden", "hidden_avg", "hidden_last", "cheap_embed"])
def test_gates_are_those_of_a_plain_forward(models: list[Path], tmp_path: Path, mode: str) -> None:
    streammerge.merge(config_of(models, mode), tmp_path / "out", progress=False)
    out = load_file(tmp_path / "out" / "model.safetensors")
    found = torch.stack(
        [
            torch.cat([out[f"model.layers.{i}.mlp.{name}.weight"] for name in ("gate", "shared_expert_gate")])
            for i in range(LAYERS)
        ]
    )
    torch.testing.assert_close(found.double(), expected_gates(models[0], mode), rtol=1e-4, atol=1e-5)


def test_gates_depend_neither_on_threads_nor_on_memory_and_can_be_recomputed(
    models: list[Path], tmp_path: Path
) -> None:
    config = config_of(models, "hidden")
    events: list[streammerge.Event] = []
    streammerge.merge(config, tmp_path / "one", threads=1, memory="700MiB", on_event=events.append)
    streammerge.merge(config, tmp_path / "four", threads=4, memory="4GiB", progress=False)
    stop = threading.Event()
    with pytest.raises(streammerge.Stopped):
        streammerge.merge(
            config, tmp_path / "two", stop=stop, on_event=lambda e: e.kind == "gates" and stop.set()
        )
    streammerge.merge(config, tmp_path / "two", threads=2, progress=False)
    assert output_bytes(tmp_path / "one") == output_bytes(tmp_path / "four") == output_bytes(tmp_path / "two")
    assert [event.values["layer"] for event in events if event.kind == "gates"] == list(range(LAYERS))
    assert not streammerge.verify(tmp_path / "one", against=config, sample=None, progress=False).problems
    events.clear()
    assert streammerge.merge(config, tmp_path / "one", on_event=events.append).already_complete
    assert not any(event.kind == "gates" for event in events)  # nothing is run for a finished output


def test_experts_with_gates_that_cannot_be_told_apart_are_named(models: list[Path], tmp_path: Path) -> None:
    config = config_of(models, "cheap_embed", [(["w3 w4"], []), (["w4 w3"], []), (["w5"], ["w5"])])
    with pytest.warns(streammerge.StreammergeWarning, match="layer 0: the gate of expert 2 is zero"):
        streammerge.merge(config, tmp_path / "zero", progress=False)
    with pytest.warns(streammerge.StreammergeWarning, match="the gates of experts 0 and 1 are the same"):
        streammerge.merge(
            config_of(models, "cheap_embed", [(["w3 w4"], []), (["w4 w3"], [])]),
            tmp_path / "same",
            progress=False,
        )


@pytest.mark.parametrize(
    ("mode", "prompt", "words"),
    [
        (
            "hidden",
            " ".join(["w3"] * 80),
            r"experts\[0\].positive_prompts\[0\]: has 81 tokens, .* at most 64: shorten it",
        ),
        ("cheap_embed", "w5", "has no tokenizer.*use gate_mode 'random'"),
    ],
)
def test_what_the_base_model_cannot_read_is_refused_in_the_plan(
    models: list[Path], tmp_path: Path, mode: str, prompt: str, words: str
) -> None:
    base = models[0]
    if mode == "cheap_embed":
        base = write_dense(tmp_path / "bare", "llama", 5)
        for file in base.glob("token*"):
            file.unlink()
    config = config_of([base, models[1]], mode, [([prompt], []), (["w4"], [])])
    with pytest.raises(streammerge.InputError, match=words):
        streammerge.merge(config, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_too_little_memory_for_a_layer_is_refused_in_the_plan(tmp_path: Path) -> None:
    large = write_header(tmp_path / "large", hidden_size=2048, intermediate_size=8192)
    with pytest.raises(streammerge.BudgetError, match=r"gate_mode 'hidden' needs 7\d\d MiB") as refused:
        streammerge.plan(config_of([large, large], "hidden"), memory="640MiB")
    asked = re.search(r"give at least (7\d\d MiB)", str(refused.value))
    assert asked is not None
    assert streammerge.plan(config_of([large, large], "hidden"), memory=asked[1]).gates is not None


def test_without_transformers_prompts_are_refused_with_the_extra(
    models: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(streammerge.InputError, match=r"pip install 'streammerge\[hf\]'"):
        streammerge.plan(config_of(models, "hidden"))
