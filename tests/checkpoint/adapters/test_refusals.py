"""Adapters that are malformed, hostile, or more than a sum of low rank: refused in one line that names the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from streammerge.checkpoint.index import open_model
from streammerge.errors import ModelError
from tests.checkpoint.adapters.scene import PREFIX, Q, factors, write_adapter, write_base

GOOD = factors(Q, 24, 40, 8)
A, B = f"{Q}.lora_A.weight", f"{Q}.lora_B.weight"
TOKENS = "model.embed_tokens.token_adapter"
ROWS = {f"{TOKENS}.trainable_tokens_delta": torch.ones(2, 24)}
X = "model.layers.0.mlp.experts"
EXPERTS = {f"{X}.lora_A.weight": torch.ones(8, 6), f"{X}.lora_B.weight": torch.ones(10, 8)}
"""An adapter of rank 2 for four experts of [10, 6]."""

TENSORS: dict[str, tuple[dict[str, torch.Tensor], dict[str, Any], str]] = {
    "no factor b": ({A: GOOD[A]}, {}, "has no lora_B"),
    "no factor a": ({B: GOOD[B]}, {}, "has no lora_A"),
    "another model": (factors("model.layers.9.q_proj", 24, 40, 8), {}, "which .* has not: another base model's adapter"),
    "inputs": (factors(Q, 25, 40, 8), {}, r"factors \[40, 8\] and \[8, 25\] do not fit the weight \[40, 24\]"),
    "outputs": (factors(Q, 24, 41, 8), {}, "do not fit"),
    "ranks differ": ({A: GOOD[A], B: GOOD[B][:, :7]}, {}, "do not fit"),
    **{f"begun as {how}": (GOOD, {"init_lora_weights": how}, "modifies the base weights before training .* path_initial_model") for how in (
        "pissa", "pissa_niter_4", "olora", "OLoRA", "loftq", "corda", "lora_ga",
    )},
    "alpha has 350 digits": (GOOD, {"lora_alpha": 10**350}, "is no number, or none of use"),
    "alpha overflows": (GOOD, {"lora_alpha": 1e39}, "is no number, or none of use"),
    "a pattern of choices": (GOOD, {"alpha_pattern": {"(.|.)" * 28 + "Z": 1}}, "too free an expression"),
    "a pattern that Python warns of": (GOOD, {"alpha_pattern": {"[[a]": 1}}, "is no regular expression"),
    "a pattern with a question mark": (GOOD, {"alpha_pattern": {"(a?)(a?)": 1}}, "too free an expression"),
    "a scalar": ({A: torch.tensor(1.0), B: GOOD[B]}, {}, "do not fit"),
    "three axes": ({A: GOOD[A][:, :, None], B: GOOD[B]}, {}, "do not fit"),
    "rank stated": (GOOD, {"r": 4}, "rank 4, but its factors have 8"),
    "rank by pattern": (GOOD, {"rank_pattern": {"q_proj": 2}}, "rank 2, but its factors have 8"),
    "integers": ({A: GOOD[A].int(), B: GOOD[B]}, {}, "is I32: an adapter is made of floats"),
    "a vector's module": (factors("model.norm", 24, 1, 8), {}, "do not fit"),
    "no magnitude": (GOOD, {"use_dora": True}, "use_dora, and no lora_magnitude_vector"),
    "a short magnitude": ({**GOOD, f"{Q}.lora_magnitude_vector": torch.ones(39)}, {"use_dora": True}, "magnitude .* for 40 outputs"),
    "other kinds of factor": ({**GOOD, f"{Q}.lora_C.weight": GOOD[A]}, {}, "a kind of adapter that is not supported"),
    "trained tokens without numbers": (ROWS, {}, "has no tokens for the trained module"),
    "tokens of another module": (ROWS, {"trainable_token_indices": {"wte": [1, 2]}}, "has no tokens for the trained module"),
    "tokens that are fewer than rows": (ROWS, {"trainable_token_indices": [1]}, "1 trained tokens .* but 2 rows"),
    "a token behind the last": (ROWS, {"trainable_token_indices": [1, 48]}, "trained token '48' .* is none of 48"),
    "a token before the first": (ROWS, {"trainable_token_indices": [1, -1]}, "trained token '-1' .* is none of 48"),
    "a token that is true": (ROWS, {"trainable_token_indices": [0, True]}, "trained token 'True'"),
    "a token of 31 digits": (ROWS, {"trainable_token_indices": [0, 10**30]}, "trained token '1000"),
    "a token twice": (ROWS, {"trainable_token_indices": [7, 7]}, "trained token 7 .* is listed twice"),
    "tokens as a text": (ROWS, {"trainable_token_indices": "12"}, "has no tokens"),
    "tokens of another width": (
        {f"{TOKENS}.trainable_tokens_delta": torch.ones(2, 23)}, {"trainable_token_indices": [1, 2]},
        r"trained tokens \[2, 23\] do not fit|which the base has not"),
    "tokens that are a vector": (
        {f"{TOKENS}.trainable_tokens_delta": torch.ones(2)}, {"trainable_token_indices": [1, 2]}, "do not fit|which the base has not"),
    "no rows of tokens": (GOOD, {"trainable_token_indices": [1, 2]}, "has no rows of the trainable_token_indices"),
    "tokens of a module that is not there": (
        {"model.other.token_adapter.trainable_tokens_delta": torch.ones(2, 24)}, {"trainable_token_indices": [1, 2]}, "which the base has not"),
    "experts without parameters": (
        {**EXPERTS}, {"target_parameters": []}, "adapts module|which `target_parameters` does not explain"),
    "parameters that are no list": (EXPERTS, {"target_parameters": {"a": 1}}, "target_parameters is not a list of names"),
    "factors of experts that do not divide": (
        {**EXPERTS, f"{X}.lora_A.weight": torch.ones(9, 6), f"{X}.lora_B.weight": torch.ones(8, 9)},
        {"target_parameters": ["experts.gate_up_proj"], "r": 2}, "fit the parameters gate_up_proj in no way"),
    "factors of experts of no rank": (
        {f"{X}.lora_A.weight": torch.ones(0, 6), f"{X}.lora_B.weight": torch.ones(8, 0)},
        {"target_parameters": ["experts.gate_up_proj"]}, "in no way"),
    "factors of experts with another rank": (EXPERTS, {"target_parameters": ["experts.gate_up_proj"], "r": 3}, "rank 3, but its factors have 2"),
    "one pair of factors for two parameters": (
        EXPERTS, {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"], "r": 2}, "1 pairs of factors for the parameters down_proj, gate_up_proj"),
    "factors within factors": (
        {**GOOD, **{name.replace(".lora", ".base_layer.lora"): t for name, t in GOOD.items()}}, {}, "factors within factors"),
    "inner factors alone": (
        {name.replace(".lora", ".base_layer.lora"): t for name, t in GOOD.items()}, {}, "outer ones of its nested factors are missing"),
    "no tensors": ({}, {}, "holds no tensors"),
    "a saved tensor of another width": ({**GOOD, "model.embed_tokens.weight": torch.ones(48, 23)}, {}, r"is \[48, 23\], the base's"),
    "a change of a bias that is not there": (
        {**factors("model.embed_tokens", 24, 48, 8), "model.embed_tokens.lora_B.bias": torch.ones(48)}, {}, "a bias that the base has not"),
    "alpha is text": (GOOD, {"lora_alpha": "16"}, "lora_alpha of module .* is no number"),
    "alpha is infinite": (GOOD, {"lora_alpha": float("inf")}, "lora_alpha of module .* is no number"),
    "alpha is true": (GOOD, {"lora_alpha": True}, "is no number"),
    "a flag that is text": (GOOD, {"use_rslora": "yes"}, "use_rslora is neither true nor false"),
    "a pattern that is a list": (GOOD, {"alpha_pattern": [1]}, "alpha_pattern is not a map"),
    "a pattern that takes for_ever": (GOOD, {"alpha_pattern": {"(a+)+$": 1}}, "too free an expression"),
    "a pattern that is none": (GOOD, {"alpha_pattern": {"(a": 1}}, "is no regular expression"),
    "a kind that is a list": (GOOD, {"peft_type": ["LORA"]}, "only LORA and TRAINABLE_TOKENS"),
    "another kind": (GOOD, {"peft_type": "LOHA"}, "peft_type is 'LOHA': only LORA"),
    "no kind": (GOOD, {"peft_type": None}, "only LORA"),
    **{key: (GOOD, {key: value}, "is not supported; merge the adapter with PEFT first") for key, value in {
        "use_qalora": True, "alora_invocation_tokens": [1], "layer_replication": [[0, 1]], "use_bdlora": {"nblocks": 2},
        "kasa_config": {"beta": 1}, "monteclora_config": {"x": 1}, "megatron_config": {"x": 1},
    }.items()},
    "arrow": (GOOD, {"arrow_config": {"top_k": 1}}, "no fixed change of the weights, and cannot be merged"),
    **{kind: (GOOD, {"peft_type": kind}, "only LORA and TRAINABLE_TOKENS are supported; merge it into the base with PEFT") for kind in (
        "IA3", "LOHA", "LOKR", "OFT", "VERA", "ADALORA")},
    **{kind: (GOOD, {"peft_type": kind}, "changes no weights: it cannot be merged") for kind in ("PROMPT_TUNING", "PREFIX_TUNING", "XLORA")},
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    experts = {f"{X}.gate_up_proj": torch.ones(4, 10, 6), f"{X}.down_proj": torch.ones(4, 6, 5)}
    return write_base(tmp_path_factory.mktemp("models") / "base", **experts)


@pytest.mark.parametrize("case", TENSORS)
def test_an_adapter_that_does_not_fit_is_refused(case: str, base: Path, tmp_path: Path) -> None:
    tensors, entries, message = TENSORS[case]
    adapter = write_adapter(tmp_path / "adapter", tensors, **entries)
    with pytest.raises(ModelError, match=message) as caught:
        open_model(f"{base}+{adapter}")
    assert len(str(caught.value)) < 1500
    assert "\n" not in str(caught.value)


def test_files_that_are_missing_or_no_json_are_named(base: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ModelError, match=r"empty: no adapter here: no adapter_config.json"):
        open_model(f"{base}+{empty}")
    (empty / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    with pytest.raises(ModelError, match=r"an adapter without adapter_model.safetensors"):
        open_model(f"{base}+{empty}")
    (empty / "adapter_config.json").write_text("{")
    with pytest.raises(ModelError, match=r"adapter_config.json: the file is not JSON"):
        open_model(f"{base}+{empty}")


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8])
def test_a_quantised_base_is_refused(dtype: torch.dtype, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", **{"model.layers.1.q_proj.weight": torch.ones(40, 24).to(dtype)})
    adapter = write_adapter(tmp_path / "adapter", factors("model.layers.1.q_proj", 24, 40, 8))
    with pytest.raises(ModelError, match=r"an adapter goes on float weights.*dequantise"):
        open_model(f"{base}+{adapter}")


def test_a_packed_base_is_refused_as_such(tmp_path: Path) -> None:
    """As GPTQ and AWQ store it."""
    packed = {"model.layers.1.q_proj.qweight": torch.ones(3, 40, dtype=torch.int32)}
    adapter = write_adapter(tmp_path / "adapter", factors("model.layers.1.q_proj", 24, 40, 8))
    with pytest.raises(
        ModelError,
        match=r"q_proj.qweight' is packed: an adapter goes on float weights.*dequantise|is quantised",
    ):
        open_model(f"{write_base(tmp_path / 'base', **packed)}+{adapter}")


def test_a_name_with_a_plus_is_taken_as_it_exists(base: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "a+b", GOOD)
    other = write_base(tmp_path / "c+d")
    assert open_model(f"{other}").adapter is None
    assert open_model(f"{base}+{adapter}").adapter is not None
    assert open_model(f"{other}+{adapter}").adapter is not None
    with pytest.raises(ModelError, match="not one model and one adapter"):
        open_model("x+y+z")
    with pytest.raises(ModelError, match="not one model and one adapter"):
        open_model(f"{base}+")


def test_two_adapters_are_refused(base: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "a", GOOD)
    with pytest.raises(
        ModelError, match=r"not one model and one adapter|no adapter here|adapters cannot be stacked"
    ):
        open_model(f"{base}+{adapter}+{adapter}")


def test_a_pickled_adapter_is_read_without_running_it(base: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "a", GOOD)
    torch.save({PREFIX + name: t for name, t in GOOD.items()}, adapter / "adapter_model.bin")
    safe = open_model(f"{base}+{adapter}")[f"{Q}.weight"]
    (adapter / "adapter_model.safetensors").unlink()
    pickled = open_model(f"{base}+{adapter}")[f"{Q}.weight"]
    assert safe.shape == pickled.shape
    assert safe.dtype == pickled.dtype == "F32"


def test_two_names_of_one_factor_are_refused(base: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "a", GOOD)
    tensors = {PREFIX + name: t.clone() for name, t in GOOD.items()} | {A: GOOD[A].clone()}
    save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises(ModelError, match="is there under another name too"):
        open_model(f"{base}+{adapter}")


@pytest.mark.parametrize("shape", [(5, 0), (0, 5)])
def test_a_weight_without_elements_is_refused(shape: tuple[int, int], tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", **{"model.x.weight": torch.ones(shape)})
    parts = {
        "model.x.lora_A.weight": torch.ones(2, shape[1]),
        "model.x.lora_B.weight": torch.ones(shape[0], 2),
    }
    with pytest.raises(ModelError, match="do not fit"):
        open_model(f"{base}+{write_adapter(tmp_path / 'a', parts, r=2)}")


def test_a_local_adapter_with_a_revision_is_refused_with_the_true_reason(base: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "a", GOOD)
    with pytest.raises(
        ModelError, match="/a: a local directory has no revision 'main': leave the revision out"
    ):
        open_model(f"{base}+{adapter}@main")
    with pytest.raises(ModelError, match="/base: a local directory has no revision 'v2'"):
        open_model(f"{base}@v2+{adapter}")
