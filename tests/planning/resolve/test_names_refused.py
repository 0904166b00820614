"""Models that are not of one kind: refused with what differs, once for all tensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from streammerge.api import plan
from streammerge.errors import ConfigError, ModelError
from streammerge.planning.resolve.agreement import counted
from tests.planning.resolve.named_models import linear, merged, normal, text, tower, write

# ---- models that are not of one kind ----------------------------------------------------------------

BERT = {
    f"bert.encoder.layer.{i}.attention.self.{k}.weight": (8, 8) for i in range(6) for k in ("query", "key")
}


def refusal(config: Mapping[str, Any]) -> str:
    with pytest.raises((ConfigError, ModelError)) as caught:
        plan(config, memory="1GiB")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_another_architecture_is_named_and_nothing_is_advised(tmp_path: Path) -> None:
    bert = write(tmp_path / "bert", normal(1, BERT), architectures=["BertForSequenceClassification"])
    llama = write(tmp_path / "llama", text(2), architectures=["LlamaForCausalLM"])
    for order in ([bert, llama], [llama, bert]):
        message = refusal(linear(*order))
        assert (
            f"{order[1]} ({'LlamaForCausalLM' if order[1] is llama else 'BertForSequenceClassification'})"
            in message
        )
        assert message.endswith("share 0 of 9 tensors: different architectures")
        assert "exclude" not in message


def test_other_widths_are_told_once_for_all_tensors(tmp_path: Path) -> None:
    wide = write(tmp_path / "wide", text(1, h=16), hidden_size=16)
    narrow = write(tmp_path / "narrow", text(2), hidden_size=8)
    message = refusal(linear(wide, narrow))
    assert (
        "9 of 9 tensors differ in shape (hidden_size 8 and 16 in config.json): these models cannot be merged"
        in message
    )
    assert "exclude" not in message


def test_one_tensor_of_another_shape_may_be_left_out(tmp_path: Path) -> None:
    odd = {**text(2), "model.norm.weight": torch.ones(9)}
    config = linear(write(tmp_path / "a", text(1)), write(tmp_path / "odd", odd))
    assert "tensor model.norm.weight: [9] in" in refusal(config)
    plan({**config, "exclude": ["model.norm"]}, memory="1GiB")


@pytest.mark.parametrize("deeper_first", [True, False])
def test_models_of_different_depth_are_refused_whichever_comes_first(
    deeper_first: bool, tmp_path: Path
) -> None:
    deep, flat = write(tmp_path / "deep", text(1, layers=4)), write(tmp_path / "flat", text(2))
    paths = [deep, flat] if deeper_first else [flat, deep]
    message = refusal(linear(*paths))
    n, m = (2, 4) if deeper_first else (4, 2)
    assert f"{paths[1]} has {n} layers, {paths[0]} {m} (model.layers): choose layers" in message
    assert "`slices:`" in message
    plan(linear(*paths, exclude=[r"layers\.[23]\."]), memory="1GiB")


@pytest.mark.parametrize("deeper", ["text", "vision-language"])
@pytest.mark.parametrize("first", ["text", "vision-language"])
def test_depths_are_compared_whatever_the_layers_are_called(tmp_path: Path, deeper: str, first: str) -> None:
    n, m = (3, 2) if deeper == "text" else (2, 3)
    one = write(tmp_path / "text", text(1, layers=n))
    wrapped = {f"language_model.{name}": tensor for name, tensor in text(2, layers=m).items()}
    other = write(tmp_path / "vlm", wrapped | tower(3, "vision_tower.", "multi_modal_projector."))
    both = (one, other) if first == "text" else (other, one)
    with pytest.raises(ModelError, match=r"has [23] layers, .* [23] \(.*model\.layers\): choose layers"):
        plan(linear(*both))


def test_the_depth_of_a_tower_is_compared_too(tmp_path: Path) -> None:
    longer = tower(2) | normal(9, {"model.vision_tower.encoder.layers.2.self_attn.q_proj.weight": (8, 8)})
    a = write(tmp_path / "a", text(1, "model.language_model.") | tower(1))
    b = write(tmp_path / "b", text(2, "model.language_model.") | longer)
    assert "has 3 layers" in refusal(linear(a, b))
    assert "(model.vision_tower.encoder.layers)" in refusal(linear(b, a))


def test_biases_of_layers_are_not_left_out_beside_merged_weights(tmp_path: Path) -> None:
    a = write(tmp_path / "a", text(1), architectures=["LlamaForCausalLM"])
    biases = {f"model.layers.{i}.self_attn.q_proj.bias": torch.ones(8) for i in range(2)}
    b = write(tmp_path / "b", text(2) | biases, architectures=["Qwen2ForCausalLM"])
    with pytest.raises(
        ModelError, match=r"b \(Qwen2ForCausalLM\) has 2 biases .*a \(LlamaForCausalLM\) lacks"
    ):
        plan(linear(a, b))
    assert plan(linear(a, b, exclude=[r"q_proj\.bias$"])).jobs


def test_another_number_of_labels_is_no_vocabulary(tmp_path: Path) -> None:
    models = [write(tmp_path / str(n), text(n) | {"score.weight": torch.ones(n, 8)}) for n in (2, 3)]
    with pytest.raises(ModelError, match=r"tensor score.weight: .*; shapes differ: list it"):
        plan(linear(*models))


SHARED = ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight")


@pytest.mark.parametrize("own", [SHARED, *([name] for name in SHARED)])
@pytest.mark.parametrize("other", [SHARED, *([name] for name in SHARED)])
def test_an_embedding_of_encoder_and_decoder_is_found_under_any_of_its_names(
    tmp_path: Path, own: list[str], other: list[str]
) -> None:
    layers = {f"{part}.block.{i}.q.weight": (8, 8) for part in ("encoder", "decoder") for i in range(2)}
    one, two = torch.randn(20, 8), torch.randn(20, 8)
    a = normal(1, layers) | {name: one.clone() for name in own}
    b = normal(2, layers) | {name: two.clone() for name in other}
    found = merged(linear(write(tmp_path / "a", a), write(tmp_path / "b", b)), tmp_path / "out")
    assert found.keys() == a.keys()
    for name in own:
        torch.testing.assert_close(found[name], 0.25 * one + 0.75 * two)


def test_layers_for_multi_token_prediction_are_no_depth(tmp_path: Path) -> None:
    a = write(tmp_path / "a", text(1))
    b = write(tmp_path / "b", text(2, layers=3), num_hidden_layers=2, num_nextn_predict_layers=1)
    assert any("3 tensors that" in line for line in plan(linear(a, b), memory="1GiB").warnings)


def test_what_is_missing_is_counted_by_what_it_has_in_common() -> None:
    names = ["v.a.w", "v.b.w", "m.0.x", "m.0.y", "m.1.x", "n", "o"]
    assert counted(names, ["m.0.z", "m.2"]) == "v (2 tensors), m.0.x, m.0.y, m.1.x and 2 more"
