"""Adapters of experts (`target_parameters`), whichever way the base stores them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from streammerge.api import merge, verify
from streammerge.checkpoint.index import TensorIndex, open_model
from streammerge.errors import ModelError
from streammerge.io.reader import Reader
from streammerge.tensors import adapted as adapted_module
from streammerge.tensors.read import read_elements
from tests.checkpoint.adapters.scene import Tensors, write_adapter
from tests.conftest import read_tensors

E, HIDDEN, INNER, RANK = 5, 6, 4, 2
MODULE = "model.layers.0.mlp.experts"
BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def change(a: torch.Tensor, b: torch.Tensor, *, turned: bool = False) -> torch.Tensor:
    """Return B A of each expert as PEFT stacks them, in fp64; turned: of experts stored as [in, out]."""
    a, b = a.double().reshape(E, -1, a.shape[1]), b.double().reshape(b.shape[0], -1, E)
    return torch.einsum("o r e, e r i -> e i o" if turned else "o r e, e r i -> e o i", b, a)


def factors(inputs: int, outputs: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    return normal(seed, RANK * E, inputs), normal(seed + 1, outputs, RANK * E)


def adapter_of(
    gate_up: tuple[torch.Tensor, torch.Tensor], down: tuple[torch.Tensor, torch.Tensor], module: str = MODULE
) -> dict[str, torch.Tensor]:
    """As PEFT nests them: the parameter that is declared last is the outermost."""
    inner, outer = f"{module}.base_layer", module
    return {
        f"{inner}.lora_A.weight": gate_up[0],
        f"{inner}.lora_B.weight": gate_up[1],
        f"{outer}.lora_A.weight": down[0],
        f"{outer}.lora_B.weight": down[1],
    }


GATE_UP, DOWN = factors(HIDDEN, 2 * INNER, 1), factors(INNER, HIDDEN, 3)
FUSED = {
    f"{MODULE}.gate_up_proj": normal(5, E, 2 * INNER, HIDDEN),
    f"{MODULE}.down_proj": normal(6, E, HIDDEN, INNER),
}


def one_by_one(tensors: Tensors, module: str, names: tuple[str, str, str]) -> dict[str, torch.Tensor]:
    """Return fused experts as files store them one by one."""
    gate, up, down = names
    gate_up, whole_down = (tensors[f"{MODULE}.{leaf}"] for leaf in ("gate_up_proj", "down_proj"))
    found = {}
    for e in range(E):
        found[f"{module}.{e}.{gate}.weight"] = gate_up[e, :INNER]
        found[f"{module}.{e}.{up}.weight"] = gate_up[e, INNER:]
        found[f"{module}.{e}.{down}.weight"] = whole_down[e]
    return found


def write(directory: Path, tensors: Tensors, **config: Any) -> Path:
    directory.mkdir()
    save_file({name: t.contiguous() for name, t in tensors.items()}, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps({"model_type": "qwen3_moe", **config}))
    return directory


def values(index: TensorIndex, name: str) -> torch.Tensor:
    reader = Reader()
    raw = read_elements(reader, index[name], 0, index[name].n_elements)
    reader.close()
    dtype = torch.bfloat16 if index[name].dtype == "BF16" else torch.float32
    return torch.from_numpy(raw).view(dtype).reshape(index[name].shape)


WANTED = {
    f"{MODULE}.gate_up_proj": FUSED[f"{MODULE}.gate_up_proj"].double() + 2 * change(*GATE_UP),
    f"{MODULE}.down_proj": FUSED[f"{MODULE}.down_proj"].double() + 2 * change(*DOWN),
}


def of_rank(directory: Path, tensors: Tensors, **settings: Any) -> Path:
    return write_adapter(
        directory,
        tensors,
        **{"r": RANK, "lora_alpha": 4, "target_parameters": BOTH, "peft_version": "0.21.2"} | settings,
    )


@pytest.mark.parametrize("layout", ["fused", "gate_proj", "w1", "another module"])
def test_each_expert_gets_its_own_change_however_the_base_stores_it(layout: str, tmp_path: Path) -> None:
    module, names = {
        "fused": (MODULE, None),
        "gate_proj": (MODULE, ("gate_proj", "up_proj", "down_proj")),
        "w1": ("model.layers.0.block_sparse_moe.experts", ("w1", "w3", "w2")),
        "another module": (
            "model.language_model.layers.0.mlp.experts",
            ("gate_proj", "up_proj", "down_proj"),
        ),
    }[layout]
    base = write(tmp_path / "base", FUSED if names is None else one_by_one(FUSED, module, names))
    wanted = WANTED if names is None else one_by_one(WANTED, module, names)
    index = open_model(f"{base}+{of_rank(tmp_path / 'adapter', adapter_of(GATE_UP, DOWN))}")
    assert set(index) == set(wanted)
    for name, tensor in wanted.items():
        assert torch.allclose(values(index, name).double(), tensor, rtol=2e-6, atol=2e-6), name


def test_experts_stored_as_in_and_out_are_changed_as_such(tmp_path: Path) -> None:
    turned = {name: t.transpose(1, 2).contiguous() for name, t in FUSED.items()}
    base = write(tmp_path / "base", turned, model_type="gpt_oss")
    index = open_model(f"{base}+{of_rank(tmp_path / 'adapter', adapter_of(GATE_UP, DOWN))}")
    for name, tensor in WANTED.items():
        assert torch.allclose(values(index, name).double(), tensor.transpose(1, 2), rtol=2e-6, atol=2e-6), (
            name
        )


@pytest.mark.parametrize(
    ("version", "model_type", "turned"),
    [
        ("0.21.2", "qwen3_moe", False),
        ("0.21.2", "gpt_oss", True),
        ("0.18.0", "qwen3_moe", True),
        (None, "qwen3_moe", True),
    ],
)
def test_square_experts_are_taken_as_that_version_of_peft_took_them(
    version: str | None, model_type: str, turned: bool, tmp_path: Path
) -> None:
    pair = factors(HIDDEN, HIDDEN, 7)
    base = write(
        tmp_path / "base", {f"{MODULE}.down_proj": normal(9, E, HIDDEN, HIDDEN)}, model_type=model_type
    )
    parts = {f"{MODULE}.lora_A.weight": pair[0], f"{MODULE}.lora_B.weight": pair[1]}
    adapter = of_rank(tmp_path / "adapter", parts, target_parameters=["down_proj"], peft_version=version)
    wanted = normal(9, E, HIDDEN, HIDDEN).double() + 2 * change(*pair, turned=turned)
    found = values(open_model(f"{base}+{adapter}"), f"{MODULE}.down_proj")
    assert torch.allclose(found.double(), wanted, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("stored", ["fused", "one by one", "adapted one by one"])
def test_any_range_of_elements_of_experts_is_that_of_the_whole(
    stored: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("gate_proj", "up_proj", "down_proj")
    base = write(tmp_path / "base", one_by_one(FUSED, MODULE, names) if stored == "one by one" else FUSED)
    parts = adapter_of(GATE_UP, DOWN)
    if stored == "adapted one by one":
        parts = {
            f"{MODULE}.2.up_proj.lora_A.weight": normal(1, RANK, HIDDEN),
            f"{MODULE}.2.up_proj.lora_B.weight": normal(2, INNER, RANK),
        }
    index = open_model(f"{base}+{of_rank(tmp_path / 'adapter', parts)}")
    reader, rng = Reader(), np.random.default_rng(1)
    for name in sorted(index)[:4]:
        ref = index[name]
        monkeypatch.setattr(adapted_module, "READ_BLOCK", 1 << 20)
        whole = read_elements(reader, ref, 0, ref.n_elements).reshape(-1, 4)
        for block in (5, 13, 1 << 20):  # rows cut, blocks within an expert, all at once
            monkeypatch.setattr(adapted_module, "READ_BLOCK", block)
            for _ in range(20):
                start, stop = sorted(rng.choice(ref.n_elements + 1, 2, replace=False))
                part = read_elements(reader, ref, int(start), int(stop)).reshape(-1, 4)
                assert np.array_equal(part, whole[start:stop]), (name, block, start, stop)
    reader.close()


def test_a_merge_of_experts_is_verified_against_its_inputs(tmp_path: Path) -> None:
    base = write(tmp_path / "base", {name: t.bfloat16() for name, t in FUSED.items()})
    adapter = of_rank(tmp_path / "adapter", adapter_of(GATE_UP, DOWN))
    config = {"merge_method": "passthrough", "models": [{"model": f"{base}+{adapter}"}]}
    merge(config, tmp_path / "out")
    assert not verify(tmp_path / "out", against=config, sample=None).problems
    found = read_tensors(tmp_path / "out")
    for name, tensor in WANTED.items():
        assert torch.allclose(found[name].double(), tensor, rtol=1e-2, atol=2e-2), name


def test_a_base_with_fewer_experts_is_refused(tmp_path: Path) -> None:
    few = {
        name: t
        for name, t in one_by_one(FUSED, MODULE, ("gate_proj", "up_proj", "down_proj")).items()
        if ".4." not in name
    }
    base = write(tmp_path / "base", few)
    with pytest.raises(
        ModelError,
        match=r"fit the parameters down_proj, gate_up_proj in no way: another base model's adapter",
    ):
        open_model(f"{base}+{of_rank(tmp_path / 'adapter', adapter_of(GATE_UP, DOWN))}")


def test_patterns_of_ranks_name_the_parameter(tmp_path: Path) -> None:
    base = write(tmp_path / "base", FUSED)
    adapter = of_rank(
        tmp_path / "adapter",
        adapter_of(GATE_UP, DOWN),
        r=7,
        rank_pattern={".*experts.gate_up_proj": RANK, "down_proj": RANK},
        alpha_pattern={"experts.gate_up_proj": 2},
    )
    index = open_model(f"{base}+{adapter}")
    name = f"{MODULE}.gate_up_proj"
    assert torch.allclose(
        values(index, name).double(), FUSED[name].double() + change(*GATE_UP), rtol=2e-6, atol=2e-6
    )


@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize("words", [("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2")])
def test_adapters_of_single_experts_change_their_slices_of_a_fused_base(
    words: tuple[str, str, str], flipped: bool, tmp_path: Path
) -> None:
    """Experts 1 and 3 of five, the one without its up projection."""
    base = {name: t.transpose(1, 2).contiguous() if flipped else t for name, t in FUSED.items()}
    gate, up, down = words
    parts: dict[str, torch.Tensor] = {}
    wanted = {name: t.double().clone() for name, t in FUSED.items()}
    for e, word, leaf, rows in (
        (1, gate, "gate_up_proj", slice(0, INNER)),
        (3, gate, "gate_up_proj", slice(0, INNER)),
        (3, up, "gate_up_proj", slice(INNER, 2 * INNER)),
        (1, down, "down_proj", slice(0, HIDDEN)),
    ):
        inputs, outputs = (INNER, HIDDEN) if leaf == "down_proj" else (HIDDEN, INNER)
        a, b = normal(e, RANK, inputs), normal(e + 7, outputs, RANK)
        module = f"model.layers.0.block_sparse_moe.experts.{e}.{word}"
        parts |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
        wanted[f"{MODULE}.{leaf}"][e, rows] += 2 * b.double() @ a.double()
    adapter = of_rank(tmp_path / "adapter", parts, target_parameters=None)
    index = open_model(f"{write(tmp_path / 'base', base)}+{adapter}")
    for name, tensor in wanted.items():
        whole = values(index, name)
        assert torch.allclose(
            (whole.transpose(1, 2) if flipped else whole).double(), tensor, rtol=2e-6, atol=2e-6
        ), name
        untouched = index[name].shape[1] * index[name].shape[2]  # expert 0
        assert torch.equal(whole.flatten()[:untouched], base[name].flatten()[:untouched])


def test_an_expert_that_a_fused_base_has_not_is_refused(tmp_path: Path) -> None:
    module = f"{MODULE}.5.gate_proj"
    parts = {
        f"{module}.lora_A.weight": normal(1, RANK, HIDDEN),
        f"{module}.lora_B.weight": normal(2, INNER, RANK),
    }
    adapter = of_rank(tmp_path / "adapter", parts)
    with pytest.raises(ModelError, match=r"do not fit it: .* holds all experts of the base"):
        open_model(f"{write(tmp_path / 'base', FUSED)}+{adapter}")


@pytest.mark.parametrize("method", ["linear", "ties"])
def test_a_merge_is_that_of_models_written_out(method: str, tmp_path: Path) -> None:
    """Experts stored one by one, fused, and adapted one by one, with trained tokens."""
    embedding = {"model.embed_tokens.weight": normal(11, 9, HIDDEN)}
    base = write(tmp_path / "base", {name: t.bfloat16() for name, t in {**FUSED, **embedding}.items()})
    rows = {"model.embed_tokens.token_adapter.trainable_tokens_delta": normal(12, 2, HIDDEN)}
    one = {
        f"{MODULE}.2.up_proj.lora_A.weight": normal(1, RANK, HIDDEN),
        f"{MODULE}.2.up_proj.lora_B.weight": normal(2, INNER, RANK),
    }
    of_rank(tmp_path / "a0", {**adapter_of(GATE_UP, DOWN), **rows}, trainable_token_indices=[8, 3])
    of_rank(tmp_path / "a1", {**one, **rows}, trainable_token_indices=[1, 0])
    outs = []
    for written in (False, True):
        references = [f"{base}+{tmp_path / name}" for name in ("a0", "a1")]
        if written:
            for i, reference in enumerate(references):
                tensors = {name: values(open_model(reference), name) for name in open_model(reference)}
                references[i] = str(write(tmp_path / f"copy{i}", tensors))
        models = [
            {"model": r, "alias": f"m{i}", "parameters": {"weight": 0.4 + 0.3 * i}}
            for i, r in enumerate(references)
        ]
        config: dict[str, Any] = {"merge_method": method, "models": models, "dtype": "bfloat16"}
        if method == "ties":
            config |= {"base_model": str(base), "parameters": {"density": 0.5}}
        merge(config, tmp_path / f"out{written}", memory="300MiB" if written else "1GiB")
        outs.append(read_tensors(tmp_path / f"out{written}"))
    assert outs[0].keys() == outs[1].keys()
    for name, tensor in outs[0].items():
        assert torch.equal(tensor, outs[1][name]), name
