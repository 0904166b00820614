"""Small models of real architectures, quantised and dequantised by the libraries that people use for it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import load_file, save_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

Tensors = dict[str, torch.Tensor]
TOKENS = torch.arange(1, 25)[None]
_COMMON = {
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 160,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
}
ARCHITECTURES: dict[str, Callable[[], Any]] = {
    "qwen3": lambda: transformers.Qwen3Config(
        hidden_size=64, intermediate_size=128, num_key_value_heads=2, head_dim=16, **_COMMON
    ),
    "deepseek_v3": lambda: transformers.DeepseekV3Config(
        hidden_size=64, intermediate_size=128, moe_intermediate_size=64, first_k_dense_replace=1,
        num_key_value_heads=4, q_lora_rank=64, kv_lora_rank=32, qk_rope_head_dim=16, qk_nope_head_dim=16,
        v_head_dim=16, n_routed_experts=4, n_group=1, topk_group=1, num_experts_per_tok=2, **_COMMON
    ),
    "gpt_oss": lambda: transformers.GptOssConfig(
        hidden_size=64, intermediate_size=64, num_key_value_heads=2, head_dim=16, num_local_experts=4,
        num_experts_per_tok=2, **_COMMON
    ),
}  # fmt: skip


def write_float(path: Path, architecture: str, seed: int, drift: float = 0.02) -> Path:
    """Write a model in fp32: the same random weights for every seed, moved a little by it."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(ARCHITECTURES[architecture]())
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += drift * torch.randn_like(parameter)
    model.save_pretrained(path)
    return path


def logits(path: Path, **options: Any) -> torch.Tensor:
    """Return what a model says to some tokens; fails where a tensor is missing or was not expected."""
    model, told = transformers.AutoModelForCausalLM.from_pretrained(
        path, output_loading_info=True, **{"dtype": torch.float32, **options}
    )
    assert not any(told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), told
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def _rewritten(source: Path, target: Path, tensors: Tensors, quantization: dict[str, Any] | None) -> None:
    target.mkdir()
    save_file({name: t.contiguous() for name, t in tensors.items()}, target / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    if quantization is not None:
        config["quantization_config"] = quantization
    (target / "config.json").write_text(json.dumps(config))


def _is_linear(name: str, t: torch.Tensor) -> bool:
    plain = ("embed_tokens", "lm_head", "mlp.gate.", "router")
    return name.endswith(".weight") and t.ndim == 2 and not any(part in name for part in plain)


_BLOCK = {"quant_method": "fp8", "weight_block_size": [32, 32], "activation_scheme": "dynamic"}


def _quantizer(ue8m0: bool) -> Any:
    settings = SimpleNamespace(weight_block_size=(32, 32), scale_fmt="ue8m0" if ue8m0 else "float")
    return SimpleNamespace(quantization_config=settings)


def fp8(source: Path, target: Path, ue8m0: bool = False) -> None:
    """Quantise by blocks of 32 x 32 as transformers does."""
    quantize = Fp8Quantize(_quantizer(ue8m0))
    tensors: Tensors = {}
    for name, t in load_file(source / "model.safetensors").items():
        tensors |= quantize.convert({name: t}) if _is_linear(name, t) else {name: t}
    _rewritten(source, target, tensors, {**_BLOCK, **({"scale_fmt": "ue8m0"} if ue8m0 else {})})


def from_fp8(source: Path, target: Path) -> None:
    """Dequantise as transformers does, in fp32."""
    back = Fp8Dequantize(_quantizer(False))
    stored = load_file(source / "model.safetensors")
    tensors = {name: t for name, t in stored.items() if not name.endswith("_scale_inv")}
    for name in tensors:
        if f"{name}_scale_inv" in stored:
            tensors[name] = back._dequantize_one(
                stored[name], stored[f"{name}_scale_inv"].float(), torch.float32
            )
    _rewritten(source, target, tensors, None)
    _undeclared(target)


SCHEMES: dict[str, dict[str, Any]] = {
    "float-quantized": {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True},
    "int-quantized": {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True},
    "pack-quantized": {
        "num_bits": 4,
        "type": "int",
        "strategy": "group",
        "group_size": 32,
        "symmetric": False,
    },
}


def compressed(source: Path, target: Path, kind: str) -> None:
    """Quantise the linear layers by compressed-tensors' own compressor, scales in bf16."""
    args = QuantizationArgs(**SCHEMES[kind])
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    compressor = BaseCompressor.get_value_from_registry(kind)
    tensors: Tensors = {}
    for name, t in load_file(source / "model.safetensors").items():
        if not _is_linear(name, t):
            tensors[name] = t
            continue
        groups = t.unflatten(1, (-1, args.group_size or t.shape[1]))
        scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
        state = {"weight": t, "weight_scale": scale.bfloat16(), "weight_zero_point": zero}
        made = compressor.compress(state, scheme)
        stem = name.removesuffix("weight")
        tensors |= {stem + key: value for key, value in made.items()}
    group = {"targets": ["Linear"], "weights": SCHEMES[kind]}
    declared = {
        "quant_method": "compressed-tensors",
        "format": kind,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "quantization_status": "compressed",
    }
    _rewritten(source, target, tensors, declared)


def from_compressed(source: Path, target: Path) -> None:
    """Decompress by compressed-tensors, in fp32."""
    declared = json.loads((source / "config.json").read_text())["quantization_config"]
    kind = declared["format"]
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**SCHEMES[kind]))
    compressor = BaseCompressor.get_value_from_registry(kind)
    stored = load_file(source / "model.safetensors")
    modules = sorted(
        {name.removesuffix(".weight_scale") for name in stored if name.endswith(".weight_scale")}
    )
    tensors = {
        name: t for name, t in stored.items() if not any(name.startswith(f"{m}.weight") for m in modules)
    }
    for module in modules:
        state = {
            key: stored[f"{module}.{key}"]
            for key in ("weight", "weight_packed", "weight_scale", "weight_shape", "weight_zero_point")
            if f"{module}.{key}" in stored
        }
        state["weight_scale"] = state["weight_scale"].float()
        tensors[f"{module}.weight"] = compressor.decompress(state, scheme)["weight"]
    _rewritten(source, target, tensors, None)
    _undeclared(target)


