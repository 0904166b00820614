"""FP8 with scales: every code, every layout of scales, every cut, against a float64 decoder of the tests' own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from streammerge import merge, merge_state_dicts, plan
from streammerge.checkpoint.index import open_model
from streammerge.errors import ModelError
from streammerge.io.reader import Reader
from streammerge.numerics import elements
from streammerge.tensors.read import read_elements
from tests.checkpoint.quantized.decoder import FLOAT8, cuts, e8m0_values, float8_values, spread

FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}


def write(
    path: Path, tensors: Mapping[str, torch.Tensor], quantization: dict[str, Any] | None = FP8, **config: Any
) -> Path:
    path.mkdir(parents=True)
    save_file(dict(tensors), path / "model.safetensors", metadata={"format": "pt"})
    entry = {} if quantization is None else {"quantization_config": quantization}
    (path / "config.json").write_text(json.dumps({"model_type": "llama", **entry, **config}))
    return path


def codes(shape: tuple[int, ...], seed: int, dtype: str = "F8_E4M3") -> torch.Tensor:
    """Return all finite codes, in no order."""
    raw = np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)
    raw[~np.isfinite(float8_values(raw, dtype))] = 0x3B
    return torch.from_numpy(raw).view(FLOAT8[dtype])


def scales(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.rand(shape, generator=torch.Generator().manual_seed(seed)) + 0.01).to(dtype)


def decoded(weight: torch.Tensor, scale: torch.Tensor, block: tuple[int, ...]) -> NDArray[np.float64]:
    name = next(name for name, dtype in FLOAT8.items() if dtype == weight.dtype)
    if scale.dtype == torch.float8_e8m0fnu:
        factors = e8m0_values(scale.view(torch.uint8).numpy())
    else:
        factors = scale.double().numpy()
    values = float8_values(weight.view(torch.uint8).numpy(), name)
    return values * spread(factors, values.shape, block)


def read(path: Path, name: str, start: int = 0, stop: int | None = None) -> NDArray[np.float32]:
    ref = open_model(path)[name]
    reader = Reader()
    found = read_elements(reader, ref, start, ref.n_elements if stop is None else stop)
    reader.close()
    return found.view(np.float32)


E8M0 = torch.float8_e8m0fnu
LAYOUTS = [
    ("blocks", "w.weight", (200, 300), "w.weight_scale_inv", (2, 3), torch.float32, (128, 128), FP8),
    ("bf16 scales", "w.weight", (130, 128), "w.weight_scale_inv", (2, 1), torch.bfloat16, (128, 128), FP8),
    ("fp16 scales", "w.weight", (64, 70), "w.weight_scale", (1, 1), torch.float16, (128, 128), FP8),
    ("small blocks", "w.weight", (7, 10), "w.weight_scale_inv", (3, 3), torch.float32, (3, 4),
     {**FP8, "weight_block_size": [3, 4]}),
    ("a name alone", "w.weight", (130, 300), "w.weight_scale_inv", (2, 3), torch.float32, (128, 128), None),
    ("rows", "w.weight", (5, 33), "w.weight_scale", (5, 1), torch.float32, (1, 33), {"quant_method": "fbgemm_fp8"}),
    ("rows, flat", "w.weight", (5, 33), "w.weight_scale", (5,), torch.float32, (1,), None),
    ("groups", "w.weight", (5, 96), "w.weight_scale", (5, 3), torch.bfloat16, (1, 32), None),
    ("a tensor", "w.weight", (5, 33), "w.weight_scale", (), torch.float32, (), {"quant_method": "fp8"}),
    ("a tensor, [1]", "w.weight", (200, 33), "w.weight_scale_inv", (1,), torch.float32, (200,), FP8),
    ("experts", "e.gate_up_proj", (3, 130, 40), "e.gate_up_proj_scale_inv", (3, 2, 1), torch.float32, (1, 128, 128), FP8),
    ("a scale an expert", "e.down_proj", (3, 40, 65), "e.down_proj_scale_inv", (3, 1, 1), torch.float32, (1, 40, 65), FP8),
    ("experts by columns", "e.gate_up_proj", (2, 9, 34), "e.gate_up_proj_scale", (2, 1, 34), torch.float32, (1, 9, 1),
     {"quant_method": "fbgemm_fp8"}),
]  # fmt: skip


@pytest.mark.parametrize("dtype", FLOAT8)
@pytest.mark.parametrize("layout", LAYOUTS, ids=[layout[0] for layout in LAYOUTS])
def test_values_are_those_of_a_float64_decoder_however_they_are_cut(
    tmp_path: Path, layout: Any, dtype: str
) -> None:
    _, name, shape, scale_name, scale_shape, scale_dtype, block, declared = layout
    weight, scale = codes(shape, 1, dtype), scales(scale_shape, 2, scale_dtype)
    path = write(tmp_path / "m", {name: weight, scale_name: scale}, declared)
    index = open_model(path)
    assert list(index) == [name]
    assert (index[name].shape, index[name].dtype, index[name].stored_dtype) == (shape, "F32", "BF16")
    factors = scale.reshape(*scale_shape, *(1 for _ in range(len(shape) - len(scale_shape))))
    extent = (*block, *shape[len(block) :]) if scale_shape else shape
    want = decoded(weight, factors, extent).astype(np.float32).reshape(-1)
    for start, stop in cuts(want.size):
        assert np.array_equal(read(path, name, start, stop).view(np.uint32), want[start:stop].view(np.uint32))


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("dtype", FLOAT8)
def test_every_code_times_every_exponent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, compiled: bool
) -> None:
    monkeypatch.setattr(elements, "is_compiled", lambda name: compiled)
    weight = torch.arange(256, dtype=torch.uint8).repeat(255, 1).view(FLOAT8[dtype])
    scale = torch.arange(255, dtype=torch.uint8).view(E8M0).reshape(255, 1)
    path = write(tmp_path / "m", {"w.weight": weight, "w.weight_scale_inv": scale}, None)
    with np.errstate(over="ignore"):
        want = decoded(weight, scale, (1, 256)).astype(np.float32)
    found = read(path, "w.weight").reshape(255, 256)
    assert np.array_equal(np.isnan(found), np.isnan(want))
    known = ~np.isnan(want)
    assert np.array_equal(found[known].view(np.uint32), want[known].view(np.uint32))


def test_a_scale_of_zero_means_zeros_and_others_are_refused_where_they_lie(tmp_path: Path) -> None:
    weight = codes((200, 140), 1)
    for place, (value, shown) in enumerate(
        [(0.0, ""), (float("nan"), "nan"), (float("inf"), "inf"), (-1.0, "-1")]
    ):
        scale = scales((2, 2), 2)
        scale[1, 0] = value
        path = write(tmp_path / str(place), {"w.weight": weight, "w.weight_scale_inv": scale})
        if not shown:
            found = read(path, "w.weight").reshape(200, 140)
            assert not found[128:, :128].any()
            assert found[:128, :128].any()
            continue
        with pytest.raises(ModelError, match=rf"w\.weight_scale_inv': scale 2 is {shown}, which no scale"):
            merge(linear(path, path), tmp_path / f"out-{place}")
    path = write(
        tmp_path / "e",
        {"w.weight": weight, "w.weight_scale_inv": torch.full((2, 2), 255, dtype=torch.uint8).view(E8M0)},
    )
    with pytest.raises(ModelError, match="scale 0 is nan"):
        read(path, "w.weight")


def linear(*paths: Path, **more: Any) -> dict[str, Any]:
    models = [{"model": str(path), "parameters": {"weight": 0.4}} for path in paths]
    return {"merge_method": "linear", "models": models, **more}


BAD = [
    ((2, 2), torch.float32, FP8, r"has shape \[2, 2\], which does not fit the \[200, 300\] of its codes by blocks of 128 x 128"),
    ((200, 7), torch.float32, None, "does not fit"),
    ((2, 3), torch.int32, FP8, "is I32, where scales are one of"),
    ((2, 3), torch.uint8, FP8, "is U8, where scales are one of"),
]  # fmt: skip


@pytest.mark.parametrize(("shape", "dtype", "declared", "said"), BAD)
def test_scales_that_do_not_fit_are_refused(
    tmp_path: Path, shape: tuple[int, ...], dtype: torch.dtype, declared: Any, said: str
) -> None:
    tensors = {"w.weight": codes((200, 300), 1), "w.weight_scale": torch.ones(shape).to(dtype)}
    path = write(tmp_path / "m", tensors, declared)
    with pytest.raises(ModelError, match=said):
        plan(linear(path, path))


def test_two_scales_and_a_code_without_one_are_refused(tmp_path: Path) -> None:
    one = {"w.weight": codes((4, 4), 1), "w.weight_scale": torch.ones(1), "w.weight_scale_inv": torch.ones(1)}
    with pytest.raises(ModelError, match=r"'w\.weight' has two scales, 'w\.weight_scale_inv' and"):
        open_model(write(tmp_path / "two", one))
    lone = {**one, "v.weight": codes((4, 4), 1)}
    lone.pop("w.weight_scale")
    path = write(tmp_path / "lone", lone)
    with pytest.raises(ModelError, match=r"v\.weight holds F8_E4M3 codes without a scale"):
        plan(linear(path, path))


def test_one_weight_without_a_scale_among_others_that_have_some_is_no_plain_float(tmp_path: Path) -> None:
    """Nothing declares FP8 here: the scales of the other weights say that it is codes."""
    tensors = {f"{name}.weight": codes((4, 4), 1) for name in "vw"}
    path = write(tmp_path / "lone", {**tensors, "w.weight_scale": torch.ones(1)}, None)
    with pytest.raises(ModelError, match=r"v\.weight holds F8_E4M3 codes without a scale"):
        plan(linear(path, path))


@pytest.mark.parametrize(
    "parts", [("text_config",), ("thinker_config", "text_config"), ("llm_cfg",), ("decoder",)]
)
def test_a_declaration_within_any_part_of_the_settings_is_left_out(
    tmp_path: Path, parts: tuple[str, ...]
) -> None:
    nested: dict[str, Any] = {"quantization_config": FP8, "dtype": "float8_e4m3fn"}
    for part in reversed(parts):
        nested = {part: nested}
    tensors = {"w.weight": codes((4, 4), 1), "w.weight_scale": torch.ones(1)}
    path = write(tmp_path / "m", tensors, None, **nested)
    merge(linear(path, path), tmp_path / "out")
    found = json.loads((tmp_path / "out/config.json").read_text())
    for part in parts:
        found = found[part]
    assert found == {"dtype": "bfloat16"}


def model(path: Path, seed: int, quantised: bool) -> dict[str, torch.Tensor]:
    """Write a model, and return its weights by value."""
    weight, scale = codes((144, 260), seed), scales((2, 3), seed)
    values = torch.from_numpy(decoded(weight, scale, (128, 128)).astype(np.float32))
    norm = scales((260,), seed + 9, torch.bfloat16)
    tensors = {"m.layers.0.q_proj.weight": weight, "m.norm.weight": norm}
    extra = {"m.layers.0.q_proj.weight_scale_inv": scale, "m.layers.0.q_proj.input_scale": torch.ones(1)}
    plain = {"m.layers.0.q_proj.weight": values, "m.norm.weight": norm}
    write(path, {**tensors, **extra} if quantised else plain, FP8 if quantised else None, expert_dtype="fp8",
          text_config={"quantization_config": FP8, "hidden_size": 260})  # fmt: skip
    return plain


@pytest.mark.parametrize("method", ["linear", "ties", "slerp", "dare_ties", "passthrough"])
def test_a_merge_is_that_of_the_dequantised_models(tmp_path: Path, method: str) -> None:
    for name, seed, quantised in (("a", 1, True), ("b", 2, False), ("c", 3, True)):
        model(tmp_path / name, seed, quantised)
        model(tmp_path / f"plain-{name}", seed, False)

    def run(prefix: str) -> dict[str, torch.Tensor]:
        others = {"slerp": ["b"], "passthrough": ["a"]}.get(method, ["b", "c"])
        models: list[dict[str, Any]] = [{"model": str(tmp_path / f"{prefix}{name}")} for name in others]
        parameters = {"t": 0.3} if method == "slerp" else {} if method == "passthrough" else {"weight": 0.6}
        config: dict[str, Any] = {
            "merge_method": method,
            "models": models,
            "parameters": parameters,
            "dtype": "float32",
        }
        if method not in ("linear", "passthrough"):
            config["base_model"] = str(tmp_path / f"{prefix}a")
        merge(config, tmp_path / f"out-{prefix}", seed=5)
        return load_file(tmp_path / f"out-{prefix}" / "model.safetensors")

    found, want = run(""), run("plain-")
    assert found.keys() == want.keys() == {"m.layers.0.q_proj.weight", "m.norm.weight"}
    for name in want:
        assert torch.equal(found[name].view(torch.int32), want[name].view(torch.int32))
    config = json.loads((tmp_path / "out-" / "config.json").read_text())
    assert "quanti" not in json.dumps(config)
    assert "expert_dtype" not in config


def test_an_output_is_bfloat16_where_the_first_model_is_quantised(tmp_path: Path) -> None:
    for name, quantised in (("a", True), ("b", False)):
        model(tmp_path / name, 1, quantised)
    weight = "m.layers.0.q_proj.weight"
    for order, dtype in ((("a", "b"), torch.bfloat16), (("b", "a"), torch.float32)):
        out = tmp_path / "".join(order)
        merge(linear(*(tmp_path / name for name in order)), out)
        assert load_file(out / "model.safetensors")[weight].dtype == dtype


def test_state_dicts_are_read_by_value_too() -> None:
    weight, scale = codes((144, 260), 1), scales((2, 3), 1)
    state = {"w.weight": weight, "w.weight_scale_inv": scale}
    config = {"merge_method": "linear", "models": ["a"], "parameters": {"weight": 1.0}, "dtype": "float32"}
    found = merge_state_dicts(config, {"a": state}, progress=False)
    assert list(found) == ["w.weight"]
    assert np.array_equal(found["w.weight"].numpy(), decoded(weight, scale, (128, 128)).astype(np.float32))
