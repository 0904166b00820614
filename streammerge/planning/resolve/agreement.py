"""Check that the models of a merge fit together: compare names, depths and widths with the template model's."""

from __future__ import annotations

import difflib
import re
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from typing import Any

from streammerge.checkpoint.index import TensorIndex
from streammerge.checkpoint.names import LANGUAGE_PARTS, OF_TOKENS, count_real, in_component
from streammerge.checkpoint.quantized.declarations import declaration_of
from streammerge.checkpoint.quantized.registry import is_read
from streammerge.config.schema import MergeConfig
from streammerge.dtypes import FLOATS
from streammerge.errors import ModelError, printable
from streammerge.formats.refs import SourceRef
from streammerge.planning.resolve.assemble import Indexes, OutputTensor
from streammerge.planning.resolve.experts import are_interleaved, has_experts, n_experts
from streammerge.planning.resolve.holes import check_holes, check_holes_of_slices

_FEW = 4
"""If more than one in this many tensors differ in shape, excluding them is not a cure."""
_MOST_COMPARED = 1000
"""The most names that a missing one is compared with."""
_OF_LABELS = ("score.weight", "classifier.weight", "out_proj.weight", "head.weight", "fc.weight")
"""Endings of the names of heads with a row per label; `OF_TOKENS` distinguishes heads with a row per token."""
_WIDTHS = (
    "hidden_size",
    "n_embd",
    "d_model",
    "dim",
    "intermediate_size",
    "moe_intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
)
"""Settings of config.json that determine shapes."""


_PUBLISHED = (
    "model.diffusion_model.",
    "first_stage_model.",
    "conditioner.embedders.",
    "cond_stage_model.",
    "double_blocks.",
    "joint_blocks.",
)
"""Beginnings of names in image models as their authors publish them: Stable Diffusion, Flux."""


def check_kinds(config: MergeConfig, template: TensorIndex, indexes: Indexes) -> None:
    """Refuse models of a different architecture, depth or width; sliced models are not checked.

    Where the models need not have the same tensors, only experts of different arithmetic are refused.

    Raises
    ------
    ModelError
        If they differ; the message names both models and the overall difference.
    """
    if any(module.is_sliced for module in config.modules):
        return
    if config.tensors != "same":
        for index in indexes.values():
            _check_arithmetic(template, index, list(template), list(index))
        return
    excluded = [re.compile(pattern) for pattern in config.exclude]

    def wanted(index: Mapping[str, SourceRef]) -> list[str]:
        return [name for name in index if not any(pattern.search(name) for pattern in excluded)]

    own = wanted(template)
    for index in indexes.values():
        if index is template:
            continue
        _check_namings(template, index)
        others = wanted(index)
        _check_experts(template, index, own, others)
        shared = [name for name in own if name in index]
        least = min(len(own), len(others))
        if 2 * len(shared) < least:
            _check_declared(template, index)
            raise ModelError(
                f"{_named(index)} and {_named(template)} share {len(shared)} of {least} tensors: different architectures"
            )
        _check_depths(template, index, own, others)
        _check_widths(template, index, shared)


def _check_declared(*models: TensorIndex) -> None:
    """Refuse a model whose weights are declared to be in a format that is not read, under names of its own."""
    for index in models:
        method = declaration_of(index.config).method
        if not is_read(method):
            raise ModelError(
                f"{printable(index.reference)}: its config.json says quant_method {printable(str(method), 60)}, which is not "
                "read: dequantise the model first (from_pretrained, dequantize(), save_pretrained), or use the weights that "
                "it was quantised from"
            )


def _named(index: TensorIndex) -> str:
    found = index.config.get("architectures")
    kind = found[0] if isinstance(found, list) and found else index.config.get("model_type")
    kind = kind or index.config.get("_class_name")
    name = printable(index.reference)
    return f"{name} ({printable(kind, 80)})" if isinstance(kind, str) else name


