"""Determine the base model of each slice; some mergekit configs list it among the models, others do not."""

from __future__ import annotations

from dataclasses import replace

from streammerge.config.schema import MergeConfig, ModelSpec, Slice, members_of
from streammerge.errors import ConfigError, printable
from streammerge.methods.registry import Method
from streammerge.planning.resolve.parameters import wants_drop


def settle_base(config: MergeConfig, method: Method) -> MergeConfig:
    """Return the config with every slice's base determined, and removed from its sources if the method uses it.

    mergekit's configs often list the base among the sources, without parameters; its task vector is zero.

    Raises
    ------
    ConfigError
        If the config names a base that the method cannot use.
    """
    drops = wants_drop(config, method)
    modules = tuple(
        replace(module, slices=tuple(_settled(part, config, method, drops) for part in module.slices))
        for module in config.modules
    )
    members, listed = members_of(modules), {spec.name for spec in config.models}
    notes = tuple(
        f"{spec.path}: {printable(spec.reference)} is not listed among the models; it takes part as one more model, with "
        "the top-level weight, as in mergekit"
        for spec in members
        if spec.name not in listed
    )
    return replace(config, modules=modules, models=members, notes=(*config.notes, *notes))


def _settled(part: Slice, config: MergeConfig, method: Method, drops: bool) -> Slice:
    reference = part.base_model or config.base_model
    if reference is None:
        return part
    path = f"{part.path}.base_model" if part.base_model else f"{config.where}: base_model"
    listed = [spec for spec in part.sources if spec.reference == reference]
    layers = part.sources[0].layer_range
    base = listed[0] if listed else ModelSpec(reference, path=path, layer_range=layers)
    if method.base == "member" and not drops:
        whole = layers is None and not listed
        return replace(part, sources=(*part.sources, base)) if whole else part
    if method.base == "required" and method.n_models == (1, 1) and part.is_empty and len(part.sources) == 1:
        return replace(part, sources=(), base=part.sources[0])  # Norm and head of this model, as in mergekit.
    if method.base in ("required", "optional"):
        others = tuple(spec for spec in part.sources if spec.reference != reference)
        return replace(part, sources=others, base=base)
    if method.base == "none" and not listed and not drops:
        if layers is not None:
            return part  # As in mergekit, it provides config.json and the tokenizer.
        raise ConfigError(
            f"{path}: {method.name!r} takes no base; list the model under `models`, or remove the key"
        )
    return replace(part, base=base)