def mxfp4(source: Path, target: Path) -> None:
    """Quantise the experts of gpt-oss into OpenAI's layout: blocks of 32 along the inputs, the nearest E2M1."""
    tensors: Tensors = {}
    grid = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    for name, t in load_file(source / "model.safetensors").items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            tensors[name] = t
            continue
        blocks = t.transpose(1, 2).unflatten(2, (-1, 32))
        exponents = blocks.abs().amax(-1).log2().floor() - 2
        scaled = blocks * torch.exp2(-exponents)[..., None]
        codes = (scaled.abs()[..., None] - grid).abs().argmin(-1) + 8 * (scaled < 0)
        tensors[f"{name}_blocks"] = (codes[..., 0::2] | codes[..., 1::2] << 4).to(torch.uint8)
        tensors[f"{name}_scales"] = (exponents + 127).to(torch.uint8)
    declared = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    _rewritten(source, target, tensors, declared)


def from_mxfp4(source: Path, target: Path) -> None:
    """Dequantise as transformers does, in fp32."""
    stored = load_file(source / "model.safetensors")
    tensors: Tensors = {}
    for name, t in stored.items():
        stem = name.removesuffix("_blocks")
        if stem != name:
            scales = stored[f"{stem}_scales"]
            tensors[stem] = convert_moe_packed_tensors(t, scales, dtype=torch.float32)
        elif not name.endswith("_scales"):
            tensors[name] = t
    _rewritten(source, target, tensors, None)
    _undeclared(target)


def _undeclared(path: Path) -> None:
    config = json.loads((path / "config.json").read_text())
    config.pop("quantization_config", None)
    (path / "config.json").write_text(json.dumps(config))
