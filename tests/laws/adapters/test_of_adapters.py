"""Adapters made of adapters, of quantised models, and of what is not finite."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from streammerge.api import merge, verify
from streammerge.config.lora import extraction
from streammerge.errors import InputError
from tests.checkpoint.adapters.scene import C, Q, adapted, factors, write_adapter, write_base

PREFIX = "base_model.model."
E = "model.embed_tokens"


def embedding(rank: int, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        f"{E}.lora_embedding_A": torch.randn((rank, 48), generator=generator),
        f"{E}.lora_embedding_B": torch.randn((24, rank), generator=generator),
    }


KINDS: dict[str, tuple[dict[str, torch.Tensor], dict[str, Any], float]] = {
    "plain": (factors(Q, 24, 40, 4, 1), {"r": 4, "lora_alpha": 8}, 2.0),
    "rank 1": (factors(Q, 24, 40, 1, 2), {"r": 1, "lora_alpha": 3}, 3.0),
    "rsLoRA": (factors(Q, 24, 40, 4, 3), {"r": 4, "lora_alpha": 8, "use_rslora": True}, 4.0),
    "a rank by module": (
        factors(Q, 24, 40, 5, 4),
        {"r": 4, "lora_alpha": 10, "rank_pattern": {"q_proj": 5}},
        2.0,
    ),
    "an alpha by module": (
        factors(Q, 24, 40, 4, 5),
        {"r": 4, "lora_alpha": 8, "alpha_pattern": {"q_proj": 6}},
        1.5,
    ),
    "bf16": (factors(Q, 24, 40, 4, 6, torch.bfloat16), {"r": 4, "lora_alpha": 8}, 2.0),
    "fp16": (factors(Q, 24, 40, 4, 7, torch.float16), {"r": 4, "lora_alpha": 8}, 2.0),
}
"""Adapters of the projection: tensors, settings, and the scale that they mean."""


def write_all(room: Path) -> tuple[Path, list[str]]:
    base = write_base(room / "base")
    for i, (tensors, settings, _) in enumerate(KINDS.values()):
        write_adapter(room / f"a{i}", tensors, **settings)
    return base, [f"{base}+{room / f'a{i}'}" for i in range(len(KINDS))]


@pytest.mark.parametrize("method", ["linear", "task_arithmetic"])
def test_adapters_of_one_base_are_added_up_exactly(method: str, tmp_path: Path) -> None:
    base, references = write_all(tmp_path)
    weights = np.linspace(1, 2, len(references))
    models = [
        {"model": name, "parameters": {"weight": float(weight)}}
        for name, weight in zip(references, weights, strict=True)
    ]
    config: dict[str, Any] = {"merge_method": method, "models": models, "rank": 24, "dtype": "float64"}
    config["output"] = {"kind": "lora", "base": str(base)}
    if method == "task_arithmetic":
        config |= {"base_model": str(base), "parameters": {"lambda": 0.5}}
    merge(config, tmp_path / "out", progress=False)
    found = load_file(tmp_path / "out/adapter_model.safetensors")
    assert found.keys() == {f"{PREFIX}{Q}.lora_{part}.weight" for part in "AB"}
    wanted = torch.zeros(40, 24, dtype=torch.float64)
    for (tensors, _, scale), weight in zip(KINDS.values(), weights, strict=True):
        a, b = tensors[f"{Q}.lora_A.weight"].double(), tensors[f"{Q}.lora_B.weight"].double()
        wanted += (weight / weights.sum() if method == "linear" else 0.5 * weight) * scale * (b @ a)
    product = found[f"{PREFIX}{Q}.lora_B.weight"] @ found[f"{PREFIX}{Q}.lora_A.weight"]
    assert torch.linalg.norm(product - wanted) <= 1e-13 * torch.linalg.norm(wanted)
    assert verify(tmp_path / "out", against=config, sample=None, progress=False).problems == ()


def test_a_sum_that_is_cut_is_the_best_of_its_rank(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    write_adapter(tmp_path / "a", factors(Q, 24, 40, 6, 1), r=6, lora_alpha=6)
    config = extraction(f"{base}+{tmp_path / 'a'}", str(base), rank=2, energy=None, dtype="float64")
    merge(config, tmp_path / "out", progress=False)
    told = json.loads((tmp_path / "out/streammerge.json").read_text())["adapter"]["modules"][Q]
    tensors = factors(Q, 24, 40, 6, 1)
    values = torch.linalg.svdvals(
        tensors[f"{Q}.lora_B.weight"].double() @ tensors[f"{Q}.lora_A.weight"].double()
    )
    assert told["residual"] == pytest.approx(float(values[2:].norm() / values.norm()), rel=1e-12)


def test_other_modules_and_other_kinds_keep_their_meaning(tmp_path: Path) -> None:
    """An embedding, a weight stored as (in, out), and DoRA, which is no sum of products and takes the rows."""
    base = write_base(tmp_path / "base", torch.float32)
    of_c = factors(C, 24, 72, 3, 2)
    magnitude = torch.rand(40) + 0.5
    of_q = factors(Q, 24, 40, 4, 3) | {f"{Q}.lora_magnitude_vector": magnitude}
    write_adapter(
        tmp_path / "a",
        {**embedding(4, 1), **of_c},
        fan_in_fan_out=True,
        r=4,
        lora_alpha=4,
        rank_pattern={"c_attn": 3},
        alpha_pattern={"c_attn": 3},
    )
    write_adapter(tmp_path / "dora", of_q, r=4, lora_alpha=4, use_dora=True)
    weights = load_file(base / "model.safetensors")
    for name in ("a", "dora"):
        config = extraction(
            f"{base}+{tmp_path / name}", str(base), rank=24, energy=None, dtype="float64", embeddings=True
        )
        (tmp_path / "base/config.json").write_text(
            json.dumps({"model_type": "gpt2", "tie_word_embeddings": False})
        )
        merge(config, tmp_path / f"out-{name}", progress=False)
    found = load_file(tmp_path / "out-a/adapter_model.safetensors")
    table = found[f"{PREFIX}{E}.lora_embedding_B"] @ found[f"{PREFIX}{E}.lora_embedding_A"]
    own = embedding(4, 1)
    wanted = own[f"{E}.lora_embedding_B"].double() @ own[f"{E}.lora_embedding_A"].double()
    assert torch.allclose(table, wanted, atol=1e-12)
    turned = found[f"{PREFIX}{C}.lora_B.weight"] @ found[f"{PREFIX}{C}.lora_A.weight"]
    wanted = of_c[f"{C}.lora_B.weight"].double() @ of_c[f"{C}.lora_A.weight"].double()
    assert torch.allclose(turned, wanted, atol=1e-12)
    assert json.loads((tmp_path / "out-a/adapter_config.json").read_text())["fan_in_fan_out"]
    found = load_file(tmp_path / "out-dora/adapter_model.safetensors")
    product = found[f"{PREFIX}{Q}.lora_B.weight"] @ found[f"{PREFIX}{Q}.lora_A.weight"]
    weight = weights[f"{Q}.weight"]
    a, b = of_q[f"{Q}.lora_A.weight"], of_q[f"{Q}.lora_B.weight"]
    wanted = adapted(weight, a, b, 1.0, magnitude=magnitude) - weight.double()
    assert torch.linalg.norm(product - wanted) < 1e-5 * torch.linalg.norm(wanted)


def test_a_quantised_model_counts_with_its_decoded_values(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(3)
    name = "model.layers.0.mlp.up_proj.weight"
    for place in ("base", "tuned"):
        (tmp_path / place).mkdir()
        save_file({name: torch.randn(128, 128, generator=generator)}, tmp_path / place / "model.safetensors")
        (tmp_path / place / "config.json").write_text(json.dumps({"model_type": "llama"}))
    one = {"merge_method": "passthrough", "models": [{"model": str(tmp_path / "tuned")}]}
    merge({**one, "quantize": "fp8"}, tmp_path / "fp8", progress=False)
    merge(
        {"merge_method": "passthrough", "models": [{"model": str(tmp_path / "fp8")}], "dtype": "float32"},
        tmp_path / "decoded",
        progress=False,
    )
    config = extraction(str(tmp_path / "fp8"), str(tmp_path / "base"), rank=128, energy=None, dtype="float64")
    merge(config, tmp_path / "out", progress=False)
    found = load_file(tmp_path / "out/adapter_model.safetensors")
    base, decoded = (
        load_file(tmp_path / place / "model.safetensors")[name].double() for place in ("base", "decoded")
    )
    stem = PREFIX + name.removesuffix(".weight")
    assert torch.allclose(
        found[f"{stem}.lora_B.weight"] @ found[f"{stem}.lora_A.weight"], decoded - base, atol=1e-12
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_named(value: float, tmp_path: Path) -> None:
    base, tuned = (
        write_base(tmp_path / place, torch.float32, seed) for seed, place in enumerate(("base", "tuned"))
    )
    tensors = load_file(tuned / "model.safetensors")
    tensors[f"{Q}.weight"].view(-1)[77] = value
    save_file(tensors, tuned / "model.safetensors")
    config = extraction(str(tuned), str(base), rank=4, energy=None, dtype=None)
    with pytest.raises(
        InputError, match=rf"tuned/model\.safetensors: tensor {Q}\.weight holds NaN or infinity at element 77"
    ):
        merge(config, tmp_path / "out", progress=False)
