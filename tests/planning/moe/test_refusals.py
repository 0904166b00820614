"""What cannot become a mixture of experts is refused in one line, before a byte is written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.cli.running import Cli, assert_refused, cli, write_config
from tests.planning.moe.conftest import Dense
from tests.planning.moe.dense import write_dense

__all__ = ["cli"]

Change = Callable[[dict[str, Any]], object]


def _expert(config: dict[str, Any], **keys: Any) -> None:
    config["experts"][1] |= keys


CONFIGS: list[tuple[Change, str]] = [
    (lambda c: c.pop("base_model"), "'base_model' is missing"),
    (lambda c: c.update(experts=[]), "experts: must be a list of experts"),
    (
        lambda c: c.update(experts={}),
        "experts: must be a list of experts (- source_model: …), not an empty map",
    ),
    (lambda c: c.update(gate_mode="hiden"), "gate_mode: unknown value 'hiden' (did you mean 'hidden'"),
    (lambda c: c.update(gate_modes="hidden"), "unknown key 'gate_modes' (did you mean 'gate_mode'"),
    (lambda c: c.update(experts_per_token=3), "routed to 3 experts, but there are only 2"),
    (lambda c: c.update(experts_per_token=0), "experts_per_token: must be a whole number of 1 or more"),
    (lambda c: c.update(experts=c["experts"] * 600), "1200 experts, at most 1024"),
    (lambda c: c.update(architecture="mixtal"), "unknown architecture 'mixtal' (known: Mixtral"),
    (lambda c: c.update(architecture="qwen3"), "Qwen3-MoE is built from a base of type qwen3, not 'llama'"),
    (
        lambda c: c.update(architecture="qwen2"),
        "shared_experts: Qwen2-MoE takes exactly 1, the config has 0: list one",
    ),
    (
        lambda c: c.update(architecture="mixtral", shared_experts=c["experts"][:1]),
        "Mixtral takes none, the config has 1",
    ),
    (lambda c: c.update(shared_experts=c["experts"]), "takes none, the config has 2: remove them"),
    (lambda c: c.update(architecture="deepseek", expert_names="fused"), "DeepSeek has no fused form"),
    (
        lambda c: c.update(gate_mode="hidden"),
        "experts[0]: 'positive_prompts' is missing, which gate_mode 'hidden' needs",
    ),
    (lambda c: _expert(c, source_model=None), "experts[1]: 'source_model' is missing"),
    (lambda c: _expert(c, noise_scale=-1), "experts[1].noise_scale: must be 0 or more"),
    (lambda c: _expert(c, residual_scale="big"), "experts[1].residual_scale: must be a number"),
    (lambda c: _expert(c, positive_prompts="one"), "experts[1].positive_prompts: must be a list of prompts"),
    (lambda c: _expert(c, positive_prompts=[3]), "experts[1].positive_prompts[0]: must be a text, not 3"),
    (lambda c: _expert(c, weight=1), "experts[1]: unknown key 'weight'"),
    (lambda c: _expert(c, source_model="models/none"), "models/none: no such directory"),
]
"""A change of a config that works, and words of the refusal."""


def config_of(dense: Dense) -> dict[str, Any]:
    experts = [{"source_model": str(dense("llama", i))} for i in (1, 2)]
    return {"base_model": str(dense("llama", 0)), "gate_mode": "random", "experts": experts}


@pytest.mark.parametrize(("change", "words"), CONFIGS, ids=[words[:40] for _, words in CONFIGS])
def test_a_config_that_makes_no_mixture(
    cli: Cli, dense: Dense, tmp_path: Path, change: Change, words: str
) -> None:
    config = config_of(dense)
    change(config)
    out = tmp_path / "out"
    assert_refused(cli("moe", write_config(tmp_path / "moe.yml", config), out), words)
    assert not out.exists()


def test_two_experts_with_the_same_prompts(cli: Cli, dense: Dense, tmp_path: Path) -> None:
    config = config_of(dense) | {"gate_mode": "cheap_embed"}
    for expert in config["experts"]:
        expert["positive_prompts"] = ["w3"]
    done = cli("moe", write_config(tmp_path / "moe.yml", config), tmp_path / "out")
    assert_refused(done, "experts[1]: has the prompts of experts[0]")


def test_a_config_of_a_merge(cli: Cli, dense: Dense, tmp_path: Path) -> None:
    config = {"merge_method": "linear", "models": [str(dense("llama", 0))], "parameters": {"weight": 1}}
    done = cli("moe", write_config(tmp_path / "merge.yml", config), tmp_path / "out")
    assert_refused(done, "a config of a merge, not of a mixture of experts: use `streammerge merge`")


def _drop(tensors: dict[str, Any], settings: dict[str, Any]) -> None:
    del tensors["model.layers.1.mlp.up_proj.weight"]


def _bias(tensors: dict[str, Any], settings: dict[str, Any]) -> None:
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(32)


def _integers(tensors: dict[str, Any], settings: dict[str, Any]) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name].to(torch.int8)


def _other(tensors: dict[str, Any], settings: dict[str, Any]) -> None:
    settings["model_type"] = "gpt2"


def _endless(tensors: dict[str, Any], settings: dict[str, Any]) -> None:
    settings["num_hidden_layers"] = 10**9


def _gelu(tensors: dict[str, Any], settings: dict[str, Any]) -> None:
    settings["hidden_act"] = "gelu"


@pytest.mark.parametrize(
    ("change", "of_base", "words"),
    [
        (_drop, False, "experts[1]: … tensor model.layers.1.mlp.up_proj.weight is missing"),
        (_integers, False, "holds I8 codes without a scale"),
        (_gelu, False, "its activation is gelu, that of the base silu"),
        (_bias, True, "tensor model.layers.0.self_attn.q_proj.bias: Mixtral has no place for it"),
        (_endless, True, "config.json: num_hidden_layers is 1000000000, but the tensors have 2"),
        (_other, True, "model_type gpt2: a mixture of experts is built from a base of type llama, mistral"),
    ],
)
def test_a_model_that_does_not_fit(
    cli: Cli, dense: Dense, tmp_path: Path, change: Callable[..., None], of_base: bool, words: str
) -> None:
    folder = shutil.copytree(dense("llama", 2), tmp_path / "changed")
    tensors, settings = (
        load_file(folder / "model.safetensors"),
        json.loads((folder / "config.json").read_text()),
    )
    change(tensors, settings)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(settings))
    config = config_of(dense)
    if of_base:
        config["base_model"] = str(folder)
    else:
        config["experts"][1]["source_model"] = str(folder)
    done = cli("moe", write_config(tmp_path / "moe.yml", config), tmp_path / "out")
    assert_refused(done, *words.split(" … "))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"intermediate_size": 40}, "its MLPs have 40 intermediate features, those of"),
        (
            {"hidden_size": 16},
            "tensor model.layers.0.mlp.gate_proj.weight has shape [48, 16], but an expert of",
        ),
        ({"num_hidden_layers": 3}, "has more layers than the base"),
        ({"num_hidden_layers": 1}, "tensor model.layers.1.mlp.gate_proj.weight is missing"),
    ],
)
def test_experts_of_different_sizes(
    cli: Cli, dense: Dense, tmp_path: Path, settings: dict[str, int], words: str
) -> None:
    config = config_of(dense)
    config["experts"][1]["source_model"] = str(write_dense(tmp_path / "odd", "llama", 3, **settings))
    assert_refused(cli("moe", write_config(tmp_path / "moe.yml", config), tmp_path / "out"), words)


def test_a_dry_run_shows_the_plan_and_writes_nothing(cli: Cli, dense: Dense, tmp_path: Path) -> None:
    path = write_config(tmp_path / "moe.yml", {**config_of(dense), "tokenizer_source": "union"})
    done = cli(
        "moe", path, tmp_path / "out", "--dry-run", "--i-understand-this-is-not-useful-without-training"
    )
    assert done.code == 0, done.err
    assert "method    moe" in done.out
    assert "tokenizer_source: ignored: the tokenizer is that of the base" in done.out.replace(
        "\n          ", " "
    )
    assert "--i-understand-this-is-not-useful-without-training: ignored" in done.err
    assert not (tmp_path / "out").exists()
    assert cli("moe", path, tmp_path / "out", "--quiet").code == 0
    assert cli("verify", tmp_path / "out", "--against", path).code == 0
