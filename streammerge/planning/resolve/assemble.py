"""Assemble the output by names and layers: its tensors, and the models' tensors that each is merged from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from streammerge.checkpoint.index import TensorIndex
from streammerge.checkpoint.names import (
    count_real,
    depth_of,
    is_head,
    is_input_side,
    lies_apart,
    shared_as,
    tied_to,
)
from streammerge.config.schema import MergeConfig, ModelSpec, Module, Slice
from streammerge.config.settings import Setting
from streammerge.errors import ConfigError, printable
from streammerge.planning.resolve.modules import split_modules
from streammerge.records import dataclass

Indexes = Mapping[str, TensorIndex]
"""Every model by its reference."""


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """One output tensor by name, with the models' tensors that it is merged from, and its settings."""

    name: str
    part: Slice
    sources: tuple[str, ...]
    """The tensor's name in each source of the slice."""
    base: str
    """The tensor's name in the slice's base."""
    template: tuple[str, str]
    """Reference of a model and name of its tensor, which determines the dtype, and is copied if nothing is merged."""
    depth: float
    """Relative depth in its stack of layers, from 0 to 1."""
    levels: tuple[Mapping[str, Setting], ...]
    """The settings shared by all sources, by descending precedence."""

    @property
    def models(self) -> list[tuple[ModelSpec, str]]:
        """The sources, each with the tensor's name there."""
        return list(zip(self.part.sources, self.sources, strict=True))


@dataclass(frozen=True)
class Stack:
    """The layers of the output."""

    module: str | None
    prefix: str
    """The prefix of the tensors' names: ``model.layers``."""
    before: int
    """Number of layers of the template model."""
    layers: tuple[tuple[str, int], ...]
    """For each layer of the output, its model (the first of several) and its index there."""
    extra_before: int = 0
    """Number of the template model's layers for multi-token prediction, after the last regular layer."""
    extra: int = 0
    """Number of such extra layers of the output."""


@dataclass(frozen=True)
class Assembly:
    """The tensors and the stacks of layers of the output."""

    outputs: tuple[OutputTensor, ...]
    stacks: tuple[Stack, ...]
    """The stacks that are assembled from slices."""
    notes: tuple[str, ...]


def assemble(config: MergeConfig, template: TensorIndex, indexes: Indexes) -> Assembly:
    """Return the tensors of the output.

    Whole models give the tensors of the base, or of the first model without a base. Slices give the layers of their first
    sources, one after the other; the first slice provides the tensors on the input side, the last slice all others.

    Raises
    ------
    ConfigError
        If a slice or a module does not fit the models.
    """
    owners, notes = split_modules(config.modules, template, indexes)
    outputs: list[OutputTensor] = []
    stacks: list[Stack] = []
    for module, own in zip(config.modules, owners, strict=True):
        if module.is_sliced:
            stack, found, told = _stacked(config, module, own, template, indexes)
            stacks.append(stack)
            outputs += found
            notes += told
        else:
            outputs += _whole(config, module, own, template, indexes)
    names: set[str] = set()
    for output in outputs:
        if output.name in names:
            raise ConfigError(f"{config.where}: two modules or slices write tensor {printable(output.name)}")
        names.add(output.name)
    return Assembly(tuple(outputs), tuple(stacks), tuple(notes))


def _template_of(part: Slice, template: TensorIndex) -> str:
    if part.base is not None:
        return part.base.reference
    references = [spec.reference for spec in part.sources]
    return template.reference if template.reference in references else references[0]


def _levels(config: MergeConfig, module: Module, part: Slice) -> tuple[Mapping[str, Setting], ...]:
    return part.parameters, module.parameters, config.parameters


def _whole(
    config: MergeConfig,
    module: Module,
    own: Mapping[str, Sequence[str]],
    template: TensorIndex,
    indexes: Indexes,
) -> Iterator[OutputTensor]:
    (part,) = module.slices
    reference = _template_of(part, template)
    lenders = dict.fromkeys((*own[reference], *_heads(part, reference, own, indexes)), reference)
    if config.tensors != "same":
        for name, other in _further(part, reference, own, indexes):
            lenders.setdefault(name, other)
    counts, _ = count_real(lenders, indexes[reference].config)
    levels = _levels(config, module, part)
    for name, lender in lenders.items():
        yield OutputTensor(
            name,
            part,
            (name,) * len(part.sources),
            name,
            (lender, name),
            depth_of(name, counts),
            levels,
        )


