"""LoRA adapters applied as rows are read: the formula, its bits wherever a tensor is cut, and merges with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from streammerge.api import merge, verify
from streammerge.checkpoint.index import TensorIndex, open_model
from streammerge.errors import OutputError
from streammerge.io.reader import Reader
from streammerge.tensors import adapted as adapted_module
from streammerge.tensors.adapted import add_products, products_in_order
from streammerge.tensors.read import read_elements
from tests.checkpoint.adapters.scene import (
    C,
    Q,
    adapted,
    factors,
    in_order,
    scale_of,
    write_adapter,
    write_base,
)
from tests.conftest import read_tensors


def values(index: TensorIndex, name: str) -> torch.Tensor:
    reader = Reader()
    ref = index[name]
    raw = read_elements(reader, ref, 0, ref.n_elements)
    reader.close()
    return torch.from_numpy(raw.view(np.float64 if ref.dtype == "F64" else np.float32)).reshape(ref.shape)


def joined(base: Path, adapter: Path) -> TensorIndex:
    return open_model(f"{base}+{adapter}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("rank", [1, 3, 4, 8, 13])
def test_a_weight_has_the_bits_of_the_formula(tmp_path: Path, dtype: torch.dtype, rank: int) -> None:
    base = write_base(tmp_path / "base", dtype)
    parts = factors(Q, 24, 40, rank, dtype=dtype)
    adapter = write_adapter(tmp_path / "adapter", parts, r=rank, lora_alpha=5)
    a, b = parts.values()
    weight = read_tensors(base)[f"{Q}.weight"]
    found = values(joined(base, adapter), f"{Q}.weight")
    assert torch.equal(found, in_order(weight, a, b, scale_of(rank, 5)))
    exact = adapted(weight, a, b, scale_of(rank, 5))
    assert torch.allclose(found.double(), exact, rtol=1e-5, atol=1e-5)


@given(st.integers(1, 9), st.integers(1, 40), st.integers(1, 1500), st.data())
@settings(max_examples=40, deadline=None)
def test_kernel_and_formula_have_the_same_bits(
    rows: int, rank: int, columns: int, data: st.DataObject
) -> None:
    first = data.draw(st.integers(0, columns - 1))
    last = data.draw(st.integers(first + 1, columns))
    rng = np.random.default_rng(rows * 1000 + rank)
    left, right = (
        rng.standard_normal((rows, rank), np.float32),
        rng.standard_normal((rank, columns), np.float32),
    )
    ours, formula = np.empty((2, rows, last - first), np.float32)
    add_products(left, right, first, last, ours)
    products_in_order(left, right[:, first:last], formula)
    assert ours.tobytes() == formula.tobytes()


DORA = {f"{Q}.lora_magnitude_vector.weight": torch.linspace(0.5, 2, 40)}
KINDS: dict[str, tuple[dict[str, torch.Tensor], dict[str, Any], str]] = {
    "lora": (factors(Q, 24, 40, 8), {}, f"{Q}.weight"),
    "dora": ({**factors(Q, 24, 40, 8), **DORA}, {"use_dora": True}, f"{Q}.weight"),
    "stored as (in, out)": (factors(C, 24, 72, 8), {"fan_in_fan_out": True}, f"{C}.weight"),
    "dora, stored as (in, out)": (
        {**factors(C, 24, 72, 8), f"{C}.lora_magnitude_vector": torch.linspace(0.5, 2, 72)},
        {"fan_in_fan_out": True, "use_dora": True}, f"{C}.weight",
    ),
    "an embedding": (
        {"model.embed_tokens.lora_embedding_A": torch.randn(8, 48), "model.embed_tokens.lora_embedding_B": torch.randn(24, 8)},
        {}, "model.embed_tokens.weight",
    ),
    "a bias": ({**factors(Q, 24, 40, 8), f"{Q}.lora_B.bias": torch.linspace(-1, 1, 40)}, {"lora_bias": True}, f"{Q}.bias"),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_any_range_of_elements_is_that_of_the_whole(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts, entries, name = KINDS[kind]
    index = joined(write_base(tmp_path / "base"), write_adapter(tmp_path / "adapter", parts, **entries))
    ref = index[name]
    reader = Reader()
    whole = read_elements(reader, ref, 0, ref.n_elements).reshape(-1, 4)
    rng = np.random.default_rng(3)
    for block in (50, 1 << 20):  # rows cut, and not
        monkeypatch.setattr(adapted_module, "READ_BLOCK", block)
        for _ in range(30):
            start, stop = sorted(rng.choice(ref.n_elements + 1, 2, replace=False))
            part = read_elements(reader, ref, int(start), int(stop)).reshape(-1, 4)
            assert np.array_equal(part, whole[start:stop]), (kind, block, start, stop)
    reader.close()


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_what_its_paper_says(kind: str, tmp_path: Path) -> None:
    parts, entries, name = KINDS[kind]
    base = write_base(tmp_path / "base", torch.float32)
    index = joined(base, write_adapter(tmp_path / "adapter", parts, **entries))
    weight = read_tensors(base)[name]
    if kind == "a bias":
        wanted = weight.double() + 2.0 * parts[f"{Q}.lora_B.bias"].double()
    else:
        magnitude = next((t for key, t in parts.items() if "magnitude" in key), None)
        a, b = list(parts.values())[:2]
        transposed = bool(entries.get("fan_in_fan_out")) or kind == "an embedding"
        wanted = adapted(weight, a, b, 2.0, transposed=transposed, magnitude=magnitude)
    assert torch.allclose(values(index, name).double(), wanted, rtol=2e-5, atol=2e-5)


def test_ranks_and_alphas_may_differ_by_module(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", torch.float32)
    parts = {**factors(Q, 24, 40, 3), **factors("model.embed_tokens", 24, 48, 8)}
    adapter = write_adapter(
        tmp_path / "adapter",
        parts,
        rank_pattern={"q_proj": 3},
        alpha_pattern={r"^model.layers.\d.q_proj": 5},
        use_rslora=True,
    )
    index = joined(base, adapter)
    for name, rank, alpha in ((Q, 3, 5), ("model.embed_tokens", 8, 16)):
        a, b = parts[f"{name}.lora_A.weight"], parts[f"{name}.lora_B.weight"]
        scale = scale_of(rank, alpha, rank_stabilised=True)
        assert torch.equal(
            values(index, f"{name}.weight"), in_order(read_tensors(base)[f"{name}.weight"], a, b, scale)
        )


def test_whole_tensors_take_the_place_of_the_base_s(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    embedding, head = torch.randn(50, 24), torch.randn(2, 24)
    saved = {
        "model.embed_tokens.weight": embedding,
        "score.weight": head,
        "model.norm.modules_to_save.weight": torch.ones(24),
    }
    index = joined(base, write_adapter(tmp_path / "adapter", {**factors(Q, 24, 40, 8), **saved}))
    assert torch.equal(values(index, "model.embed_tokens.weight"), embedding)
    assert torch.equal(values(index, "score.weight"), head)
    assert torch.equal(values(index, "model.norm.weight"), torch.ones(24))
    assert len(index) == 6


def test_names_may_have_other_modules_around_them(tmp_path: Path) -> None:
    """As a classifier's adapter names the encoder that the checkpoint stores without it, or a language model's layers."""
    twin = {"vision.layers.0.q_proj.weight": torch.zeros(40, 24)}
    base = write_base(tmp_path / "base", **twin)
    for i, module in enumerate(("wrapper.model.layers.0.q_proj", "layers.0.model.q_proj")):
        adapter = write_adapter(tmp_path / f"adapter{i}", factors(module, 24, 40, 8))
        if i == 0:
            changed = [
                name for name, ref in joined(base, adapter).items() if ref.dtype == "F32" and "layers" in name
            ]
            assert changed[-1] == f"{Q}.weight"


def materialised(reference: str, directory: Path) -> Path:
    """Write a model with its adapter applied, in fp32: what is read must merge as this does."""
    index = open_model(reference)
    directory.mkdir()
    tensors = {}
    stored = read_tensors(index.directory)
    for name, ref in index.items():
        tensors[name] = values(index, name) if ref.dtype == "F32" else stored[name]
    save_file({name: t.contiguous() for name, t in tensors.items()}, directory / "model.safetensors")
    (directory / "config.json").write_text((index.directory / "config.json").read_text())
    return directory


@pytest.mark.parametrize("method", ["linear", "ties", "slerp", "model_stock", "karcher", "della"])
@pytest.mark.parametrize("kernels", [True, False])
def test_a_merge_is_that_of_models_written_out(method: str, kernels: bool, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    for i in range(2):
        write_adapter(
            tmp_path / f"adapter{i}",
            {**factors(Q, 24, 40, 8, seed=i), **factors("model.embed_tokens", 24, 48, 8, seed=i + 5)},
        )
    outs = []
    for out, copies in (("read", False), ("written", True)):
        references = [f"{base}+{tmp_path / f'adapter{i}'}" for i in range(2)]
        if copies:
            references = [str(materialised(r, tmp_path / f"copy{i}")) for i, r in enumerate(references)]
        models = [
            {
                "model": r,
                "alias": f"m{i}",
                "parameters": {"weight": 0.4 + 0.3 * i} if method != "slerp" else {},
            }
            for i, r in enumerate(references)
        ]
        if method in ("model_stock", "karcher"):
            models = [{"model": m["model"], "alias": m["alias"]} for m in models]
        config: dict[str, Any] = {"merge_method": method, "models": models, "seed": 3, "dtype": "bfloat16"}
        config |= {"base_model": str(base)} if method not in ("linear", "slerp", "karcher") else {}
        if method == "slerp":
            config |= {"base_model": references[0], "parameters": {"t": 0.4}}
        if method in ("ties", "della"):
            config["parameters"] = {"density": 0.5}
        merge(config, tmp_path / out, kernels=kernels)
        outs.append(tmp_path / out)
    first, second = (read_tensors(out) for out in outs)
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_the_output_keeps_the_dtype_that_the_weights_are_stored_in(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    parts = factors(Q, 24, 40, 8)
    adapter = write_adapter(tmp_path / "adapter", parts)
    merge(
        {
            "merge_method": "passthrough",
            "models": [{"model": {"model": {"path": str(base)}, "lora": {"path": str(adapter)}}}],
        },
        tmp_path / "out",
    )
    found = read_tensors(tmp_path / "out")
    assert {t.dtype for t in found.values()} == {torch.bfloat16}
    assert torch.equal(
        found[f"{Q}.weight"], in_order(read_tensors(base)[f"{Q}.weight"], *parts.values(), 2.0).bfloat16()
    )


def test_a_merge_knows_its_adapter_again(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    adapter = write_adapter(tmp_path / "adapter", factors(Q, 24, 40, 8))
    config = {
        "merge_method": "linear",
        "models": [{"model": f"{base}+{adapter}", "parameters": {"weight": 1}}],
    }
    merge(config, tmp_path / "out")
    assert not verify(tmp_path / "out", against=config, sample=None).problems
    assert merge(config, tmp_path / "out").already_complete
    entries = json.loads((adapter / "adapter_config.json").read_text()) | {"lora_alpha": 17}
    (adapter / "adapter_config.json").write_text(json.dumps(entries))
    with pytest.raises(OutputError, match="a different input"):
        merge(config, tmp_path / "out")