def _check_depths(
    template: TensorIndex, index: TensorIndex, own: Sequence[str], others: Sequence[str]
) -> None:
    """Refuse a merged stack of layers that is longer or shorter than the template model's."""
    (counts, _), (other_counts, _) = count_real(own, template.config), count_real(others, index.config)
    for prefix in (prefix for prefix in counts if prefix in other_counts):
        n, m = counts[prefix], other_counts[prefix]
        if n == m:
            continue
        raise ModelError(
            f"{printable(index.reference)} has {_layers(m)}, {printable(template.reference)} {n} ({printable(prefix, 120)}): "
            "choose layers with `slices:`, or list the others under `exclude:`"
        )


def _check_namings(template: TensorIndex, index: TensorIndex) -> None:
    """Refuse an image model with its authors' names next to one with diffusers' names: some names may be equal."""
    as_published = [any(name.startswith(_PUBLISHED) for name in one) for one in (template, index)]
    as_in_diffusers = [bool(one.folders) or "_diffusers_version" in one.config for one in (template, index)]
    if as_published != as_in_diffusers and sorted(as_published) == sorted(as_in_diffusers) == [False, True]:
        single, other = (template, index) if as_published[0] else (index, template)
        raise ModelError(
            f"{printable(single.reference)} has the names of a single file, {printable(other.reference)} those of diffusers: "
            "convert the single file first, with `from_single_file` and `save_pretrained` of its pipeline in diffusers"
        )


def _check_experts(
    template: TensorIndex, index: TensorIndex, own: Sequence[str], others: Sequence[str]
) -> None:
    """Refuse merged experts whose number or arithmetic differs from the template model's."""
    if not (has_experts(own) and has_experts(others)):
        return
    _check_arithmetic(template, index, own, others)
    n, m = n_experts(own), n_experts(others)
    if n != m and n and m:
        raise ModelError(
            f"{printable(index.reference)} has {m} experts per layer, {printable(template.reference)} {n}: to merge only the "
            "other tensors, list experts and routers under `exclude:`"
        )


def _check_arithmetic(
    template: TensorIndex, index: TensorIndex, own: Sequence[str], others: Sequence[str]
) -> None:
    if not (has_experts(own) and has_experts(others)):
        return
    if are_interleaved(own) != are_interleaved(others):
        raise ModelError(
            f"{_named(index)} and {_named(template)}: one has experts with biases and interleaved rows of gate and up "
            "projection (gpt-oss), the other has not: these models cannot be merged"
        )


def _layers(n: int) -> str:
    return f"{n} layer" if n == 1 else f"{n} layers"


def _check_widths(template: TensorIndex, index: TensorIndex, shared: Sequence[str]) -> None:
    """Refuse a model most of whose tensors differ in shape."""
    differing = [
        name
        for name in shared
        if template[name].shape != index[name].shape
        and not (name.endswith(OF_TOKENS) and template[name].shape[1:] == index[name].shape[1:])
    ]
    if len(differing) < 2 or len(differing) * _FEW <= len(shared):
        return
    first = differing[0]
    sizes = _sizes(template.config, index.config)
    why = f" ({sizes} in config.json)" if sizes else ""
    raise ModelError(
        f"{printable(index.reference)} and {printable(template.reference)}: {len(differing)} of {len(shared)} tensors differ in "
        f"shape{why}: these models cannot be merged (first: {printable(first)}, {list(index[first].shape)} and "
        f"{list(template[first].shape)})"
    )