def _further(
    part: Slice, reference: str, own: Mapping[str, Sequence[str]], indexes: Indexes
) -> Iterator[tuple[str, str]]:
    """Yield the tensors of other models that the model `reference` lacks under any name, each with its model."""
    for spec in part.sources:
        for name in own[spec.reference]:
            if shared_as(indexes[reference], name) is None:
                yield name, spec.reference


def _heads(
    part: Slice,
    reference: str,
    own: Mapping[str, Sequence[str]],
    indexes: Indexes,
    untied: Sequence[str] = (),
) -> list[str]:
    """Return the heads that a slice's other models, or models in `untied`, store and this one ties to its embedding.

    The embedding of an output that is assembled from slices may be another model's: if that one, or the one that lends
    config.json, has a head of its own, the output's embedding is no head.
    """
    others = [*part.sources, *([part.base] if part.base is not None else [])]
    references = dict.fromkeys([*(spec.reference for spec in others), *untied])
    found = dict.fromkeys(name for other in references for name in own[other] if is_head(name))
    return [
        name for name in found if tied_to(indexes[reference], indexes[reference].config, name) is not None
    ]


def _stacked(
    config: MergeConfig,
    module: Module,
    own: Mapping[str, Sequence[str]],
    template: TensorIndex,
    indexes: Indexes,
) -> tuple[Stack, list[OutputTensor], list[str]]:
    """Return the tensors of a module's slices, layer after layer, the tensors outside the layers, and warnings."""
    places = {
        reference: _stack_of(names, reference, module, indexes[reference].config)
        for reference, names in own.items()
    }
    outputs: list[OutputTensor] = []
    layers: list[tuple[str, int]] = []
    first, last = module.slices[0], module.slices[-1]
    prefix = places[_leader(first).reference].prefix
    outputs += _loose(config, module, first, places, input_side=True)
    for part in module.slices:
        leader = _leader(part)
        start, end = _range(leader, places[leader.reference])
        for spec in part.sources:
            _range(spec, places[spec.reference])
        names = places[leader.reference].by_layer
        for step in range(end - start):
            depth = step / (end - start - 1) if end - start > 1 else 1.0
            for rest in names.get(start + step, ()):
                lender = part.base or leader
                outputs.append(
                    OutputTensor(
                        f"{prefix}.{len(layers)}.{rest}",
                        part,
                        tuple(_layer_name(spec, step, rest, places) for spec in part.sources),
                        "" if part.base is None else _layer_name(part.base, step, rest, places),
                        (lender.reference, _layer_name(lender, step, rest, places)),
                        depth,
                        _levels(config, module, part),
                    )
                )
            layers.append((leader.reference, start + step))
    outputs += _loose(config, module, last, places, input_side=False)
    outputs += _extra(config, module, last, places, len(layers))
    for name in _heads(
        last, _leader(last).reference, own, indexes, (template.reference, _leader(first).reference)
    ):
        outputs.append(_outside(config, module, last, name))
    before, tail = places[template.reference], places[_leader(last).reference]
    stack = Stack(module.name, prefix, before.count, tuple(layers), before.extra, tail.extra)
    return stack, outputs, _lost(places, _leader(last).reference)


def _leader(part: Slice) -> ModelSpec:
    """Return the model whose names a slice uses: the first source, or the base if there is no source."""
    if part.sources:
        return part.sources[0]
    assert part.base is not None
    return part.base


@dataclass(frozen=True)
class _Place:
    """The only stack of layers of a model, or of its part in a module."""

    prefix: str
    count: int
    by_layer: Mapping[int, list[str]]
    """The names of each layer's tensors after the layer's number; extra layers included."""
    loose: tuple[str, ...]
    """The names outside the layers."""
    extra: int = 0
    """Number of layers for multi-token prediction, after the last regular layer."""
    apart: tuple[str, ...] = ()
    """The names of extra layers that are not part of the stack."""


