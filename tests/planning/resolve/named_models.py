"""Models of one content under different names."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from streammerge.api import merge
from tests.conftest import read_tensors, write_model

Tensors = dict[str, torch.Tensor]


LAYER = {"self_attn.q_proj.weight": (8, 8), "mlp.up_proj.weight": (12, 8), "input_layernorm.weight": (8,)}


TOWER = {
    "encoder.layers.0.self_attn.q_proj.weight": (8, 8),
    "encoder.layers.1.self_attn.q_proj.weight": (8, 8),
    "patch.weight": (8, 3),
}


def normal(seed: int, shapes: Mapping[str, tuple[int, ...]]) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def text(
    seed: int, prefix: str = "model.", head: str = "lm_head.weight", layers: int = 2, h: int = 8
) -> Tensors:
    shapes: dict[str, tuple[int, ...]] = {
        f"{prefix}embed_tokens.weight": (32, h),
        f"{prefix}norm.weight": (h,),
    }
    for i in range(layers):
        shapes |= {f"{prefix}layers.{i}.{k}": tuple(h if n == 8 else n for n in s) for k, s in LAYER.items()}
    return normal(seed, shapes | ({head: (32, h)} if head else {}))


def tower(
    seed: int, prefix: str = "model.vision_tower.", projector: str = "model.multi_modal_projector."
) -> Tensors:
    shapes = {prefix + name: shape for name, shape in TOWER.items()}
    return normal(seed + 100, shapes | {f"{projector}linear.weight": (8, 8)})


def write(path: Path, tensors: Tensors, **config: Any) -> Path:
    write_model(path, tensors)
    (path / "config.json").write_text(json.dumps({"torch_dtype": "float32", **config}))
    return path


def linear(*paths: Path, **top: Any) -> dict[str, Any]:
    weights = [0.25, 0.75, 0.5][: len(paths)]
    models = [{"model": str(p), "parameters": {"weight": w}} for p, w in zip(paths, weights, strict=True)]
    return {"merge_method": "linear", "models": models, "parameters": {"normalize": False}, **top}


def merged(config: Mapping[str, Any], out: Path) -> Tensors:
    merge(config, out, memory="1GiB", kernels=False)
    return read_tensors(out)
