"""Merges of FP8: kernels and formulas agree, pieces and an interruption change nothing, experts change their layout."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from streammerge import merge, plan
from streammerge.errors import Stopped
from streammerge.events import Event
from tests.checkpoint.quantized.test_fp8 import FP8, codes, decoded, linear, scales, write

SHAPE = (600, 520)
WEIGHT = "model.layers.{}.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a base in FP8, and two fine-tunes in BF16."""
    here = tmp_path_factory.mktemp("models")
    base: dict[str, torch.Tensor] = {}
    tunes: list[dict[str, torch.Tensor]] = [{}, {}]
    for layer in range(3):
        weight, scale = codes(SHAPE, layer), scales((5, 5), layer) * 1e-3
        base |= {WEIGHT.format(layer): weight, f"{WEIGHT.format(layer)}_scale_inv": scale}
        values = torch.from_numpy(decoded(weight, scale, (128, 128)))
        for seed, tune in enumerate(tunes):
            noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(7 * layer + seed))
            tune[WEIGHT.format(layer)] = (values + 0.01 * noise).bfloat16()
    write(here / "base", base)
    for name, tune in zip("ab", tunes, strict=True):
        write(here / name, tune, None)
    return here


def ties(models: Path) -> dict[str, Any]:
    config = linear(models / "a", models / "b", base_model=str(models / "base"), dtype="bfloat16")
    return {**config, "merge_method": "ties", "parameters": {"density": 0.3}}


@pytest.fixture(scope="module")
def merged(models: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    out = tmp_path_factory.mktemp("whole") / "out"
    merge(ties(models), out, threads=1)
    return (out / "model.safetensors").read_bytes()


def test_the_torch_formula_gives_the_bits_of_the_kernels(models: Path, merged: bytes, tmp_path: Path) -> None:
    merge(ties(models), tmp_path / "out", kernels=False)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == merged


def test_a_merge_that_was_stopped_goes_on_to_the_same_bytes(
    models: Path, merged: bytes, tmp_path: Path, small_capacity: Any
) -> None:
    small_capacity(4 << 20, 2)
    stop = threading.Event()

    def stop_at_once(event: Event) -> None:
        if event.kind == "progress" and event.values["tensors"]:
            stop.set()

    with pytest.raises(Stopped):
        merge(ties(models), tmp_path / "out", stop=stop, on_event=stop_at_once)
    assert not (tmp_path / "out" / "model.safetensors").exists()
    merge(ties(models), tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == merged


@pytest.mark.parametrize("first", ["fused", "classic"])
def test_experts_in_fp8_take_the_layout_of_the_first_model(tmp_path: Path, first: str) -> None:
    n, hidden, inner = 2, 40, 24
    parent = "model.layers.0.mlp.experts"
    block = {**FP8, "weight_block_size": [16, 16]}
    fused, classic = {}, {}
    values: dict[str, torch.Tensor] = {}
    for name, rows, columns in (("gate_up_proj", 2 * inner, hidden), ("down_proj", hidden, inner)):
        weight, scale = codes((n, rows, columns), 1), scales((n, -(-rows // 16), -(-columns // 16)), 2)
        fused |= {f"{parent}.{name}": weight, f"{parent}.{name}_scale_inv": scale}
        values[f"{parent}.{name}"] = torch.from_numpy(decoded(weight, scale, (1, 16, 16)))
    for expert in range(n):
        for name, rows, columns in (
            ("gate_proj", inner, hidden),
            ("up_proj", inner, hidden),
            ("down_proj", hidden, inner),
        ):
            key = f"{parent}.{expert}.{name}.weight"
            weight, scale = codes((rows, columns), 3 + expert), scales((-(-rows // 16), -(-columns // 16)), 4)
            classic |= {key: weight, f"{key}_scale_inv": scale}
            values[key] = torch.from_numpy(decoded(weight, scale, (16, 16)))
    write(tmp_path / "fused", fused, block)
    write(tmp_path / "classic", classic, block)
    second = "classic" if first == "fused" else "fused"
    merge(linear(tmp_path / first, tmp_path / second, dtype="float32"), tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert set(found) == {name for name in values if name in (fused if first == "fused" else classic)}
    for expert in range(n):
        down = (values[f"{parent}.down_proj"][expert], values[f"{parent}.{expert}.down_proj.weight"])
        want = torch.stack(down).float().double().mean(0).float()
        got = (
            found[f"{parent}.down_proj"][expert]
            if first == "fused"
            else found[f"{parent}.{expert}.down_proj.weight"]
        )
        assert torch.allclose(got, want, rtol=1e-6)


def test_a_plan_counts_the_bytes_of_codes_and_scales_not_of_values(models: Path) -> None:
    read = plan(linear(models / "base", dtype="bfloat16")).bytes_to_read()
    assert read == 3 * (SHAPE[0] * SHAPE[1] + 4 * 5 * 5)