def _sizes(template: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """Return text on the sizes that differ between two configs."""
    found = []
    for key in _WIDTHS:
        n, m = _size(template, key), _size(other, key)
        if n is not None and m is not None and n != m:
            found.append(f"{key} {m} and {n}")
    return ", ".join(found[:3])


def _size(config: Mapping[str, Any], key: str) -> int | None:
    parts = [config, *(config.get(name) for name in LANGUAGE_PARTS)]
    found = [part.get(key) for part in parts if isinstance(part, dict)]
    return next((n for n in found if type(n) is int), None)


def lacking(reference: str, first: str, outputs: Sequence[OutputTensor], indexes: Indexes) -> ModelError:
    """Return the error for a model that lacks tensors of the output.

    Parameters
    ----------
    first
        The model's own name of the first missing tensor.
    """
    place = _holder(outputs[0], indexes)
    holder = printable(place)
    if len(outputs) == 1:
        what, them = f"tensor {printable(first)} is missing, {holder} has it", "it"
    elif len(outputs) == 2:
        what, them = f"tensor {printable(first)} and 1 more are missing, {holder} has them", "them"
    else:
        parts = counted([output.name for output in outputs], indexes[reference])
        what = (
            f"tensor {printable(first)} and {len(outputs) - 1} more are missing, {holder} has them ({parts})"
        )
        them = "them"
    like = _spelled_like(first, indexes[reference], indexes.get(place, {}))
    rename = "" if like is None else f", or rename {printable(like)}, which {holder} has not"
    return ModelError(
        f"{printable(reference)}: {what}; list {them} under `exclude:` to copy {them} from there{rename}"
    )


def _spelled_like(name: str, own: Mapping[str, SourceRef], other: Mapping[str, SourceRef]) -> str | None:
    """Return a name that is nearly `name`, with the same numbers, and that only `own` has; None if there is none."""

    def numbers(text: str) -> list[str]:
        return re.findall(r"\d+", text, flags=re.ASCII)

    alike = [one for one in own if one not in other and numbers(one) == numbers(name)]
    return next(iter(difflib.get_close_matches(name, alike[:_MOST_COMPARED], n=1, cutoff=0.9)), None)


def _holder(output: OutputTensor, indexes: Indexes) -> str:
    """Return a model that has an output tensor's tensor."""
    base = [] if output.part.base is None else [(output.part.base.reference, output.base)]
    places = (output.template, *base, *((spec.reference, name) for spec, name in output.models))
    return next((place for place, name in places if name in indexes[place]), output.template[0])


def counted(names: Sequence[str], present: Iterable[str]) -> str:
    """Summarise names by a prefix that they share and `present` lacks, with the number of names.

    >>> counted(["model.visual.a.w", "model.visual.b.w", "model.head.w"], ["model.norm.w"])
    'model.visual (2 tensors), model.head.w'
    """
    known = {name[:end] for name in present for end in _ends(name)}
    counts: dict[str, int] = {}
    alone: dict[str, str] = {}
    for name in names:
        stem = next((name[:end] for end in _ends(name) if name[:end] not in known), name)
        counts[stem] = counts.get(stem, 0) + 1
        alone.setdefault(stem, name)
    listed = [
        f"{printable(stem, 120)} ({n} tensors)" if n > 1 else printable(alone[stem], 120)
        for stem, n in sorted(counts.items(), key=lambda item: -item[1])[:4]
    ]
    more = f" and {len(counts) - 4} more" if len(counts) > 4 else ""
    return ", ".join(listed) + more


def _ends(name: str) -> Iterator[int]:
    """Yield the ends of a name's parts: of its component, with the slash; then of all but the last, without the dot."""
    component = len(in_component(name)[0])
    if component:
        yield component
    at = name.find(".", component)
    while at > 0:
        yield at
        at = name.find(".", at + 1)


def compare_names(
    config: MergeConfig,
    outputs: Sequence[OutputTensor],
    template: TensorIndex,
    indexes: Indexes,
    excluded: Sequence[re.Pattern[str]],
) -> list[str]:
    """Return warnings about unused tensors; refuse a tensor that only the template model lacks."""
    warnings = []
    for index in indexes.values():
        warnings += [f"{printable(index.reference)}: {note}" for note in index.notes]
        if index.unlisted:
            warnings.append(
                f"{printable(index.reference)}: {len(index.unlisted)} tensors in its shards are not "
                f"in its index and are left out (first: {printable(index.unlisted[0])})"
            )
    whole = len(config.modules) == 1 and not config.modules[0].is_sliced and config.modules[0].name is None
    if not whole or config.tensors != "same":
        check_holes_of_slices(outputs, indexes, excluded)
        return warnings
    names = {output.name for output in outputs}
    models = [indexes[spec.reference] for spec in config.models]
    extra_everywhere = [
        n
        for n in models[0]
        if n not in names and all(n in model for model in models) and not any(p.search(n) for p in excluded)
    ]
    if extra_everywhere and any(model is not template for model in models):
        raise _template_lacks(template, extra_everywhere, many=len(models) > 1)
    for model in (index for index in indexes.values() if any(index is model for model in models)):
        extra = [name for name in model if name not in names]
        _check_biases(template, model, extra, names, excluded)
        check_holes(template, model, extra, excluded)
        if extra:
            one = len(extra) == 1
            parts = "" if one else f": {counted(extra, names)}"
            warnings.append(
                f"{printable(model.reference)}: {len(extra)} tensor{'' if one else 's'} that "
                f"{printable(template.reference)} lacks {'is' if one else 'are'} left out "
                f"(first: {printable(extra[0])}){parts}"
            )
    return warnings


def _check_biases(
    template: TensorIndex,
    model: TensorIndex,
    extra: Sequence[str],
    names: Container[str],
    excluded: Sequence[re.Pattern[str]],
) -> None:
    """Refuse a model whose layers have biases, if the output would have their weights but not the biases."""
    lost = [
        name
        for name in extra
        if name.endswith(".bias")
        and f"{name.removesuffix('bias')}weight" in names
        and any(part.isdigit() for part in name.split("."))
        and not any(pattern.search(name) for pattern in excluded)
    ]
    if lost:
        raise ModelError(
            f"{_named(model)} has {len(lost)} biases in its layers that {_named(template)} lacks (first: "
            f"{printable(lost[0])}): these are different architectures; list the biases under `exclude:` to leave them out"
        )


def _template_lacks(template: TensorIndex, names: Sequence[str], *, many: bool) -> ModelError:
    n = len(names)
    first = f"tensor {printable(names[0])}"
    what = f"{first} is" if n == 1 else f"{first} and {n - 1} more are"
    them = "it" if n == 1 else "them"
    having = "all other models have" if many else "the other model has"
    parts = "" if n < 3 else f" ({counted(names, template)})"
    return ModelError(
        f"{printable(template.reference)}: {what} missing, {having} {them}{parts}; list {them} under `exclude:` to leave "
        f"{them} out"
    )


def check_shapes(name: str, inputs: Sequence[SourceRef]) -> None:
    """Refuse a tensor whose shapes or kinds of dtype differ between the models."""
    first = inputs[0]
    for ref in inputs[1:]:
        if ref.shape != first.shape:
            embeds = (
                len(ref.shape) == len(first.shape) == 2
                and ref.shape[1] == first.shape[1]
                and not any(part.isdigit() for part in name.split("."))
                and (name.endswith(OF_TOKENS) or not name.endswith(_OF_LABELS))
            )
            cause = (
                "vocabularies differ: align them with `tokenizer_source: union` (or base, or a model), or "
                if embeds
                else "shapes differ: "
            )
            raise ModelError(
                f"tensor {printable(name)}: {list(ref.shape)} in {printable(ref.path)}, {list(first.shape)} in "
                f"{printable(first.path)}; {cause}list it under `exclude:` to copy it from one model"
            )
        if (ref.dtype in FLOATS) != (first.dtype in FLOATS):
            raise ModelError(
                f"tensor {printable(name)}: {ref.dtype} in {printable(ref.path)}, {first.dtype} in {printable(first.path)}; "
                "these dtypes cannot be merged; list it under `exclude:` to copy it from one model"
            )
