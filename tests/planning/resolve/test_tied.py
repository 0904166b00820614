"""Tied heads, buffers that not all models store, and what config.json says of the output."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from streammerge.api import merge, plan
from streammerge.errors import ModelError
from tests.conftest import read_tensors, write_model

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def model(
    directory: Path, seed: int, *, head: bool, config: dict[str, Any] | None = None, **extra: torch.Tensor
) -> Path:
    generator = torch.Generator().manual_seed(seed)
    shapes = {EMBEDDING: (32, 8), "model.layers.0.w": (8, 8), "model.norm.weight": (8,)}
    shapes |= {HEAD: (32, 8)} if head else {}
    tensors = {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}
    path = write_model(directory, {**tensors, **extra})
    (path / "config.json").write_text(json.dumps({"num_hidden_layers": 1, **(config or {})}))
    return path


def mean_of(paths: list[Path], out: Path, **top: Any) -> dict[str, torch.Tensor]:
    merge({"merge_method": "linear", "models": [{"model": str(p)} for p in paths], **top}, out)
    return read_tensors(out)


def settings(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "config.json").read_text())
    return found


@pytest.mark.parametrize("tied_first", [True, False])
@pytest.mark.parametrize("flag", [{}, {"tie_word_embeddings": True}])
def test_a_tied_head_takes_part_as_its_embedding(
    tied_first: bool, flag: dict[str, bool], tmp_path: Path
) -> None:
    tied = model(tmp_path / "tied", 1, head=False, config=flag)
    own = model(tmp_path / "own", 2, head=True, config={"tie_word_embeddings": False})
    paths = [tied, own] if tied_first else [own, tied]
    found = mean_of(paths, tmp_path / "out")
    a, b = read_tensors(tied), read_tensors(own)
    assert torch.equal(found[HEAD], ((a[EMBEDDING].double() + b[HEAD].double()) / 2).bfloat16())
    assert torch.equal(found[EMBEDDING], ((a[EMBEDDING].double() + b[EMBEDDING].double()) / 2).bfloat16())
    assert settings(tmp_path / "out")["tie_word_embeddings"] is False


def test_a_head_that_no_model_stores_is_none_in_the_output(tmp_path: Path) -> None:
    paths = [model(tmp_path / name, i, head=False) for i, name in enumerate("ab")]
    assert HEAD not in mean_of(paths, tmp_path / "out")
    assert "tie_word_embeddings" not in settings(tmp_path / "out")


def test_a_head_stored_by_tied_models_alone_leaves_the_flag(tmp_path: Path) -> None:
    flag = {"tie_word_embeddings": True}
    paths = [model(tmp_path / name, i, head=name == "a", config=flag) for i, name in enumerate("ab")]
    assert HEAD in mean_of(paths, tmp_path / "out")
    assert settings(tmp_path / "out")["tie_word_embeddings"] is True


def test_a_model_that_says_its_head_is_its_own_must_have_it(tmp_path: Path) -> None:
    whole = model(tmp_path / "whole", 1, head=True)
    broken = model(tmp_path / "broken", 2, head=False, config={"tie_word_embeddings": False})
    config = {"merge_method": "linear", "models": [{"model": str(p)} for p in (whole, broken)]}
    with pytest.raises(ModelError, match=r"broken: tensor lm_head.weight is missing"):
        plan(config, memory="1GiB")


def test_the_flag_of_a_language_model_within_another_is_followed(tmp_path: Path) -> None:
    nested = {"text_config": {"tie_word_embeddings": True, "torch_dtype": "bfloat16"}}
    tied = model(tmp_path / "tied", 1, head=False, config=nested)
    own = model(tmp_path / "own", 2, head=True, config={"text_config": {"tie_word_embeddings": False}})
    mean_of([tied, own], tmp_path / "out", dtype="float32")
    found = settings(tmp_path / "out")
    assert found["text_config"] == {"tie_word_embeddings": False, "torch_dtype": "float32"}


@pytest.mark.parametrize("first", ["old", "new"])
def test_buffers_that_not_all_models_store_are_copied_or_left_out(first: str, tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    frequencies = torch.arange(4).float()
    old = model(tmp_path / "old", 1, head=False, **{name: frequencies})
    new = model(tmp_path / "new", 2, head=False)
    paths = [old, new] if first == "old" else [new, old]
    config = {"merge_method": "linear", "models": [{"model": str(p)} for p in paths]}
    warnings = plan(config, memory="1GiB").warnings
    found = mean_of(paths, tmp_path / "out")
    if first == "old":
        assert torch.equal(found[name], frequencies)
        assert any("1 buffers that not all models store are copied" in line for line in warnings)
    else:
        assert name not in found
        assert any("is left out" in line for line in warnings)


def test_lists_with_an_entry_per_layer_follow_the_layers(tmp_path: Path) -> None:
    def layered(name: str, kinds: list[str]) -> Path:
        tensors = {f"model.layers.{i}.w": torch.ones(4) * i for i in range(len(kinds))}
        path = write_model(tmp_path / name, {**tensors, EMBEDDING: torch.ones(4, 2)})
        config = {
            "num_hidden_layers": len(kinds),
            "layer_types": kinds,
            "eos_token_id": [1, 2, 3],
            "vocab_size": 4,
        }
        (path / "config.json").write_text(json.dumps(config))
        return path

    a, b = layered("a", ["full", "slide", "full", "slide"]), layered("b", ["x", "y"])
    slices = [
        {"sources": [{"model": str(m), "layer_range": r}]} for m, r in ((a, [2, 4]), (b, [1, 2]), (a, [0, 2]))
    ]
    merge({"merge_method": "passthrough", "slices": slices}, tmp_path / "out")
    found = settings(tmp_path / "out")
    assert found["num_hidden_layers"] == 5
    assert found["layer_types"] == ["full", "slide", "y", "full", "slide"]
    assert found["eos_token_id"] == [1, 2, 3]


def test_where_no_count_of_layers_is_known_the_user_is_told(tmp_path: Path) -> None:
    path = write_model(tmp_path / "a", {f"h.{i}.w": torch.ones(4) for i in range(3)})
    (path / "config.json").write_text('{"blocks": 3}')
    config = {
        "merge_method": "passthrough",
        "slices": [{"sources": [{"model": str(path), "layer_range": [0, 2]}]}],
    }
    assert any(
        "no place for the number of layers of h, now 2" in w for w in plan(config, memory="1GiB").warnings
    )


def test_a_quantisation_that_is_gone_is_out_of_the_config(tmp_path: Path) -> None:
    config = {"quantization_config": {"quant_method": "fp8"}, "rope_scaling": None}
    paths = [model(tmp_path / name, i, head=False, config=config) for i, name in enumerate("ab")]
    mean_of(paths, tmp_path / "out")
    assert settings(tmp_path / "out") == {"num_hidden_layers": 1, "rope_scaling": None}


def test_a_config_that_nothing_changes_is_copied_to_the_letter(tmp_path: Path) -> None:
    paths = [model(tmp_path / name, i, head=False) for i, name in enumerate("ab")]
    text = '{ "num_hidden_layers":1,"time_step_limit": [0.0, Infinity] }'
    (paths[0] / "config.json").write_text(text)
    mean_of(paths, tmp_path / "out")
    assert (tmp_path / "out" / "config.json").read_text() == text


@pytest.mark.parametrize("base_is_tied", [True, False])
def test_a_stack_that_ends_with_a_tied_model_stores_its_embedding_as_head(
    base_is_tied: bool, tmp_path: Path
) -> None:
    """Where the output's embedding is that of a model with a head of its own, it cannot be the head."""
    tied = model(tmp_path / "tied", 1, head=False, config={"tie_word_embeddings": True})
    own = model(tmp_path / "own", 2, head=True, config={"tie_word_embeddings": False})
    slices = [{"sources": [{"model": str(path), "layer_range": [0, 1]}]} for path in (own, tied)]
    base = {"base_model": str(tied)} if base_is_tied else {}
    merge({"merge_method": "passthrough", "slices": slices, **base}, tmp_path / "out")
    found = read_tensors(tmp_path / "out")
    assert torch.equal(found[EMBEDDING], read_tensors(own)[EMBEDDING])
    assert torch.equal(found[HEAD], read_tensors(tied)[EMBEDDING])
    assert settings(tmp_path / "out")["tie_word_embeddings"] is False
