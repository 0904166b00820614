"""Where an adapter's tensors go: modules of other names, weights stored either way, tied heads, resized vocabularies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from streammerge.api import merge
from streammerge.checkpoint.index import TensorIndex, open_model
from streammerge.checkpoint.refs.adapted import AdaptedRef
from streammerge.errors import ModelError
from tests.checkpoint.adapters.scene import adapted, factors, write_adapter
from tests.conftest import read_tensors

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def base_of(directory: Path, shapes: dict[str, tuple[int, ...]], **config: Any) -> Path:
    directory.mkdir()
    generator = torch.Generator().manual_seed(1)
    save_file(
        {name: torch.randn(s, generator=generator) for name, s in shapes.items()},
        directory / "model.safetensors",
    )
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def changed(index: TensorIndex) -> set[str]:
    return {name for name, ref in index.items() if isinstance(ref, AdaptedRef)}


@pytest.mark.parametrize(
    ("stored", "adapted_module"),
    [
        ("model.decoder.layers.0.fc", "model.encoder.layers.0.fc"),
        ("vis.blocks.0.q", "text.h.0.q"),
        ("a.layers.0.q", "b.layers.0.q"),
    ],
)
def test_ends_that_are_alike_are_not_the_same_module(
    stored: str, adapted_module: str, tmp_path: Path
) -> None:
    base = base_of(tmp_path / "base", {f"{stored}.weight": (4, 3)})
    adapter = write_adapter(tmp_path / "adapter", factors(adapted_module, 3, 4, 2), r=2)
    with pytest.raises(ModelError, match="another base model's adapter"):
        open_model(f"{base}+{adapter}")


def test_a_head_of_another_model_is_added_and_replaces_none(tmp_path: Path) -> None:
    """As a classifier's on a language model, whose own head ends with the same name."""
    base = base_of(tmp_path / "base", {"lm_head.dense.weight": (4, 4), "encoder.q.weight": (4, 4)})
    parts = {"classifier.dense.weight": torch.ones(4, 4), **factors("roberta.encoder.q", 4, 4, 2)}
    index = open_model(f"{base}+{write_adapter(tmp_path / 'adapter', parts, r=2)}")
    assert set(index) == {"lm_head.dense.weight", "encoder.q.weight", "classifier.dense.weight"}
    assert changed(index) == {"encoder.q.weight"}


@pytest.mark.parametrize("flag", [True, False])
@pytest.mark.parametrize("conv1d", [True, False])
def test_which_way_a_weight_is_stored_is_told_by_the_shapes_of_the_model(
    flag: bool, conv1d: bool, tmp_path: Path
) -> None:
    """PEFT saves what it decided for the last module only; a square weight is stored as its kin are."""
    wide = (6, 18) if conv1d else (18, 6)
    shapes = {
        "h.0.c_attn.weight": wide,
        "h.0.c_attn.bias": (18,),
        "h.0.c_proj.weight": (6, 6),
        "lm_head.weight": (9, 6),
    }
    base = base_of(tmp_path / "base", shapes)
    parts = {
        **factors("h.0.c_attn", 6, 18, 2),
        **factors("h.0.c_proj", 6, 6, 2, seed=2),
        **factors("lm_head", 6, 9, 2, seed=3),
    }
    adapter = write_adapter(tmp_path / "adapter", parts, r=2, lora_alpha=2, fan_in_fan_out=flag)
    merge({"merge_method": "passthrough", "models": [{"model": f"{base}+{adapter}"}]}, tmp_path / "out")
    before, found = read_tensors(base), read_tensors(tmp_path / "out")
    for module in ("h.0.c_attn", "h.0.c_proj", "lm_head"):
        a, b = parts[f"{module}.lora_A.weight"], parts[f"{module}.lora_B.weight"]
        wanted = adapted(before[f"{module}.weight"], a, b, 1.0, transposed=conv1d and module != "lm_head")
        assert torch.allclose(found[f"{module}.weight"].double(), wanted, atol=1e-5), module


SHAPES = {EMBEDDING: (10, 4), "model.layers.0.q_proj.weight": (4, 4)}


@pytest.mark.parametrize(
    ("saved", "ensured", "head"),
    [
        ([EMBEDDING], False, "base"),
        ([EMBEDDING], True, None),
        ([HEAD], False, "saved"),
        ([EMBEDDING, HEAD], False, "saved"),
    ],
)
def test_a_tied_head_and_whole_tensors_of_an_adapter(
    saved: list[str], ensured: bool, head: str | None, tmp_path: Path
) -> None:
    """PEFT leaves the head of a tied model as it was where only the embedding was trained."""
    base = base_of(tmp_path / "base", SHAPES, tie_word_embeddings=True, vocab_size=10)
    whole = {name: torch.randn(10, 4) for name in saved}
    adapter = write_adapter(
        tmp_path / "adapter",
        {**factors("model.layers.0.q_proj", 4, 4, 2), **whole},
        r=2,
        ensure_weight_tying=ensured,
    )
    merge({"merge_method": "passthrough", "models": [{"model": f"{base}+{adapter}"}]}, tmp_path / "out")
    found = read_tensors(tmp_path / "out")
    wanted = {"base": read_tensors(base)[EMBEDDING], "saved": whole.get(HEAD), None: None}[head]
    assert torch.equal(found[HEAD], wanted) if wanted is not None else HEAD not in found
    assert torch.equal(found[EMBEDDING], whole.get(EMBEDDING, read_tensors(base)[EMBEDDING]))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is (head is None)


def test_a_resized_embedding_is_told_by_config_json(tmp_path: Path) -> None:
    base = base_of(
        tmp_path / "base", {**SHAPES, HEAD: (10, 4)}, vocab_size=10, text_config={"vocab_size": 10}
    )
    whole = {EMBEDDING: torch.randn(13, 4), HEAD: torch.randn(13, 4)}
    adapter = write_adapter(tmp_path / "adapter", {**factors("model.layers.0.q_proj", 4, 4, 2), **whole}, r=2)
    merge({"merge_method": "passthrough", "models": [{"model": f"{base}+{adapter}"}]}, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == {"vocab_size": 13, "text_config": {"vocab_size": 13}}


def test_the_bias_of_an_embedding_takes_the_scale_of_its_factors(tmp_path: Path) -> None:
    base = base_of(tmp_path / "base", {"m.e.weight": (10, 4), "m.e.bias": (4,)})
    parts = {
        "m.e.lora_embedding_A": torch.randn(2, 10),
        "m.e.lora_embedding_B": torch.randn(4, 2),
        "m.e.lora_B.bias": torch.ones(4),
    }
    index = open_model(f"{base}+{write_adapter(tmp_path / 'adapter', parts, r=2, lora_alpha=6)}")
    bias = index["m.e.bias"]
    assert isinstance(bias, AdaptedRef)
    assert bias.scale == 3.0
