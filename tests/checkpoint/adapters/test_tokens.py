"""Single trained tokens, and heads that are tied to the embedding."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from streammerge.api import merge, plan
from streammerge.checkpoint.index import open_model
from streammerge.errors import ModelError
from streammerge.io.reader import Reader
from streammerge.tensors.read import read_elements
from tests.checkpoint.adapters.scene import adapted, factors, write_adapter
from tests.conftest import read_tensors

EMBEDDING, HEAD, Q = "model.embed_tokens.weight", "lm_head.weight", "model.layers.0.q_proj"
E, H = "model.embed_tokens", "lm_head"
ROWS = torch.arange(12.0).reshape(3, 4)
WIDE = {
    f"{E}.lora_embedding_A": torch.randn(2, 10, generator=torch.Generator().manual_seed(1)),
    f"{E}.lora_embedding_B": torch.randn(4, 2, generator=torch.Generator().manual_seed(2)),
}


def write(
    directory: Path, *, tied: bool, head: bool = False, dtype: torch.dtype = torch.float32, **config: Any
) -> Path:
    directory.mkdir()
    generator = torch.Generator().manual_seed(3)
    tensors = {
        EMBEDDING: torch.randn(10, 4, generator=generator),
        f"{Q}.weight": torch.randn(4, 4, generator=generator),
    }
    if head:
        tensors[HEAD] = tensors[EMBEDDING].clone() if tied else torch.randn(10, 4, generator=generator)
    save_file({name: t.to(dtype) for name, t in tensors.items()}, directory / "model.safetensors")
    entries = {"architectures": ["LlamaForCausalLM"], "vocab_size": 10, "tie_word_embeddings": tied, **config}
    (directory / "config.json").write_text(json.dumps({k: v for k, v in entries.items() if v is not None}))
    return directory


def merged(
    base: Path, tensors: dict[str, torch.Tensor], out: Path, **settings: Any
) -> tuple[dict[str, torch.Tensor], Any]:
    adapter = write_adapter(out.parent / "adapter", tensors, **{"r": 2, "lora_alpha": 2} | settings)
    merge({"merge_method": "passthrough", "models": [{"model": f"{base}+{adapter}"}]}, out)
    return read_tensors(out), json.loads((out / "config.json").read_text())


def rows(module: str, values: torch.Tensor = ROWS) -> dict[str, torch.Tensor]:
    return {f"{module}.token_adapter.trainable_tokens_delta": values}


@pytest.mark.parametrize("indices", [[7, 0, 9], {"embed_tokens": [7, 0, 9]}, {E: [7, 0, 9]}])
def test_trained_tokens_take_their_rows_and_no_others(indices: Any, tmp_path: Path) -> None:
    base = write(tmp_path / "base", tied=False, head=True)
    found, _ = merged(
        base, {**rows(E), **factors(Q, 4, 4, 2)}, tmp_path / "out", trainable_token_indices=indices
    )
    wanted = read_tensors(base)[EMBEDDING].clone()
    wanted[[7, 0, 9]] = ROWS
    assert torch.equal(found[EMBEDDING], wanted)
    assert torch.equal(found[HEAD], read_tensors(base)[HEAD])
    assert not torch.equal(found[f"{Q}.weight"], read_tensors(base)[f"{Q}.weight"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("trained", [torch.float32, torch.bfloat16])
def test_any_range_of_elements_is_that_of_the_whole(
    dtype: torch.dtype, trained: torch.dtype, tmp_path: Path
) -> None:
    base = write(tmp_path / "base", tied=False, dtype=dtype)
    adapter = write_adapter(tmp_path / "a", rows(E, ROWS.to(trained) / 3), trainable_token_indices=[7, 0, 9])
    ref, reader = open_model(f"{base}+{adapter}")[EMBEDDING], Reader()
    whole = read_elements(reader, ref, 0, ref.n_elements).reshape(ref.n_elements, -1)
    wanted = read_tensors(base)[EMBEDDING].double()
    wanted[[7, 0, 9]] = (ROWS.to(trained) / 3).double()
    if ref.dtype == "F32":
        assert np.array_equal(whole.view(np.float32).reshape(10, 4).astype(np.float64), wanted.numpy())
    for start in range(ref.n_elements):
        for stop in (start + 1, start + 3, start + 17, ref.n_elements):
            part = read_elements(reader, ref, start, min(stop, ref.n_elements)).reshape(-1, whole.shape[1])
            assert np.array_equal(part, whole[start:stop])
    reader.close()


@pytest.mark.parametrize("head", [True, False])
def test_trained_tokens_of_a_tied_model_stay_tied(head: bool, tmp_path: Path) -> None:
    base = write(tmp_path / "base", tied=True, head=head)
    found, config = merged(base, rows(E), tmp_path / "out", trainable_token_indices=[7, 0, 9])
    assert config["tie_word_embeddings"] is True
    assert torch.equal(found[EMBEDDING][7], ROWS[0])
    assert torch.equal(found[HEAD], found[EMBEDDING]) if head else HEAD not in found


def test_tokens_of_the_head_alone_untie_it(tmp_path: Path) -> None:
    base = write(tmp_path / "base", tied=True)
    found, config = merged(base, rows(H), tmp_path / "out", trainable_token_indices={"lm_head": [7, 0, 9]})
    assert config["tie_word_embeddings"] is False
    assert torch.equal(found[EMBEDDING], read_tensors(base)[EMBEDDING])
    assert torch.equal(found[HEAD][0], ROWS[1])
    assert torch.equal(found[HEAD][1], found[EMBEDDING][1])


def test_trained_tokens_of_a_resized_vocabulary(tmp_path: Path) -> None:
    base = write(tmp_path / "base", tied=True)
    grown = torch.randn(12, 4)
    saved = {f"{E}.token_adapter.base_layer.weight": grown, **rows(E)}
    found, config = merged(base, saved, tmp_path / "out", trainable_token_indices=[11, 10, 9])
    assert torch.equal(found[EMBEDDING], torch.cat([grown[:9], ROWS.flip(0)]))
    assert config["vocab_size"] == 12
    assert config["tie_word_embeddings"] is True


def test_an_adapter_of_tokens_alone(tmp_path: Path) -> None:
    base = write(tmp_path / "base", tied=False)
    saved = {f"{E}.trainable_tokens_delta": ROWS}
    found, _ = merged(base, saved, tmp_path / "out", peft_type="TRAINABLE_TOKENS", token_indices=[7, 0, 9])
    assert torch.equal(found[EMBEDDING][9], ROWS[2])


@pytest.mark.parametrize("flag", [True, None])
def test_a_tied_head_that_is_adapted_gets_a_tensor_of_its_own(flag: bool | None, tmp_path: Path) -> None:
    base = write(tmp_path / "base", tied=True, tie_word_embeddings=flag)
    parts = factors(H, 4, 10, 2)
    found, config = merged(base, parts, tmp_path / "out")
    before = read_tensors(base)[EMBEDDING]
    assert torch.equal(found[EMBEDDING], before)
    assert torch.allclose(found[HEAD].double(), adapted(before, *parts.values(), 1.0), atol=1e-5)
    assert config["tie_word_embeddings"] is False
    notes = plan(
        {"merge_method": "passthrough", "models": [{"model": f"{base}+{tmp_path / 'adapter'}"}]}
    ).warnings
    assert any("'lm_head.weight': the base ties its head" in note for note in notes)


@pytest.mark.parametrize("ensured", [True, False])
def test_a_tied_embedding_that_is_adapted_leaves_the_head_as_it_was_trained(
    ensured: bool, tmp_path: Path
) -> None:
    base = write(tmp_path / "base", tied=True)
    found, config = merged(base, WIDE, tmp_path / "out", ensure_weight_tying=ensured)
    assert config["tie_word_embeddings"] is ensured
    assert not torch.equal(found[EMBEDDING], read_tensors(base)[EMBEDDING])
    assert HEAD not in found if ensured else torch.equal(found[HEAD], read_tensors(base)[EMBEDDING])


def test_a_tied_head_that_is_stored_all_the_same_is_untied_too(tmp_path: Path) -> None:
    found, config = merged(write(tmp_path / "base", tied=True, head=True), WIDE, tmp_path / "out")
    assert config["tie_word_embeddings"] is False
    assert not torch.equal(found[EMBEDDING], found[HEAD])


def test_an_encoder_has_no_head_to_untie(tmp_path: Path) -> None:
    base = write(tmp_path / "base", tied=True, architectures=["BertModel"], tie_word_embeddings=None)
    found, config = merged(base, WIDE, tmp_path / "out")
    assert HEAD not in found
    assert "tie_word_embeddings" not in config


def test_a_head_that_cannot_be_untied_is_refused(tmp_path: Path) -> None:
    base = write(tmp_path / "base", tied=True, model_type="t5", architectures=["T5ForConditionalGeneration"])
    with pytest.raises(ModelError, match=r"t5 scales what a tied head is given: .* merge it with PEFT first"):
        merged(base, factors(H, 4, 10, 2), tmp_path / "out")


def test_dora_of_an_embedding_scales_its_columns(tmp_path: Path) -> None:
    base = write(tmp_path / "base", tied=False)
    magnitude = torch.linspace(0.5, 2, 4)
    found, _ = merged(
        base, {**WIDE, f"{E}.lora_magnitude_vector": magnitude}, tmp_path / "out", use_dora=True
    )
    whole = (
        read_tensors(base)[EMBEDDING].double()
        + (WIDE[f"{E}.lora_embedding_B"] @ WIDE[f"{E}.lora_embedding_A"]).T.double()
    )
    assert torch.allclose(found[EMBEDDING].double(), whole * magnitude / whole.norm(dim=0), atol=1e-5)


def test_tensors_saved_twice_after_a_resize_are_the_trained_ones(tmp_path: Path) -> None:
    base = write(tmp_path / "base", tied=False, head=True)
    trained = torch.randn(12, 4)
    saved = {
        HEAD: trained,
        f"{H}.modules_to_save.weight": trained + 1,
        f"{H}.original_module.weight": trained + 2,
    }
    found, _ = merged(base, {**saved, **factors(Q, 4, 4, 2)}, tmp_path / "out")
    assert torch.equal(found[HEAD], trained)


def test_adapters_go_on_weights_of_eight_bits(tmp_path: Path) -> None:
    base = write(tmp_path / "base", tied=False, dtype=torch.float8_e4m3fn)
    parts = factors(Q, 4, 4, 2)
    adapter = write_adapter(
        tmp_path / "a", {**parts, **rows(E)}, r=2, lora_alpha=2, trainable_token_indices=[7, 0, 9]
    )
    merge(
        {"merge_method": "passthrough", "models": [{"model": f"{base}+{adapter}"}], "dtype": "float32"},
        tmp_path / "out",
    )
    found, before = read_tensors(tmp_path / "out"), read_tensors(base)
    assert torch.allclose(
        found[f"{Q}.weight"].double(), adapted(before[f"{Q}.weight"].float(), *parts.values(), 1.0), atol=1e-5
    )
    assert torch.equal(found[EMBEDDING][[7, 0, 9]], ROWS)
    assert torch.equal(found[EMBEDDING][1:7], before[EMBEDDING][1:7].float())