def _stack_of(names: Sequence[str], reference: str, module: Module, settings: Mapping[str, Any]) -> _Place:
    counts, extra = count_real(names, settings)
    if len(counts) != 1:
        found = ", ".join(printable(prefix, 60) for prefix in sorted(counts)[:4]) or "none"
        cure = "give each of them its own slices under `modules:`" if counts else "list it under `models:`"
        raise ConfigError(
            f"{module.path.rstrip(':')}: slices need one stack of layers, {printable(reference)} has {len(counts)} "
            f"({found}); {cure}"
        )
    ((prefix, count),) = counts.items()
    by_layer: dict[int, list[str]] = {}
    loose = []
    for name in names:
        number, _, rest = name[len(prefix) + 1 :].partition(".")
        if name.startswith(f"{prefix}.") and number.isascii() and number.isdigit():
            by_layer.setdefault(int(number), []).append(rest)
        elif not lies_apart(name):
            loose.append(name)
    apart = tuple(name for name in names if lies_apart(name))
    return _Place(prefix, count, by_layer, tuple(loose), extra[prefix], apart)


def _range(spec: ModelSpec, place: _Place) -> tuple[int, int]:
    assert spec.layer_range is not None
    first, end = spec.layer_range
    if end > place.count:
        kept = f" (the {place.extra} after them, for multi-token prediction, are kept automatically)"
        raise ConfigError(
            f"{spec.path}.layer_range: [{first}, {end}] ends beyond the {place.count} layers of "
            f"{printable(spec.reference)}{kept if place.extra else ''}"
        )
    return first, end


def _layer_name(spec: ModelSpec, step: int, rest: str, places: Mapping[str, _Place]) -> str:
    assert spec.layer_range is not None
    number = spec.layer_range[0] + step
    return f"{places[spec.reference].prefix}.{number}.{rest}"


def _loose(
    config: MergeConfig, module: Module, part: Slice, places: Mapping[str, _Place], *, input_side: bool
) -> Iterator[OutputTensor]:
    """Yield the output tensors on one side of the layers."""
    for name in places[_leader(part).reference].loose:
        if is_input_side(name) == input_side:
            yield _outside(config, module, part, name)


def _extra(
    config: MergeConfig, module: Module, part: Slice, places: Mapping[str, _Place], n_layers: int
) -> Iterator[OutputTensor]:
    """Yield the output tensors after the last layer, renumbered, merged from each source of the last slice."""
    lender, place = part.base or _leader(part), places[_leader(part).reference]
    levels = _levels(config, module, part)

    def name_in(spec: ModelSpec, step: int, rest: str) -> str:
        return f"{places[spec.reference].prefix}.{places[spec.reference].count + step}.{rest}"

    for step in range(place.extra):
        for rest in place.by_layer.get(place.count + step, ()):
            yield OutputTensor(
                f"{place.prefix}.{n_layers + step}.{rest}",
                part,
                tuple(name_in(spec, step, rest) for spec in part.sources),
                "" if part.base is None else name_in(part.base, step, rest),
                (lender.reference, name_in(lender, step, rest)),
                1.0,
                levels,
            )
    for name in place.apart:
        yield replace(_outside(config, module, part, name), depth=1.0)


def _lost(places: Mapping[str, _Place], last: str) -> list[str]:
    """Return warnings on layers for multi-token prediction that are left out, since the last slice has none."""
    place = places[last]
    if place.extra or place.apart:
        return []
    return [
        f"{printable(reference)}: its layers for multi-token prediction are left out: {printable(last)}, of the last slice, has none"
        for reference, other in places.items()
        if other.extra or other.apart
    ]


def _outside(config: MergeConfig, module: Module, part: Slice, name: str) -> OutputTensor:
    """Return an output tensor outside the layers; as in mergekit, its depth is 0."""
    lender = part.base or _leader(part)
    return OutputTensor(
        name,
        part,
        (name,) * len(part.sources),
        name,
        (lender.reference, name),
        0.0,
        _levels(config, module, part),
    )
