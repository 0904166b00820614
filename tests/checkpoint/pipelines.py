"""Pipelines of diffusers, made by hand: the names of SDXL's parts, a few numbers each."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]
UNET = {
    "conv_in.weight": (4, 2, 3, 3),
    "down_blocks.0.resnets.0.norm1.weight": (4,),
    "down_blocks.0.resnets.1.conv1.weight": (4, 4, 3, 3),
    "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.weight": (8, 8),
    "down_blocks.1.attentions.0.transformer_blocks.0.ff.net.0.proj.weight": (16, 8),
    "down_blocks.1.resnets.0.conv1.weight": (8, 4, 3, 3),
    "down_blocks.2.attentions.1.transformer_blocks.1.attn2.to_k.weight": (8, 8),
    "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight": (8, 8),
    "up_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q.weight": (8, 8),
    "up_blocks.1.attentions.2.transformer_blocks.0.attn1.to_q.weight": (8, 8),
    "up_blocks.2.resnets.2.conv1.weight": (4, 8, 3, 3),
    "conv_out.weight": (2, 4, 3, 3),
}
VAE = {"encoder.conv_in.weight": (4, 3, 3, 3), "decoder.conv_out.bias": (3,)}
TEXT = {
    "text_model.embeddings.token_embedding.weight": (12, 8),
    "text_model.encoder.layers.0.self_attn.q_proj.weight": (8, 8),
    "text_model.encoder.layers.1.mlp.fc1.weight": (16, 8),
    "text_model.final_layer_norm.weight": (8,),
}
SHAPES: dict[str, Mapping[str, tuple[int, ...]]] = {
    "unet": UNET,
    "vae": VAE,
    "text_encoder": TEXT,
    "text_encoder_2": TEXT,
}
CLASSES = {
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "scheduler": ["diffusers", "EulerDiscreteScheduler"],
}
INDEX: dict[str, Any] = {
    "_class_name": "StableDiffusionXLPipeline",
    "_diffusers_version": "0.35.0",
    **CLASSES,
    "image_encoder": [None, None],
    "force_zeros_for_empty_prompt": True,
}


def stem_of(folder: str) -> str:
    return "model" if folder.startswith("text") else "diffusion_pytorch_model"


def write_component(directory: Path, tensors: Mapping[str, torch.Tensor], variant: str = "") -> Path:
    """Write the weights and the config.json of one component, into the folder of its name."""
    directory.mkdir(parents=True, exist_ok=True)
    stem = stem_of(directory.name)
    save_file(dict(tensors), directory / f"{stem}{variant}.safetensors", metadata={"format": "pt"})
    own = {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model", "dtype": "float16"}
    config = (
        own
        if stem == "model"
        else {"_class_name": CLASSES[directory.name][1], "_diffusers_version": "0.35.0"}
    )
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def write_pipeline(
    directory: Path, seed: int, dtype: torch.dtype = torch.float32, shapes: Mapping[str, Any] = SHAPES
) -> Path:
    """Write a pipeline with the components of `shapes`, a tokenizer and a scheduler."""
    generator = torch.Generator().manual_seed(seed)
    for folder, some in shapes.items():
        tensors = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in some.items()}
        write_component(directory / folder, tensors)
    (directory / "tokenizer").mkdir(parents=True)
    (directory / "tokenizer" / "vocab.json").write_text('{"a": 0}')
    (directory / "scheduler").mkdir()
    (directory / "scheduler" / "scheduler_config.json").write_text("{}")
    listed = {name: value for name, value in INDEX.items() if name not in SHAPES or name in shapes}
    (directory / "model_index.json").write_text(json.dumps(listed))
    return directory


def tensors_of(directory: Path) -> Tensors:
    """Return all tensors of a pipeline, as ``component/name``."""
    return {
        f"{file.parent.name}/{name}": tensor
        for file in sorted(directory.glob("*/*.safetensors"))
        for name, tensor in load_file(file).items()
    }
