"""Laws of every quantised output: the rule that it is rounded by, the cuts, interruptions, damage, and reading it again."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save

from streammerge import merge, merge_state_dicts, verify
from streammerge.errors import ConfigError, ModelError, WorldError
from streammerge.output.shards import ShardWriter
from tests.conftest import output_bytes, use_capacity, write_models

SHAPES: dict[str, tuple[int, ...]] = {
    "model.embed_tokens.weight": (256, 128),
    "model.layers.0.mlp.gate.weight": (128, 128),
    "model.layers.0.mlp.experts.gate_up_proj": (2, 256, 128),
    "model.layers.0.mlp.experts.down_proj": (2, 128, 128),
    "model.layers.0.mlp.up_proj.weight": (384, 128),
    "model.layers.0.self_attn.q_proj.weight": (128, 130),
    "model.layers.0.input_layernorm.weight": (128,),
    "model.layers.0.mlp.up_proj.bias": (384,),
}
IN_FP8 = [
    "model.layers.0.mlp.experts.gate_up_proj",
    "model.layers.0.mlp.experts.down_proj",
    "model.layers.0.mlp.up_proj.weight",
]


@dataclass(frozen=True)
class Made:
    """Models, and what they merge to as FP8 and as fp32."""

    paths: list[Path]
    fp8: Path
    floats: Path


def config(paths: list[Path], method: str = "ties", **more: Any) -> dict[str, Any]:
    models = [{"model": str(path), "parameters": {"weight": 0.5, "density": 0.6}} for path in paths[1:]]
    return {
        "merge_method": method,
        "base_model": str(paths[0]),
        "models": models,
        "dtype": "bfloat16",
        **more,
    }


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("fp8")
    paths = write_models(folder, 2, shapes=SHAPES)
    made = Made(paths, folder / "fp8", folder / "floats")
    merge(config(paths, quantize="fp8"), made.fp8, progress=False)
    merge(config(paths, dtype="float32"), made.floats, progress=False)
    return made


def in_blocks(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Quantise by the rule, in plain numpy and torch: codes and scales of blocks of 128 x 128."""
    *many, rows, columns = values.shape
    blocks = values.reshape(*many, rows // 128, 128, columns // 128, 128)
    scales = np.abs(blocks).max((-3, -1)) / np.float32(448)
    quotients = (blocks / scales[..., :, None, :, None]).reshape(values.shape)
    return torch.from_numpy(quotients).to(torch.float8_e4m3fn).view(torch.uint8).numpy(), scales


def test_codes_and_scales_are_those_of_the_merge_in_fp32(made: Made) -> None:
    found, floats = (load_file(out / "model.safetensors") for out in (made.fp8, made.floats))
    for name in IN_FP8:
        codes, scales = in_blocks(floats[name].numpy())
        assert found[name].dtype == torch.float8_e4m3fn
        assert np.array_equal(found[name].view(torch.uint8).numpy(), codes), name
        assert np.array_equal(found[f"{name}_scale_inv"].numpy(), scales), name
    stay = floats.keys() - set(IN_FP8) - {"position_ids"}
    assert all(torch.equal(found[name], floats[name].bfloat16()) for name in stay)
    assert found.keys() == floats.keys() | {f"{name}_scale_inv" for name in IN_FP8}


def test_what_is_in_this_layout_already_is_copied_code_by_code(made: Made, tmp_path: Path) -> None:
    copy = {"merge_method": "passthrough", "models": [str(made.fp8)], "quantize": "fp8"}
    merge(copy, tmp_path / "again", progress=False)
    assert (
        output_bytes(tmp_path / "again")["model.safetensors"] == output_bytes(made.fp8)["model.safetensors"]
    )
    declared = [json.loads((out / "config.json").read_text()) for out in (made.fp8, tmp_path / "again")]
    assert declared[0]["quantization_config"] == declared[1]["quantization_config"]


def test_state_dicts_merge_into_codes_and_scales_too(made: Made) -> None:
    dicts = [load_file(path / "model.safetensors") for path in made.paths]
    named = dict(zip(("base", "a", "b"), dicts, strict=True))
    models = [{"model": name, "parameters": {"weight": 0.5, "density": 0.6}} for name in ("a", "b")]
    settings = {
        "merge_method": "ties",
        "base_model": "base",
        "models": models,
        "dtype": "bfloat16",
        "quantize": "fp8",
    }
    found, want = merge_state_dicts(settings, named), load_file(made.fp8 / "model.safetensors")
    assert found.keys() == want.keys()
    assert all(torch.equal(found[name].view(torch.uint8), want[name].view(torch.uint8)) for name in IN_FP8)


def test_a_shard_is_what_save_file_writes_and_the_settings_say_so(made: Made) -> None:
    raw = (made.fp8 / "model.safetensors").read_bytes()
    assert save(load_file(made.fp8 / "model.safetensors"), {"format": "pt"}) == raw
    assert json.loads((made.fp8 / "config.json").read_text())["quantization_config"] == {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": [
            "model.embed_tokens",
            "model.layers.0.mlp.gate",
            "model.layers.0.self_attn.q_proj",
        ],
    }


