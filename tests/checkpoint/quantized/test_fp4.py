"""MXFP4: every code with every exponent, gpt-oss' turned experts in any cut, DeepSeek-V4's experts by declaration alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from streammerge import plan
from streammerge.checkpoint.index import open_model
from streammerge.errors import ModelError
from streammerge.formats.refs import SourceRef
from streammerge.io.pages import slot_bytes
from streammerge.io.reader import Reader
from streammerge.numerics import elements
from streammerge.tensors.read import read_elements, read_source
from tests.checkpoint.quantized.decoder import cuts, e8m0_values
from tests.checkpoint.quantized.test_fp8 import E8M0, FP8, codes, decoded, linear, scales, write

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
V4 = {**FP8, "scale_fmt": "ue8m0"}


def nibbles(raw: np.ndarray) -> np.ndarray:
    """Return the values of codes two to a byte, the low half first."""
    return E2M1[np.stack([raw & 15, raw >> 4], -1).reshape(*raw.shape[:-1], -1)]


@pytest.mark.parametrize("compiled", [True, False])
def test_every_code_times_every_exponent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiled: bool
) -> None:
    monkeypatch.setattr(elements, "is_compiled", lambda name: compiled)
    raw = np.tile(np.arange(16, dtype=np.uint8) * 17, (255, 1))  # each code twice, in both halves
    exponents = np.arange(255, dtype=np.uint8).reshape(255, 1)
    tensors = {
        "layers.0.ffn.experts.0.w1.weight": torch.from_numpy(raw).view(torch.int8),
        "layers.0.ffn.experts.0.w1.scale": torch.from_numpy(exponents).view(E8M0),
    }
    ref = open_model(write(tmp_path / "m", tensors, V4, expert_dtype="fp4"))[next(iter(tensors))]
    assert ref.shape == (255, 32)
    with np.errstate(over="ignore"):
        want = (nibbles(raw) * e8m0_values(exponents)).astype(np.float32)
    assert np.array_equal(elements_of(ref).view(np.uint32), want.reshape(-1).view(np.uint32))


def elements_of(ref: SourceRef, start: int = 0, stop: int | None = None) -> np.ndarray:
    reader = Reader()
    found = read_elements(reader, ref, start, ref.n_elements if stop is None else stop)
    reader.close()
    return found.view(np.float32)


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize(
    ("name", "turned"), [("mlp.experts.gate_up_proj_{}", True), ("mlp1_weight.{}", False)]
)
def test_experts_of_gpt_oss_are_as_transformers_has_them_in_any_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, turned: bool, compiled: bool
) -> None:
    monkeypatch.setattr(elements, "is_compiled", lambda name: compiled)
    rng = np.random.default_rng(1)
    n, rows, groups = (3, 70, 3) if turned else (2, 5, 3)
    blocks = rng.integers(0, 256, (n, rows, groups, 16), dtype=np.uint8)
    exponents = rng.integers(100, 130, (n, rows, groups), dtype=np.uint8)
    tensors = {
        name.format("blocks"): torch.from_numpy(blocks),
        name.format("scales"): torch.from_numpy(exponents),
    }
    path = write(tmp_path / "m", tensors, {"quant_method": "mxfp4"})
    want = nibbles(blocks) * e8m0_values(exponents)[..., None]
    want = want.reshape(n, rows, 32 * groups).astype(np.float32)
    want = np.ascontiguousarray(want.transpose(0, 2, 1)) if turned else want
    (ref,) = open_model(path).values()
    assert (ref.name, ref.shape) == (name.format("")[:-1], want.shape)
    flat = want.reshape(-1)
    for start, stop in cuts(flat.size):
        assert np.array_equal(elements_of(ref, start, stop).view(np.uint32), flat[start:stop].view(np.uint32))


def test_a_turned_tensor_of_several_tiles(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    blocks = rng.integers(0, 256, (2, 700, 20, 16), dtype=np.uint8)
    exponents = rng.integers(100, 130, (2, 700, 20), dtype=np.uint8)
    tensors = {
        "e.down_proj_blocks": torch.from_numpy(blocks),
        "e.down_proj_scales": torch.from_numpy(exponents),
    }
    (ref,) = open_model(write(tmp_path / "m", tensors, {"quant_method": "mxfp4"})).values()
    want = (nibbles(blocks) * e8m0_values(exponents)[..., None]).reshape(2, 700, 640)
    flat = want.transpose(0, 2, 1).astype(np.float32).reshape(-1)
    for start, stop in [(0, flat.size), (699, 700 * 400 + 3), (700 * 630, 700 * 650)]:
        assert np.array_equal(elements_of(ref, start, stop), flat[start:stop])


@pytest.mark.parametrize("start", [0, 1, 130_001])
@pytest.mark.parametrize("kind", ["fp8", "fp4"])
def test_large_parts_are_decoded_in_their_slot(tmp_path: Path, kind: str, start: int) -> None:
    if kind == "fp8":
        weight, scale = codes((1100, 1300), 3), scales((9, 11), 4)
        path = write(tmp_path / "m", {"w.weight": weight, "w.weight_scale_inv": scale})
        want = decoded(weight, scale, (128, 128)).astype(np.float32)
    else:
        raw = np.random.default_rng(5).integers(0, 256, (1100, 1280), dtype=np.uint8)
        exponents = np.random.default_rng(6).integers(100, 140, (1100, 80), dtype=np.uint8)
        tensors = {
            "l.experts.0.w1.weight": torch.from_numpy(raw),
            "l.experts.0.w1.scale": torch.from_numpy(exponents),
        }
        path = write(tmp_path / "m", tensors, V4, expert_dtype="fp4")
        want = (nibbles(raw) * e8m0_values(exponents).repeat(32, 1)).astype(np.float32)
    (ref,) = open_model(path).values()
    stop = ref.n_elements - 7
    room = np.empty(slot_bytes(4 * (stop - start)) + 8192, np.uint8)
    slot = room[-room.ctypes.data % 4096 :][: slot_bytes(4 * (stop - start))]
    for backend in ("direct", "read"):
        slot[:] = 0xA5
        reader = Reader(backend, from_disk=True)  # type: ignore[arg-type]
        begins = read_source(reader, ref, start, stop, slot, np.empty(ref.scratch_bytes, np.uint8))
        found = slot[begins : begins + 4 * (stop - start)].view(np.float32)
        assert np.array_equal(found.view(np.uint32), want.reshape(-1)[start:stop].view(np.uint32))
        assert reader.bytes_read < 1.1 * ref.source.nbytes + ref.scales.nbytes  # type: ignore[attr-defined]
        reader.close()


EXPERT = "layers.0.ffn.experts.0.w1"
BAD: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({f"{EXPERT}.scale": torch.ones(4, 1).to(E8M0)}, {}, r"does not fit the \[4, 64\] of its codes by groups of 32"),
    ({f"{EXPERT}.scale": torch.ones(4, 2)}, {}, "is F32, where scales of FP4 are"),
    ({f"{EXPERT}.scale": torch.ones(4, 2)}, {"expert_dtype": None}, r"w1\.weight is quantised"),
    ({}, {}, r"w1\.weight holds I8 codes without a scale"),
]  # fmt: skip


@pytest.mark.parametrize(("scale", "config", "said"), BAD)
def test_codes_without_a_declaration_or_a_fitting_scale_are_refused(
    tmp_path: Path, scale: dict[str, Any], config: dict[str, Any], said: str
) -> None:
    tensors = {f"{EXPERT}.weight": torch.zeros(4, 32, dtype=torch.int8), **scale}
    path = write(tmp_path / "m", tensors, V4, **{"expert_dtype": "fp4", **config})
    with pytest.raises(ModelError, match=said):
        plan(linear(path, path))


def test_fused_fp4_experts_are_known_by_their_exponents(tmp_path: Path) -> None:
    raw = np.random.default_rng(7).integers(0, 256, (2, 6, 32), dtype=np.uint8)
    exponents = np.random.default_rng(8).integers(100, 140, (2, 6, 2), dtype=np.uint8)
    tensors = {
        "l.mlp.experts.gate_up_proj": torch.from_numpy(raw).view(torch.int8),
        "l.mlp.experts.gate_up_proj_scale_inv": torch.from_numpy(exponents).view(E8M0),
    }
    (ref,) = open_model(write(tmp_path / "m", tensors, V4)).values()
    want = nibbles(raw) * e8m0_values(exponents).repeat(32, 2)
    assert ref.shape == (2, 6, 64)
    assert np.array_equal(elements_of(ref), want.astype(np.float32).reshape(-1))
