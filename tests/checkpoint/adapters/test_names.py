"""An adapter's names and a base's: two namings of one model lead to one place, or are refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from streammerge.checkpoint.adapters.files import _plain, read_adapter
from streammerge.checkpoint.adapters.names import Names
from streammerge.errors import ModelError
from tests.checkpoint.adapters.scene import PREFIX

Q = "layers.3.self_attn.q_proj.weight"
TOWER = "encoder.layers.3.self_attn.q_proj.weight"
WITH_TOWER = ["model.layers.3.self_attn.q_proj.weight", f"visual.{TOWER}"]


def find(plain: str, *stored: str) -> str | None:
    return Names(stored, "base").find(plain, "adapter")


@pytest.mark.parametrize(
    ("plain", "stored"),
    [
        (f"model.{Q}", f"model.{Q}"),
        (f"model.language_model.{Q}", f"model.{Q}"),  # Qwen2-VL: modules of 5, files of 4
        (f"model.language_model.{Q}", f"language_model.model.{Q}"),  # Gemma 3, LLaVA
        (f"language_model.model.{Q}", f"model.language_model.{Q}"),  # modules of 4, files of 5
        (f"model.{Q}", f"language_model.model.{Q}"),  # a text model's adapter
        (Q, f"language_model.model.{Q}"),  # trained on the sub-model
        (Q, f"model.{Q}"),
        (f"model.{Q}", Q),  # a base saved as the sub-model
        (f"model.text_model.{Q}", f"text_model.model.{Q}"),
        ("bert.encoder.layer.0.attention.self.query.weight", "encoder.layer.0.attention.self.query.weight"),
        ("encoder.layer.0.attention.self.query.weight", "bert.encoder.layer.0.attention.self.query.weight"),
        ("vit.layers.0.attention.q_proj.weight", "vit.encoder.layer.0.attention.attention.query.weight"),
        ("model.layers.0.mlp.gate.weight", "model.layers.0.block_sparse_moe.gate.weight"),
        ("gpt_neox.embed_in.weight", "embed_in.weight"),
        ("lm_head.weight", "embed_out.weight"),
        ("lm_head.weight", "language_model.lm_head.weight"),
        ("decoder.block.0.layer.0.SelfAttention.q.weight", "decoder.block.0.layer.0.SelfAttention.q.weight"),
    ],
)
def test_both_namings_lead_to_one_place(plain: str, stored: str) -> None:
    assert find(plain, stored, "model.norm.weight") == stored


@pytest.mark.parametrize(
    ("plain", "place"),
    [
        (f"model.language_model.{Q}", 0),
        (Q, 0),
        (f"model.{Q}", 0),
        (f"model.visual.{TOWER}", 1),
        (f"model.vision_tower.vision_model.{TOWER}", 1),
        (f"vision_model.{TOWER}", 1),
        (TOWER, 1),
    ],
)
def test_text_and_vision_are_told_apart(plain: str, place: int) -> None:
    assert find(plain, *WITH_TOWER) == WITH_TOWER[place]


@pytest.mark.parametrize(
    ("plain", "stored"),
    [
        ("model.encoder.layers.0.fc.weight", "model.decoder.layers.0.fc.weight"),
        ("model.layers.4.q.weight", "model.layers.3.q.weight"),
        ("classifier.dense.weight", "lm_head.dense.weight"),
        ("visual.layers.0.q.weight", "model.layers.0.q.weight"),
    ],
)
def test_another_place_is_none(plain: str, stored: str) -> None:
    assert find(plain, stored) is None


def test_several_places_are_refused_and_named() -> None:
    with pytest.raises(
        ModelError, match=r"may be any of 2 tensors of base .*encoder\.block\.0\.q.*decoder\.block\.0\.q"
    ):
        find("block.0.q.weight", "encoder.block.0.q.weight", "decoder.block.0.q.weight")


def test_of_several_places_the_one_that_fits_is_taken() -> None:
    names = Names(["encoder.block.0.q.weight", "decoder.block.0.q.weight"], "base")
    assert (
        names.find("block.0.q.weight", "adapter", lambda name: name.startswith("dec"))
        == "decoder.block.0.q.weight"
    )


def test_what_peft_puts_around_a_name_is_taken_off_however_often(tmp_path: Path) -> None:
    assert _plain(f"{PREFIX}{PREFIX}model.x.modules_to_save.weight") == "model.x.weight"
    assert _plain(f"{PREFIX}model.e.token_adapter.base_layer.weight") == "model.e.weight"
    assert _plain(f"{PREFIX}model.x.modules_to_save.default.dense.weight") == "model.x.dense.weight"
    assert _plain(f"{PREFIX}model.x.modules_to_save.mine.weight", {"mine"}) == "model.x.weight"
    assert _plain(f"{PREFIX}model.x.modules_to_save.dense.weight") == "model.x.dense.weight"


@pytest.mark.parametrize("called", ["default", "mine"])
def test_names_saved_as_they_are_in_memory_lead_to_the_same_changes(tmp_path: Path, called: str) -> None:
    """Saving a model's state_dict instead of the adapter keeps the adapter's own name within each tensor's."""
    at = f"{PREFIX}model.layers.0.q_proj"
    found = {}
    for kind, name in (("plain", ""), ("kept", f".{called}")):
        tensors = {
            f"{at}.lora_A{name}.weight": torch.ones(2, 8),
            f"{at}.lora_B{name}.weight": torch.ones(8, 2),
            f"{at}.lora_magnitude_vector{name or '.weight'}": torch.ones(8),
            f"{PREFIX}model.embed_tokens.lora_embedding_A{name}": torch.ones(2, 8),
            f"{PREFIX}model.embed_tokens.lora_embedding_B{name}": torch.ones(8, 2),
            f"{PREFIX}lm_head{f'.modules_to_save{name}' if name else ''}.weight": torch.ones(4, 8),
        }
        (tmp_path / kind).mkdir()
        save_file(tensors, tmp_path / kind / "adapter_model.safetensors")
        (tmp_path / kind / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 4}')
        found[kind] = read_adapter(tmp_path / kind)
    assert found["kept"].tensors.keys() == found["plain"].tensors.keys()
    assert "lm_head.weight" in found["kept"].replaced
