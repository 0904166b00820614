"""Small models and adapters on disk, and an adapter's formula in fp64 and torch alone."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

PREFIX = "base_model.model."
SHAPES: dict[str, tuple[int, ...]] = {
    "model.embed_tokens.weight": (48, 24),
    "model.layers.0.q_proj.weight": (40, 24),
    "model.layers.0.q_proj.bias": (40,),
    "model.layers.0.c_attn.weight": (24, 72),
    "model.norm.weight": (24,),
}
Q, C = "model.layers.0.q_proj", "model.layers.0.c_attn"
Tensors = Mapping[str, torch.Tensor]


def write_base(
    directory: Path, dtype: torch.dtype = torch.bfloat16, seed: int = 0, **extra: torch.Tensor
) -> Path:
    """Write a model of `SHAPES`."""
    generator = torch.Generator().manual_seed(seed)
    directory.mkdir(parents=True)
    tensors = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}
    save_file({**tensors, **extra}, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 48}))
    return directory


def write_adapter(directory: Path, tensors: Tensors, **settings: Any) -> Path:
    """Write an adapter; names are those of PEFT without what it puts before all of them."""
    directory.mkdir(parents=True, exist_ok=True)
    save_file(
        {PREFIX + name: t.clone().contiguous() for name, t in tensors.items()},
        directory / "adapter_model.safetensors",
    )
    entries = {"peft_type": "LORA", "r": 8, "lora_alpha": 16} | settings
    (directory / "adapter_config.json").write_text(json.dumps(entries))
    return directory


def factors(
    module: str, inputs: int, outputs: int, rank: int, seed: int = 1, dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    """Return lora_A and lora_B of a linear module."""
    generator = torch.Generator().manual_seed(seed)
    return {
        f"{module}.lora_A.weight": torch.randn((rank, inputs), generator=generator).to(dtype),
        f"{module}.lora_B.weight": torch.randn((outputs, rank), generator=generator).to(dtype),
    }


def adapted(
    weight: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    scale: float,
    *,
    transposed: bool = False,
    magnitude: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return ``W + s B A`` in fp64, and with a magnitude DoRA's; transposed: of a weight stored as (in, out)."""
    change = scale * (b.double().flatten(1) @ a.double().flatten(1))
    if not transposed:
        change = change.reshape(weight.shape)
    whole = (weight.double().T if transposed else weight.double()) + change
    if magnitude is not None:
        norms = whole.flatten(1).norm(dim=1)
        whole = whole * (magnitude.double() / norms).reshape(-1, *[1] * (whole.dim() - 1))
    return whole.T if transposed else whole


def in_order(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    """Return ``W + s B A`` step by step in fp32, as documented: what is computed must have these bits."""
    total = torch.zeros(weight.shape)
    for k in range(a.shape[0]):
        total = total + b[:, k : k + 1].float() * a[k].float()
    return weight.float() + total * torch.tensor(scale, dtype=torch.float32)


def scale_of(rank: int, alpha: float, *, rank_stabilised: bool = False) -> float:
    """Return what the product of the factors is multiplied by."""
    return alpha / math.sqrt(rank) if rank_stabilised else alpha / rank
