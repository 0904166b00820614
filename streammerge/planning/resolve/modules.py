"""Find the tensors of a module by their names, such as the vision tower of a vision-language model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from streammerge.checkpoint.index import TensorIndex
from streammerge.checkpoint.names import in_component
from streammerge.config.schema import Module
from streammerge.errors import ConfigError, printable

Owned = Mapping[str, Sequence[str]]
"""Names of a module's tensors in file order, by model reference."""

_PROJECTOR = "multi_modal_projector"
_COMPONENTS = {
    "vision_tower": (
        "vision_tower",
        "vision_model",
        "vision_encoder",
        "visual",
        "vit",
        "vision_embed_tokens",
        "vpm",
    ),
    _PROJECTOR: (
        "multi_modal_projector",
        "mm_projector",
        "multimodal_projector",
        "connector",
        "projector",
        "embed_vision",
        "aligner",
        "vision_adapter",
        "vision_projection",
        "vision_proj",
        "mlp1",
        "resampler",
        "modality_projection",
    ),
    "audio_tower": ("audio_tower", "audio_encoder"),
    "encoder": ("encoder",),
    "decoder": ("decoder",),
}
"""The parts of tensor names that identify each of mergekit's modules."""
_MERGERS = ("merger", "merger_list", "deepstack_merger_list", "patch_merger", "perceive")
"""Projectors stored inside the tower (Qwen2-VL and later, GLM-4V). They belong to the tower unless the projector has its
own module."""
_REST = ("text_decoder", "language_model", "text_model", "default")
"""Names of modules, as in mergekit, that own every tensor which no other module owns."""
_TOWERS = ("vision_tower", _PROJECTOR, "audio_tower")
_AFTER = ("decoder",)
"""Modules that own tensors outside both stacks (``shared``, ``lm_head``) if there is no text decoder."""


def split_modules(
    modules: Sequence[Module], template: TensorIndex, indexes: Mapping[str, TensorIndex]
) -> tuple[list[Owned], list[str]]:
    """Return the tensors that each module owns in each model, and warnings.

    Raises
    ------
    ConfigError
        If the template model lacks a module.
    """
    if [module.name for module in modules] == [None]:
        return [{reference: tuple(index) for reference, index in indexes.items()}], []
    names = [str(module.name) for module in modules]
    owned: list[dict[str, list[str]]] = [{reference: [] for reference in indexes} for _ in modules]
    left: list[str] = []
    for reference, index in indexes.items():
        for tensor in index:
            place = owner(tensor, names)
            if place is not None:
                owned[place][reference].append(tensor)
            elif reference == template.reference:
                left.append(tensor)
    for module, own in zip(modules, owned, strict=True):
        if not own[template.reference]:
            heads = sorted({name.split(".")[0] for name in template})[:6]
            raise ConfigError(
                f"{module.path}: no tensor of {printable(template.reference)} belongs to this module: the model's names begin with "
                f"{printable(', '.join(heads), 200)}"
            )
    notes = []
    if left:
        notes.append(
            f"{len(left)} tensors of {printable(template.reference)} belong to no module and are left out "
            f"(first: {printable(left[0])})"
        )
    return list(owned), notes


def owner(tensor: str, modules: Sequence[str]) -> int | None:
    """Return the index in `modules` of the module that owns a tensor; None if none does.

    >>> owner("model.vision_tower.encoder.layers.0.w", ["text_decoder", "vision_tower"])
    1
    >>> owner("lm_head.weight", ["text_decoder", "vision_tower"])
    0
    >>> owner("vae/decoder.conv_in.weight", ["unet", "vae"])
    1
    """
    component = in_component(tensor)[0][:-1]
    if component in modules:
        return modules.index(component)
    parts = tensor.split(".")
    if _PROJECTOR in modules and _is_merger(parts):
        return modules.index(_PROJECTOR)
    claims = {name: _position(parts, _COMPONENTS.get(name, (name,))) for name in {*modules, *_COMPONENTS}}
    claims = {
        name: position for name, position in claims.items() if position is not None and name not in _REST
    }
    if claims:
        first = min(claims, key=lambda name: (claims[name], name not in modules))
        if first in modules:
            return modules.index(first)
        if first not in ("encoder", "decoder"):
            return None
    exact = [i for i, name in enumerate(modules) if name in _REST and name in parts]
    rest = [i for i, name in enumerate(modules) if name in _REST]
    return next(iter([*exact, *rest, *(i for i, name in enumerate(modules) if name in _AFTER)]), None)


def of_a_tower(tensor: str) -> bool:
    """Return whether a tensor belongs to a part that text models lack: a tower, or its projector.

    >>> of_a_tower("model.visual.blocks.0.norm.weight"), of_a_tower("model.layers.0.mlp.up_proj.weight")
    (True, False)
    """
    parts = tensor.split(".")
    return any(_position(parts, _COMPONENTS[name]) is not None for name in _TOWERS)


def _is_merger(parts: Sequence[str]) -> bool:
    tower = _position(parts, _COMPONENTS["vision_tower"])
    return tower is not None and parts[tower + 1 : tower + 2] != [] and parts[tower + 1] in _MERGERS


def _position(parts: Sequence[str], words: Iterable[str]) -> int | None:
    found = [parts.index(word) for word in words if word in parts]
    return min(found) if found else None
