"""Real architectures, quantised by their own libraries, merge to the logits of the merge of what they stand for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from streammerge import merge
from tests.checkpoint.quantized import real_models as real

Change = Callable[[Path, Path], None]
CASES: dict[str, tuple[str, Change, Change]] = {
    "Qwen3 in FP8": ("qwen3", real.fp8, real.from_fp8),
    "gpt-oss in MXFP4": ("gpt_oss", real.mxfp4, real.from_mxfp4),
    "DeepSeek-V3 in FP8, E8M0 scales": ("deepseek_v3", lambda s, t: real.fp8(s, t, True), real.from_fp8),
    **{
        f"Qwen3, {kind}": ("qwen3", lambda s, t, k=kind: real.compressed(s, t, k), real.from_compressed)
        for kind in real.SCHEMES
    },
}


@pytest.mark.parametrize("case", CASES)
def test_a_merge_of_quantised_models_says_what_the_merge_of_the_dequantised_says(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    architecture, quantize, dequantize = CASES[case]
    for seed, name in enumerate(("base", "a", "b")):
        source = real.write_float(tmp_path / f"{name}-float", architecture, seed)
        quantize(source, tmp_path / name)
        dequantize(tmp_path / name, tmp_path / f"{name}-dequantised")

    def config(end: str) -> dict[str, object]:
        models = [{"model": f"{name}{end}", "parameters": {"weight": 0.6}} for name in ("a", "b")]
        return {
            "merge_method": "task_arithmetic",
            "base_model": f"base{end}",
            "models": models,
            "dtype": "float32",
        }

    merge(config(""), "out")
    merge(config("-dequantised"), "want")
    out, want = load_file("out/model.safetensors"), load_file("want/model.safetensors")
    assert out.keys() == want.keys()
    assert all(torch.equal(out[name], want[name]) for name in want)
    assert torch.equal(real.logits(tmp_path / "out"), real.logits(tmp_path / "want"))
    assert not torch.equal(real.logits(tmp_path / "out"), real.logits(tmp_path / "base-float"))


def test_a_copy_in_bf16_is_the_model_that_transformers_makes_of_the_codes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for architecture, quantize in (("qwen3", real.fp8), ("gpt_oss", real.mxfp4)):
        quantize(
            real.write_float(tmp_path / f"{architecture}-float", architecture, 1), tmp_path / architecture
        )
        merge(
            {"merge_method": "passthrough", "models": [{"model": architecture}], "dtype": "bfloat16"},
            f"{architecture}-out",
        )
        want = real.logits(tmp_path / architecture, dtype=torch.bfloat16)
        assert torch.equal(real.logits(tmp_path / f"{architecture}-out", dtype=torch.bfloat16), want)
