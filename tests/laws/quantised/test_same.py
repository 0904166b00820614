"""Laws of `quantize: same`, for every format: the rule, the donor's own bytes where it is copied, the cuts, and reading it again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from safetensors.torch import save_file

from streammerge import merge, plan, verify
from streammerge.errors import ConfigError, ModelError, WorldError
from streammerge.output.shards import ShardWriter
from streammerge.planning.schedule import Chunk, StatisticsPass
from tests.checkpoint.quantized.formats import FORMATS, packed, write, write_entries
from tests.conftest import output_bytes, use_capacity
from tests.laws.quantised.rules import Raw, Rule, fp8, integers, mxfp4, nvfp4, of_each_matrix, raw_tensors

INV = (".weight", ".weight_scale_inv")
PLAIN = (".weight", ".weight_scale")
PACKED = (".weight_packed", ".weight_scale")
WRITTEN: dict[str, tuple[Rule, tuple[str, ...]]] = {
    **{f"fp8 blocks {dtype}": (fp8(dtype, (32, 32)), INV) for dtype in ("F32", "BF16", "F16")},
    "fp8 blocks F8_E8M0": (fp8("F8_E8M0", (32, 32), "powers"), INV),
    "fp8 blocks U8": (fp8("U8", (32, 32), "powers"), INV),
    "fp8 fused experts, blocks": (of_each_matrix(fp8("F32", (32, 32))), ("", "_scale_inv")),
    "deepseek v4 dense": (fp8("F8_E8M0", (32, 32), "powers"), (".weight", ".scale")),
    "deepseek v4 experts": (mxfp4, (".weight", ".scale")),
    "gpt-oss": (of_each_matrix(mxfp4, turned=True), ("_blocks", "_scales")),
    "fp8 scalar": (fp8("F32", None), PLAIN),
    "fp8 column": (fp8("F32", (1, 64)), PLAIN),
    "fp8 modelopt": (fp8("F32", None), PLAIN),
    "float-quantized tensor": (fp8("BF16", None), PLAIN),
    "float-quantized group": (fp8("BF16", (1, 16)), PLAIN),
    "float-quantized block": (fp8("BF16", (32, 32)), PLAIN),
    "mxfp8": (fp8("U8", (1, 32), "mx"), PLAIN),
    "mxfp4 U8": (mxfp4, PACKED),
    "int-quantized channel": (integers(8, "BF16", (1, 64), packed=False), PLAIN),
    **{
        f"pack-quantized {bits} bits": (integers(bits, "BF16", (1, 32), packed=True), PACKED)
        for bits in (3, 4)
    },
    "pack-quantized channel": (integers(4, "BF16", (1, 59), packed=True), PACKED),
    "nvfp4": (nvfp4(divides=True), (*PACKED, ".weight_global_scale")),
    "nvfp4 modelopt": (nvfp4(divides=False), (*PLAIN, ".weight_scale_2")),
}
"""The rule of each format that is written, and the ends of the names of its parts."""
NOT_WRITTEN = [
    "fp8 blocks e5m2",
    "fp8 fused experts, one scale each",
    "int-quantized asymmetric",
    "pack-quantized 4 bits, zero points",
    "pack-quantized g_idx",
    "gptq 4 bits",
    "awq",
    "nf4 nested",
]


def config(method: str, paths: list[Path], **more: Any) -> dict[str, Any]:
    models = [{"model": str(path), "parameters": {"weight": 0.5}} for path in paths]
    return {"merge_method": method, "models": models, **more}


@pytest.fixture(params=list(WRITTEN))
def models(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, list[Path]]:
    """Return a format and two models in it."""
    name = request.param
    paths = [tmp_path / "a", tmp_path / "b"]
    for seed, path in enumerate(paths):
        write(path, name, seed)
    return name, paths


def tensors_of(out: Path) -> dict[str, Raw]:
    return raw_tensors(out / "model.safetensors")


def test_codes_and_scales_are_those_of_the_merge_in_fp32(
    models: tuple[str, list[Path]], tmp_path: Path
) -> None:
    name, paths = models
    rule, ends = WRITTEN[name]
    merge(config("linear", paths, quantize="same"), tmp_path / "same", progress=False)
    merge(config("linear", paths, dtype="float32"), tmp_path / "floats", progress=False)
    floats, found, donor = (
        load_file(tmp_path / "floats/model.safetensors"),
        tensors_of(tmp_path / "same"),
        tensors_of(paths[0]),
    )
    assert {k: (v.dtype, v.shape) for k, v in found.items()} == {
        k: (v.dtype, v.shape) for k, v in donor.items()
    }
    for module in FORMATS[name].modules:
        values = floats[module] if module in floats else floats[f"{module}.weight"]
        for end, data in rule(values, *ends).items():
            assert found[module + end].data == data, (module, end)
    assert (tmp_path / "same/config.json").read_bytes() == (paths[0] / "config.json").read_bytes()
    assert not verify(str(tmp_path / "same")).problems
    # It is a model like its donor: read again, it has the values that its codes stand for.
    merge(config("passthrough", [tmp_path / "same"], quantize="same"), tmp_path / "again", progress=False)
    assert tensors_of(tmp_path / "again") == found


def test_integers_of_every_width_are_packed_and_their_scales_rounded(tmp_path: Path) -> None:
    """One model has a group of layers for each width, with scales in bf16 or fp16."""
    widths = {f"model.layers.{bits}.mlp.down_proj": bits for bits in range(2, 9)}
    groups = {}
    for seed, model in enumerate("ab"):
        rng, tensors = np.random.default_rng(seed), {}
        for module, bits in widths.items():
            dtype = "F16" if bits % 2 else "BF16"
            weight = packed(bits, 32, scale=dtype)(rng, 48, 64)
            tensors |= {module + end: entry for end, entry in weight.parts.items()}
            weights = {
                "num_bits": bits,
                "type": "int",
                "symmetric": True,
                "strategy": "group",
                "group_size": 32,
            }
            groups[module] = {"targets": [module], "weights": weights, "format": "pack-quantized"}
        declared = {
            "quant_method": "compressed-tensors",
            "format": "mixed-precision",
            "config_groups": groups,
        }
        write_entries(tmp_path / model, tensors, {"quantization_config": declared})
    paths = [tmp_path / "a", tmp_path / "b"]
    merge(config("linear", paths, quantize="same"), tmp_path / "same", progress=False)
    merge(config("linear", paths, dtype="float32"), tmp_path / "floats", progress=False)
    floats, found = load_file(tmp_path / "floats/model.safetensors"), tensors_of(tmp_path / "same")
    for module, bits in widths.items():
        rule = integers(bits, "F16" if bits % 2 else "BF16", (1, 32), packed=True)
        for end, data in rule(floats[f"{module}.weight"], *PACKED).items():
            assert found[module + end].data == data, (module, end)


SMALL = {
    "fp8 blocks F32": 150_000,
    "fp8 fused experts, blocks": 150_000,
    "fp8 scalar": 62_000,
    "gpt-oss": 150_000,
    "pack-quantized 4 bits": 62_000,
    "nvfp4": 62_000,
}
"""A format of each kind of encoder, and buffers that hold a part of a tensor alone."""


@pytest.mark.parametrize("name", SMALL)
def test_bytes_depend_on_no_budget_and_no_interruption(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [tmp_path / "a", tmp_path / "b"]
    for seed, path in enumerate(paths):
        write(path, name, seed)
    merge(config("linear", paths, quantize="same"), tmp_path / "one", progress=False)
    # So little that no tensor is held: those that need a look at the whole are merged twice.
    monkeypatch.setattr("streammerge.planning.schedule.ALIGN", 64)
    refs = "streammerge.checkpoint.refs"
    for place, value in (
        ("quantized.SPAN", 64),
        ("integers.AT_ONCE", 64),
        ("codebooks.AT_ONCE", 64),
        ("codebooks._ROOM", 9000),
    ):
        monkeypatch.setattr(f"{refs}.{place}", value)
    monkeypatch.setattr("streammerge.tensors.quantized.SPAN", 64)
    monkeypatch.setattr("streammerge.tensors.integers.AT_ONCE", 64)
    monkeypatch.setattr("streammerge.tensors.codebooks.AT_ONCE", 64)
    use_capacity(monkeypatch, SMALL[name], 2)
    decided = plan(config("linear", paths, quantize="same"))
    steps = list(decided.steps())
    assert sum(isinstance(step, Chunk) for step in steps) >= 3
    whole = [job for job in decided.jobs if job.encoder is not None and job.encoder.needs_peak]
    assert [step.job for step in steps if isinstance(step, StatisticsPass)] == [job.ordinal for job in whole]
    once = sum(job.input_bytes for job in decided.jobs)
    assert decided.bytes_to_read() == once + sum(job.input_bytes for job in whole)
    written, left = ShardWriter.write, [5]

    def failing(writer: ShardWriter, *arguments: Any) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise WorldError("the disk is gone")
        written(writer, *arguments)

    monkeypatch.setattr(ShardWriter, "write", failing)
    with pytest.raises(WorldError, match="gone"):
        merge(config("linear", paths, quantize="same"), tmp_path / "two", progress=False)
    merge(config("linear", paths, quantize="same"), tmp_path / "two", progress=False)
    assert output_bytes(tmp_path / "one") == output_bytes(tmp_path / "two")


@pytest.mark.parametrize("name", NOT_WRITTEN)
def test_what_is_read_and_not_written_is_refused_by_name_and_copied(name: str, tmp_path: Path) -> None:
    for seed, model in enumerate("ab"):
        write(tmp_path / model, name, seed)
    paths = [tmp_path / "a", tmp_path / "b"]
    with pytest.raises(ModelError, match=r"read and not written .*: set `quantize: none` or `quantize: fp8`"):
        merge(config("linear", paths, quantize="same"), tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()
    merge(config("passthrough", paths[:1], quantize="same"), tmp_path / "out", progress=False)
    assert tensors_of(tmp_path / "out") == tensors_of(paths[0])


def test_a_donor_that_is_not_quantised_is_refused(
    make_models: Callable[..., list[Path]], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="which is not quantised: leave `quantize` out, or set it to fp8"):
        merge(config("linear", make_models(), quantize="same"), tmp_path / "out", progress=False)


def test_what_scales_activations_is_carried_and_only_then(tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(0)
    model = {
        "model.layers.0.self_attn.k_proj.weight": torch.randn(8, 8, generator=g).to(torch.float8_e4m3fn),
        "model.layers.0.self_attn.k_proj.weight_scale": torch.tensor(0.5),
        "model.layers.0.self_attn.k_proj.input_scale": torch.tensor(0.25),
        "model.layers.0.self_attn.k_proj.k_scale": torch.tensor(0.125),
    }
    (tmp_path / "a").mkdir()
    save_file(model, tmp_path / "a/model.safetensors")
    declared = '{"model_type": "llama", "quantization_config": {"quant_method": "fp8", "activation_scheme": "static"}}'
    (tmp_path / "a/config.json").write_text(declared)
    for quantize, names in (("same", set(model)), ("none", {"model.layers.0.self_attn.k_proj.weight"})):
        out = tmp_path / quantize
        merge(config("linear", [tmp_path / "a"], quantize=quantize), out, progress=False)
        assert tensors_of(out).keys() == names
        assert ("quantization_config" in (out / "config.json").read_text()) == (quantize == "same")
