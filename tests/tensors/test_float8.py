"""Plain FP8 tensors: every code and every rounding as torch has them, merged by value, copied code by code."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from streammerge import merge, merge_state_dicts, verify
from streammerge.errors import ModelError
from streammerge.numerics.casts import narrow, rounded8, table

KINDS = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}


@pytest.mark.parametrize("dtype", KINDS)
def test_every_code_widens_to_the_value_that_torch_gives_it(dtype: str) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(KINDS[dtype])
    found = torch.from_numpy(table(dtype).view(np.int16)).view(torch.bfloat16)
    assert torch.equal(found.float().nan_to_num(1e9), codes.float().nan_to_num(1e9))
    assert torch.equal(found.isnan(), codes.isnan())
    assert torch.equal(torch.signbit(found), torch.signbit(codes.float()))


@pytest.mark.parametrize("dtype", KINDS)
def test_values_are_rounded_as_torch_rounds_them(dtype: str) -> None:
    rng = np.random.default_rng(1)
    bits = rng.integers(0, 1 << 32, 300_000, dtype=np.uint64).astype(np.uint32).view(np.float32)
    known = torch.arange(256, dtype=torch.uint8).view(KINDS[dtype]).double().numpy()
    known = np.unique(known[np.isfinite(known)])
    ties = ((known[1:] + known[:-1]) / 2).astype(np.float32)
    near = [np.nextafter(ties, np.float32(s)) for s in (np.inf, -np.inf)]
    edges = np.array([448, 464, 480, 57344, 61440, 65536, np.inf, -np.inf, 0.0, -0.0], np.float32)
    values = np.concatenate([bits, rng.standard_normal(100_000, np.float32), ties, *near, edges])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = rounded8(values, dtype)
    want = torch.from_numpy(values).to(KINDS[dtype]).view(torch.uint8).numpy()
    assert np.array_equal(found, want)


def test_what_is_rounded_in_its_own_bytes_is_counted() -> None:
    values = np.array([1.0, 464.0, 465.0, np.inf, np.nan] * 20_000, np.float32)
    want = rounded8(values.copy(), "F8_E4M3")
    raw = values.view(np.uint8)
    assert narrow(values, "F8_E4M3", raw) == (20_000, 20_000)
    assert np.array_equal(raw[: want.size], want)


def write(path: Path, seed: int, kind: torch.dtype, scale: float = 1.0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    tensors = {
        "a.weight": (torch.randn(37, 19, generator=g) * scale).to(kind),
        "b.weight": (torch.randn(1, 7, generator=g) * scale).to(kind),
        "c.bias": torch.randn(5, generator=g).bfloat16(),
    }
    path.mkdir()
    save_file(tensors, path / "model.safetensors")
    return tensors


def config(method: str, *names: str, **more: object) -> dict[str, object]:
    models = [{"model": name, "parameters": {"weight": 0.5}} for name in names]
    return {"merge_method": method, "models": models, **more}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("dtype", KINDS)
def test_a_merge_of_fp8_is_the_mean_rounded_once(here: Path, dtype: str) -> None:
    a, b = (write(here / name, seed, KINDS[dtype]) for name, seed in (("a", 1), ("b", 2)))
    merge(config("linear", "a", "b"), "out")
    merge(config("linear", "a", "b"), "small", memory="600MiB", threads=1)
    merge(config("linear", "a", "b", dtype="float32"), "wide")
    found, wide = load_file("out/model.safetensors"), load_file("wide/model.safetensors")
    assert (here / "out/model.safetensors").read_bytes() == (here / "small/model.safetensors").read_bytes()
    for name in a:
        mean = (a[name].double() + b[name].double()) / 2
        assert found[name].dtype == a[name].dtype
        assert torch.equal(wide[name], mean.float())
        assert torch.equal(found[name].view(torch.uint8), mean.float().to(a[name].dtype).view(torch.uint8))
    verify("out")


def test_other_methods_and_mixed_dtypes_take_fp8(here: Path) -> None:
    base, a = (write(here / name, seed, torch.float8_e4m3fn) for name, seed in (("base", 3), ("a", 1)))
    b = write(here / "b", 2, torch.bfloat16)
    merge(config("task_arithmetic", "a", "b", base_model="base"), "out")
    found = load_file("out/model.safetensors")
    for name, tensor in found.items():
        d = [x[name].float() - base[name].float() for x in (a, b)]
        want = base[name].double() + 0.5 * d[0].double() + 0.5 * d[1].double()
        assert tensor.dtype == torch.bfloat16  # the wider one
        assert torch.allclose(tensor.double(), want, rtol=2**-8, atol=1e-6)


def test_a_copy_keeps_every_code_nan_too(here: Path) -> None:
    (here / "a").mkdir()
    codes = torch.arange(256, dtype=torch.uint8).reshape(16, 16)
    save_file({"w": codes.view(torch.float8_e4m3fn)}, here / "a" / "model.safetensors")
    merge({"merge_method": "passthrough", "models": [{"model": "a"}]}, "out", nonfinite="warn")
    assert torch.equal(load_file("out/model.safetensors")["w"].view(torch.uint8), codes)


def test_an_overflow_is_refused_by_name(here: Path) -> None:
    for name in ("a", "b"):
        (here / name).mkdir()
        save_file({"w": torch.full((2, 3), 400.0).to(torch.float8_e4m3fn)}, here / name / "model.safetensors")
    models = [{"model": name, "parameters": {"weight": 1.0}} for name in ("a", "b")]
    loud = {"merge_method": "linear", "models": models, "parameters": {"normalize": False}}
    with pytest.raises(ModelError, match="tensor w: the merged values overflow F8_E4M3"):
        merge(loud, "out")
    merge(loud, "warned", nonfinite="warn")
    assert load_file("warned/model.safetensors")["w"].float().unique().tolist() == [448.0]


def test_a_nan_in_a_model_is_found(here: Path) -> None:
    for name, value in (("a", 1.0), ("b", float("nan"))):
        (here / name).mkdir()
        save_file({"w": torch.full((2, 3), value).to(torch.float8_e5m2)}, here / name / "model.safetensors")
    with pytest.raises(ModelError, match="NaN or infinity at element 0"):
        merge(config("linear", "a", "b"), "out")


def test_models_in_memory_give_the_same_bits(here: Path) -> None:
    states = {name: write(here / name, seed, torch.float8_e4m3fn) for name, seed in (("a", 1), ("b", 2))}
    merge(config("linear", "a", "b"), "out")
    found, want = merge_state_dicts(config("linear", "a", "b"), states), load_file("out/model.safetensors")
    for name, tensor in want.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8))


def test_codes_in_memory_that_nothing_decodes_are_refused(here: Path) -> None:
    state = {"w.weight": torch.ones(4, 8).to(torch.float8_e4m3fn), "w.scale_weight": torch.ones(1)}
    with pytest.raises(ModelError, match=r"w\.weight is quantised"):
        merge_state_dicts(config("linear", "a", "b"), {"a": state, "b": state})
