"""Experts stored one by one, fused, or fused with axes exchanged, are the same tensors: merged exactly, in the first's layout."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from streammerge.api import merge, plan, verify
from streammerge.checkpoint.index import open_model
from streammerge.checkpoint.refs.blocks import BlocksRef
from streammerge.errors import ModelError
from streammerge.formats.refs import TensorRef
from streammerge.io.reader import Reader
from streammerge.planning.resolve.experts import laid_out, layout_of
from streammerge.tensors import blocks as blocks_module
from streammerge.tensors.fingerprint import fingerprint
from streammerge.tensors.read import read_elements
from tests.checkpoint.adapters import test_experts as adapted_experts
from tests.checkpoint.adapters.scene import factors, write_adapter
from tests.conftest import read_tensors, write_model

Tensors = dict[str, torch.Tensor]
N, H, I = 3, 10, 6  # noqa: E741
LAYOUTS = ["one by one", "mixtral", "fused", "flipped"]


def projections(seed: int, layers: int = 2) -> Tensors:
    """All projections, [E, out, in]."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"gate": (N, I, H), "up": (N, I, H), "down": (N, H, I)}
    return {f"{i}.{k}": torch.randn(s, generator=generator) for i in range(layers) for k, s in shapes.items()}


def stored(values: Tensors, layout: str, prefix: str = "model.", seed: int = 0) -> Tensors:
    """A model with experts in a layout."""
    generator = torch.Generator().manual_seed(seed)
    found: Tensors = {f"{prefix}embed_tokens.weight": torch.randn(16, H, generator=generator)}
    for i in range(len(values) // 3):
        stem = f"{prefix}layers.{i}.{'block_sparse_moe' if layout == 'mixtral' else 'mlp'}"
        gate, up, down = (values[f"{i}.{k}"] for k in ("gate", "up", "down"))
        found[f"{stem}.gate.weight"] = torch.randn(N, H, generator=generator)
        found[f"{prefix}layers.{i}.input_layernorm.weight"] = torch.randn(H, generator=generator)
        if layout in ("fused", "flipped"):
            both, down = torch.cat([gate, up], dim=1), down
            if layout == "flipped":
                both, down = both.transpose(1, 2), down.transpose(1, 2)
            found[f"{stem}.experts.gate_up_proj"] = both.contiguous()
            found[f"{stem}.experts.down_proj"] = down.contiguous()
            continue
        words = ("w1", "w3", "w2") if layout == "mixtral" else ("gate_proj", "up_proj", "down_proj")
        for e in range(N):
            for word, matrices in zip(words, (gate, up, down), strict=True):
                found[f"{stem}.experts.{e}.{word}.weight"] = matrices[e].clone()
    return found


def write(
    path: Path, layout: str, seed: int, dtype: torch.dtype = torch.float32, prefix: str = "model."
) -> Path:
    tensors = stored(projections(seed), layout, prefix, seed)
    write_model(path, {name: t.to(dtype) for name, t in tensors.items()})
    return path


def models(*paths: Path, **top: Any) -> dict[str, Any]:
    parameters = [{"weight": w} for w in (0.25, 0.75, 0.5)]
    listed = [{"model": str(p), "parameters": w} for p, w in zip(paths, parameters, strict=False)]
    return {
        "merge_method": "linear",
        "models": listed,
        "parameters": {"normalize": False},
        "dtype": "float32",
        **top,
    }


def assert_close(found: Tensors, wanted: Tensors) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name].double(), tensor.double(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("first", LAYOUTS)
@pytest.mark.parametrize("other", LAYOUTS)
def test_any_two_layouts_merge_into_that_of_the_first(first: str, other: str, tmp_path: Path) -> None:
    paths = [write(tmp_path / "a", first, 1), write(tmp_path / "b", other, 2)]
    merge(models(*paths), tmp_path / "out", memory="1GiB", kernels=False)
    a, b = (stored(projections(seed), first, seed=seed) for seed in (1, 2))
    assert_close(read_tensors(tmp_path / "out"), {name: 0.25 * a[name] + 0.75 * b[name] for name in a})


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A base and two fine-tunes, each in a layout of its own."""
    root = tmp_path_factory.mktemp("experts")
    return [write(root / layout, layout, i) for i, layout in enumerate(("fused", "mixtral", "flipped"))]


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "slerp", "model_stock", "dare_ties"])
def test_a_merge_is_that_of_models_in_one_layout(method: str, three: list[Path], tmp_path: Path) -> None:
    alike = []
    for i in range(3):
        tensors = stored(projections(i), "fused", seed=i)
        alike.append(write_model(tmp_path / str(i), tensors))
    found = []
    for paths, out in ((three, tmp_path / "out"), (alike, tmp_path / "alike")):
        listed: list[dict[str, Any]] = [{"model": str(p), "alias": f"m{i}"} for i, p in enumerate(paths[1:])]
        config: dict[str, Any] = {"merge_method": method, "base_model": str(paths[0]), "models": listed}
        config["parameters"] = {"density": 0.5, "weight": 0.7} if "ties" in method else {}
        if method == "slerp":
            config |= {"models": listed[:1], "parameters": {"t": 0.3}}
        merge(config, out, memory="1GiB", kernels=False)
        found.append(read_tensors(out))
        verdict = verify(out, against=config, sample=None)
        assert verdict.recomputed is not None
        assert verdict.problems == verdict.recomputed.problems == ()
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_the_bits_do_not_depend_on_how_the_work_is_cut(
    tmp_path: Path, small_capacity: Callable[[int, int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(1)
    shapes = {"gate": (N, 96, 64), "up": (N, 96, 64), "down": (N, 64, 96)}
    paths = []
    for layout in ("fused", "one by one", "flipped"):
        values = {f"0.{k}": torch.randn(s, generator=generator) for k, s in shapes.items()}
        tensors = {name: t for name, t in stored(values, layout).items() if ".experts." in name}
        paths.append(write_model(tmp_path / layout, tensors))
    config = models(*paths[1:], merge_method="ties", base_model=str(paths[0]))
    config["parameters"] = {"density": 0.5}
    merge(config, tmp_path / "whole", memory="1GiB")
    set_block(monkeypatch, 1000)
    small_capacity(600_000, 2)
    assert any(work.mode == "streamed" for work in plan(config).work)
    merge(config, tmp_path / "cut")
    a, b = (read_tensors(tmp_path / name) for name in ("whole", "cut"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def set_block(monkeypatch: pytest.MonkeyPatch, n: int) -> None:
    """Have elements that are made as they are read be made `n` at a time."""
    for module in ("checkpoint.refs.adapted", "checkpoint.refs.blocks", "tensors.adapted", "tensors.blocks"):
        monkeypatch.setattr(f"streammerge.{module}.READ_BLOCK", n)


@pytest.mark.parametrize("source", LAYOUTS)
@pytest.mark.parametrize("target", LAYOUTS)
@pytest.mark.parametrize("adapted", [False, True])
def test_any_range_of_elements_is_that_of_the_whole(
    source: str, target: str, adapted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, layout = write(tmp_path / "m", source, 3), layout_of(open_model(write(tmp_path / "t", target, 4)))
    reference = str(path)
    if adapted:
        if source not in ("one by one", "mixtral"):
            pytest.skip("adapters of fused experts are converted by another way")
        names = [n.removesuffix(".weight") for n in read_tensors(path) if ".experts.1." in n]
        shapes = {name: read_tensors(path)[f"{name}.weight"].shape for name in names}
        changes = {k: t for n in names for k, t in factors(n, shapes[n][1], shapes[n][0], 8).items()}
        modules = sorted({name.split(".")[-1] for name in names})
        reference += f"+{write_adapter(tmp_path / 'ad', changes, target_modules=modules)}"
    assert layout is not None
    index = laid_out(open_model(reference), layout)
    values = projections(3)
    reader, rng = Reader(), np.random.default_rng(1)
    own = {name: ref for name, ref in index.items() if ".experts." in name}
    assert own.keys() == {name for name in stored(values, target) if ".experts." in name}
    for name, ref in own.items():
        whole = read_elements(reader, ref, 0, ref.n_elements).view(np.float32)
        if not adapted:
            wanted = stored(values, target)[name]
            assert ref.shape == tuple(wanted.shape)
            assert np.array_equal(whole, wanted.numpy().ravel())
        set_block(monkeypatch, 7)
        monkeypatch.setattr(blocks_module, "_WORTH_READING", int(rng.integers(0, 5)))
        for _ in range(6):
            start, stop = sorted(rng.choice(ref.n_elements + 1, 2, replace=False).tolist())
            part = read_elements(reader, ref, start, stop).view(np.float32)
            assert np.array_equal(part, whole[start:stop]), (name, start, stop)
        monkeypatch.undo()
    reader.close()


def test_experts_of_several_dtypes_are_read_exactly(tmp_path: Path) -> None:
    tensors = stored(projections(1), "one by one")
    mixed = {
        name: t.to(torch.bfloat16 if "up_proj" in name else torch.float32) for name, t in tensors.items()
    }
    write_model(tmp_path / "mixed", mixed)
    layout = layout_of(open_model(write(tmp_path / "fused", "fused", 2)))
    assert layout is not None
    ref = laid_out(open_model(tmp_path / "mixed"), layout)["model.layers.0.mlp.experts.gate_up_proj"]
    reader = Reader()
    found = read_elements(reader, ref, 0, ref.n_elements).view(np.float32)
    reader.close()
    gate, up = (
        torch.stack([mixed[f"model.layers.0.mlp.experts.{e}.{k}.weight"].float() for e in range(N)])
        for k in ("gate_proj", "up_proj")
    )
    assert ref.dtype == "F32"
    assert np.array_equal(found, torch.cat([gate, up], 1).numpy().ravel())


def test_a_matrix_that_lies_in_one_piece_is_a_part_of_the_file_and_read_as_fast(tmp_path: Path) -> None:
    layout = layout_of(open_model(write(tmp_path / "a", "one by one", 1)))
    assert layout is not None
    fused = laid_out(open_model(write(tmp_path / "b", "fused", 2)), layout)
    flipped = laid_out(open_model(write(tmp_path / "c", "flipped", 2)), layout)
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    assert isinstance(fused[name], TensorRef)
    assert isinstance(flipped[name], BlocksRef)


def test_a_prefix_and_a_layout_may_differ_together(tmp_path: Path) -> None:
    paths = [
        write(tmp_path / "a", "flipped", 1, prefix="model.language_model."),
        write(tmp_path / "b", "mixtral", 2),
    ]
    merge(models(*paths), tmp_path / "out", memory="1GiB", kernels=False)
    a, b = (stored(projections(seed), "flipped", "model.language_model.", seed) for seed in (1, 2))
    assert_close(read_tensors(tmp_path / "out"), {name: 0.25 * a[name] + 0.75 * b[name] for name in a})


def test_fused_experts_with_an_adapter_are_taken_apart_with_it(tmp_path: Path) -> None:
    base = adapted_experts.write(tmp_path / "base", adapted_experts.FUSED)
    changes = adapted_experts.adapter_of(adapted_experts.GATE_UP, adapted_experts.DOWN)
    adapter = adapted_experts.of_rank(tmp_path / "adapter", changes)
    names = ("gate_proj", "up_proj", "down_proj")
    single = adapted_experts.one_by_one(adapted_experts.FUSED, adapted_experts.MODULE, names)
    layout = layout_of(open_model(adapted_experts.write(tmp_path / "single", single)))
    assert layout is not None
    whole = open_model(f"{base}+{adapter}")
    apart = laid_out(whole, layout)
    wanted = {name: adapted_experts.values(whole, name) for name in whole}
    for name, tensor in adapted_experts.one_by_one(wanted, adapted_experts.MODULE, names).items():
        assert torch.equal(adapted_experts.values(apart, name), tensor)


def test_layers_of_two_layouts_are_stacked(tmp_path: Path) -> None:
    paths = [write(tmp_path / "a", "fused", 1), write(tmp_path / "b", "one by one", 2)]
    slices = [{"sources": [{"model": str(p), "layer_range": [i, i + 1]}]} for i, p in enumerate(paths)]
    merge({"merge_method": "passthrough", "slices": slices}, tmp_path / "out", memory="1GiB", kernels=False)
    found, b = read_tensors(tmp_path / "out"), stored(projections(2), "fused", seed=2)
    name = "model.layers.1.mlp.experts.gate_up_proj"
    assert torch.equal(found[name], b[name])


def test_a_model_is_known_by_what_it_stores_whatever_it_is_merged_with(three: list[Path]) -> None:
    """Diagonals are recorded with it."""
    reader = Reader()
    decided = plan(models(*three), memory="1GiB")
    alone = [fingerprint(open_model(path), reader) for path in three]
    assert [fingerprint(index, reader) for index in decided.inputs] == alone
    reader.close()


def test_the_note_says_how_experts_are_read(three: list[Path]) -> None:
    notes = [line for line in plan(models(*three), memory="1GiB").warnings if "experts are converted" in line]
    assert len(notes) == 2
    assert notes[0].endswith("stored fused")


def test_routers_of_two_names_are_matched_where_their_shapes_tell_them(tmp_path: Path) -> None:
    a, b = stored(projections(1), "one by one", seed=1), stored(projections(2), "fused", seed=2)
    b = {name.replace(".mlp.gate.", ".mlp.router."): t for name, t in b.items()}
    paths = [write_model(tmp_path / n, t) for n, t in (("a", a), ("b", b))]
    merge(models(*paths), tmp_path / "out", memory="1GiB", kernels=False)
    name = "model.layers.1.mlp.gate.weight"
    wanted = 0.25 * a[name] + 0.75 * b[name.replace("gate", "router")]
    torch.testing.assert_close(read_tensors(tmp_path / "out")[name], wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("change", ["one fewer", "another number of rows", "no gate", "a bias"])
def test_experts_that_are_not_complete_are_not_converted(change: str, tmp_path: Path) -> None:
    tensors = stored(projections(2), "one by one", seed=2)
    stem = "model.layers.0.mlp.experts.1."
    if change == "one fewer":
        tensors = {name: t for name, t in tensors.items() if not name.startswith(stem)}
    elif change == "another number of rows":
        tensors[f"{stem}up_proj.weight"] = torch.ones(I + 1, H)
    elif change == "no gate":
        tensors.pop(f"{stem}gate_proj.weight")
    else:
        tensors[f"{stem}bias_proj.weight"] = torch.ones(I, H)
    paths = [write(tmp_path / "a", "fused", 1), write_model(tmp_path / "b", tensors)]
    with pytest.raises(ModelError, match=r"b: tensor model.layers.0.mlp.experts.\w+ and 1 more are missing"):
        plan(models(*paths), memory="1GiB")


ARCHITECTURES: list[tuple[str, dict[str, Any]]] = [
    ("mixtral", {"num_local_experts": 4}),
    ("qwen2_moe", {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 24}),
    ("qwen3_moe", {"num_experts": 4, "moe_intermediate_size": 16}),
    ("phimoe", {"num_local_experts": 4}),
    ("deepseek_v3", {"n_routed_experts": 4, "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1,
                     "first_k_dense_replace": 1, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4,
                     "qk_nope_head_dim": 4, "v_head_dim": 8}),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "sizes"), ARCHITECTURES, ids=[a[0] for a in ARCHITECTURES])
def test_what_transformers_saves_in_two_layouts_loads_as_their_mean(
    kind: str, sizes: dict[str, Any], tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    if int(transformers.__version__.split(".")[0]) < 5:
        pytest.skip("transformers 5 stores experts fused")
    common = {
        "vocab_size": 48,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 32,
        "num_experts_per_tok": 2,
    }
    config = transformers.AutoConfig.for_model(kind, **{**common, **sizes})
    parameters = []
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.save_pretrained(tmp_path / name, save_original_format=name == "a")
        parameters.append({k: v.detach().clone() for k, v in model.named_parameters()})
    for first, second in ("ab", "ba"):
        out = tmp_path / f"out-{first}"
        merge(models(tmp_path / first, tmp_path / second), out, memory="1GiB", kernels=False)
        model, info = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        a, b = parameters if first == "a" else parameters[::-1]
        assert_close(
            {k: v.detach() for k, v in model.named_parameters()},
            {k: 0.25 * v + 0.75 * b[k] for k, v in a.items()},
        )
        assert json.loads((out / "config.json").read_text())["model_type"] == kind


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_experts_whose_gate_and_up_rows_take_turns_are_refused_beside_others(
    tmp_path: Path, layout: str, first: int
) -> None:
    a = write(tmp_path / "a", layout, 1)
    turns = stored(projections(2), "flipped", seed=2)
    for i in range(2):
        turns[f"model.layers.{i}.mlp.experts.gate_up_proj_bias"] = torch.zeros(N, 2 * I)
        turns[f"model.layers.{i}.mlp.experts.down_proj_bias"] = torch.zeros(N, H)
    write_model(tmp_path / "b", turns)
    both = [a, tmp_path / "b"]
    with pytest.raises(ModelError, match="interleaved rows"):
        plan(models(both[first], both[1 - first]))


def test_another_number_of_experts_is_told_as_such(tmp_path: Path) -> None:
    """A router of another size is no vocabulary, and experts that one model lacks are not left out."""
    a, b = write(tmp_path / "a", "one by one", 1), stored(projections(2), "one by one", seed=2)
    for i in range(2):
        stem = f"model.layers.{i}.mlp"
        b[f"{stem}.gate.weight"] = torch.ones(N + 1, H)
        b |= {
            name.replace(".experts.0.", f".experts.{N}."): tensor.clone()
            for name, tensor in b.items()
            if f"{stem}.experts.0." in name
        }
    write_model(tmp_path / "b", b)
    for both in ((a, tmp_path / "b"), (tmp_path / "b", a)):
        with pytest.raises(ModelError, match=r"has [34] experts per layer, .* [34]: "):
            plan(models(*both))
    plan(models(a, tmp_path / "b", exclude=[r"\.experts\.", r"\.gate\."]))
