"""Names of the modules of image models: those of diffusers, of Stable Diffusion's own files, and of LoRA files for both.

A LoRA file of kohya names a module with underscores for dots (``lora_unet_down_blocks_0_…``), so names are compared in
this form. The UNets of Stable Diffusion have two sets of names: diffusers' ``down_blocks``, and ``input_blocks`` of the
published files. Both are converted to the latter; the correspondence is that of diffusers' ``convert_from_ckpt``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from streammerge.lazy import late_pattern

Place = tuple[str, str]
"""A part of an image model (``unet``, ``te1``), and a module in it with underscores for dots."""
_OF_COMPONENT = {"text_encoder": "te1", "text_encoder_2": "te2", "text_encoder_3": "te3"}
_DOTTED = (
    ("unet.", "unet"),
    ("transformer.", "transformer"),
    ("text_encoder.", "te1"),
    ("text_encoder_2.", "te2"),
    ("text_encoder_3.", "te3"),
)
"""How names in diffusers' LoRA files begin."""
_FLAT = (
    ("lora_unet_", "unet"),
    ("lora_transformer_", "transformer"),
    ("lora_te1_", "te1"),
    ("lora_te2_", "te2"),
    ("lora_te3_", "te3"),
    ("lora_te_", "te1"),
)
"""How names in kohya's LoRA files begin."""
_SINGLE = (
    ("model.diffusion_model.", "unet"),
    ("cond_stage_model.transformer.", "te1"),
    ("conditioner.embedders.0.transformer.", "te1"),
)
"""How names of the parts of a single file begin."""
_LAYERS = 2
"""Layers of a block in the UNets whose files have names of their own."""
_WHOLE = {
    "conv_in": "input_blocks_0_0",
    "conv_out": "out_2",
    "time_embedding_linear_1": "time_embed_0",
    "time_embedding_linear_2": "time_embed_2",
    "add_embedding_linear_1": "label_emb_0_0",
    "add_embedding_linear_2": "label_emb_0_2",
}
_IN_RESNET = {
    "conv1": "in_layers_2",
    "time_emb_proj": "emb_layers_1",
    "conv2": "out_layers_3",
    "conv_shortcut": "skip_connection",
}
_MIDDLE = {("resnets", 0): 0, ("attentions", 0): 1, ("resnets", 1): 2}
_BLOCK = late_pattern(
    r"(?:(?P<side>down|up)_blocks_(?P<block>\d{1,3})|mid_block)_(?P<kind>resnets|attentions|downsamplers|upsamplers)"
    r"_(?P<layer>\d{1,3})_(?P<rest>.*)",
    re.ASCII | re.DOTALL,
)
_RESIZED = late_pattern(r"(input|output)_blocks_(\d{1,3})_[012]_(?:op|conv)", re.ASCII)
"""The convolutions between blocks; their place in the block depends on what else is in it."""


def place_of_lora(name: str) -> Place | None:
    """Return the place of a module that a LoRA file names; None if the name begins with no part of an image model.

    >>> place_of_lora("unet.mid_block.attentions.0.proj_in"), place_of_lora("lora_te1_text_model_encoder_layers_0_mlp_fc1")
    (('unet', 'middle_block_1_proj_in'), ('te1', 'encoder_layers_0_mlp_fc1'))
    """
    for begin, part in (*_DOTTED, *_FLAT):
        if name.startswith(begin):
            return part, _canonical(part, name.removeprefix(begin))
    return None


def places_of_modules(modules: Iterable[str]) -> dict[Place, list[str]]:
    """Return the modules of an image model by place: a pipeline's, a component's, or a single file's."""
    found: dict[Place, list[str]] = {}
    for module in modules:
        for part, inner in _parts(module):
            found.setdefault((part, _canonical(part, inner)), []).append(module)
    return found


def _parts(module: str) -> list[Place]:
    """Return the parts that a module may be in; a component by itself may be any."""
    component, slash, inner = module.partition("/")
    if slash:
        return [(_OF_COMPONENT.get(component, component), inner)]
    for begin, part in _SINGLE:
        if module.startswith(begin):
            return [(part, module.removeprefix(begin))]
    return [(part, module) for part in ("unet", "transformer", "te1", "te2", "te3")]


def _canonical(part: str, module: str) -> str:
    flat = module.replace(".", "_")
    if part != "unet":
        return flat.removeprefix("text_model_")  # which transformers 5 does not write
    resized = _RESIZED.fullmatch(flat)
    if resized:
        return f"{resized[1]}_blocks_{resized[2]}_resized"
    if flat in _WHOLE:
        return _WHOLE[flat]
    match = _BLOCK.fullmatch(flat)
    if match is None:
        return flat
    kind, layer, rest = match["kind"], int(match["layer"]), match["rest"]
    rest = _IN_RESNET.get(rest, rest) if kind == "resnets" else rest
    if match["side"] is None:
        place = _MIDDLE.get((kind, layer))
        return flat if place is None else f"middle_block_{place}_{rest}"
    side, first = ("input", 1) if match["side"] == "down" else ("output", 0)
    begins = first + int(match["block"]) * (_LAYERS + 1)
    if kind in ("downsamplers", "upsamplers"):
        return f"{side}_blocks_{begins + _LAYERS}_resized"
    return f"{side}_blocks_{begins + layer}_{0 if kind == 'resnets' else 1}_{rest}"