@pytest.mark.parametrize(
    ("capacity", "threads", "kernels"), [(420_000, 1, None), (700_000, 3, None), (64 << 20, 2, False)]
)
def test_bytes_depend_on_no_budget_and_no_backend(
    made: Made,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capacity: int,
    threads: int,
    kernels: bool | None,
) -> None:
    use_capacity(monkeypatch, capacity, threads)
    merge(config(made.paths, quantize="fp8"), tmp_path / "out", kernels=kernels, progress=False)
    assert output_bytes(tmp_path / "out") == output_bytes(made.fp8)


def test_an_interrupted_merge_goes_on_to_the_same_bytes(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_capacity(monkeypatch, 420_000, 1)
    write, left = ShardWriter.write, [9]

    def failing(writer: ShardWriter, *arguments: Any) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise WorldError("the disk is gone")
        write(writer, *arguments)

    monkeypatch.setattr(ShardWriter, "write", failing)
    with pytest.raises(WorldError, match="gone"):
        merge(config(made.paths, quantize="fp8"), tmp_path / "out", progress=False)
    summary = merge(config(made.paths, quantize="fp8"), tmp_path / "out", progress=False)
    assert summary.bytes_resumed > 0
    assert output_bytes(tmp_path / "out") == output_bytes(made.fp8)


@pytest.mark.parametrize("part", ["", "_scale_inv"])
def test_verify_finds_a_flipped_bit_of_codes_and_of_scales(
    made: Made, tmp_path: Path, part: str, copy_of: Callable[[Path], Path]
) -> None:
    assert not verify(str(made.fp8)).problems
    out = copy_of(made.fp8)
    name = f"{IN_FP8[2]}{part}"
    file = out / "model.safetensors"
    raw = bytearray(file.read_bytes())
    size = int.from_bytes(raw[:8], "little")
    begins = json.loads(raw[8 : 8 + size])[name]["data_offsets"][0]
    raw[8 + size + begins] ^= 1
    file.write_bytes(raw)
    assert f"tensor {name} is damaged" in verify(str(out)).problems[0]


@pytest.fixture
def copy_of(tmp_path: Path) -> Callable[[Path], Path]:
    def copied(out: Path) -> Path:
        (tmp_path / "copy").mkdir()
        for file in out.iterdir():
            (tmp_path / "copy" / file.name).write_bytes(file.read_bytes())
        return tmp_path / "copy"

    return copied


def test_what_is_recomputed_from_the_inputs_is_compared_part_by_part(made: Made) -> None:
    verdict = verify(str(made.fp8), against=config(made.paths, quantize="fp8"), sample=None, progress=False)
    assert verdict.recomputed is not None
    assert not verdict.recomputed.problems
    assert verdict.recomputed.elements == verdict.recomputed.of_elements


def test_what_is_not_finite_is_refused_whatever_is_asked(made: Made, tmp_path: Path) -> None:
    tensors = load_file(made.paths[1] / "model.safetensors")
    tensors[IN_FP8[2]][5, 7] = float("inf")
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "model.safetensors").write_bytes(save(tensors, {"format": "pt"}))
    (bad / "config.json").write_text((made.paths[1] / "config.json").read_text())
    with pytest.raises(ModelError, match=r"holds NaN or infinity at element 647 .*: .*`quantize`"):
        merge(
            config([made.paths[0], bad], "task_arithmetic", quantize="fp8"),
            tmp_path / "out",
            nonfinite="warn",
            progress=False,
        )


def test_one_file_has_no_place_to_declare_it(made: Made, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="give a directory as OUT"):
        merge(config(made.paths, quantize="fp8"), tmp_path / "out.safetensors", progress=False)


def test_a_model_without_a_matrix_of_that_size_is_refused(tmp_path: Path) -> None:
    paths = write_models(
        tmp_path, 2, shapes={"model.layers.0.mlp.up_proj.weight": (130, 128), "norm.weight": (64,)}
    )
    with pytest.raises(ModelError, match="has none: leave `quantize` out"):
        merge(config(paths, quantize="fp8"), tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()
