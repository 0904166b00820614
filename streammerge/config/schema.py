"""The config as a frozen value: mergekit's YAML, read strictly.

Unknown keys are refused at every level; unsupported keys of mergekit are refused with a reason. The names inside
`parameters` are checked later, against the method.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import field, replace

from streammerge.config.checkpoints import Averaged, Checkpoints, parse_checkpoints
from streammerge.config.known_keys import ANCHORS, KEYS, KEYS_WITHOUT_EFFECT, misplaced
from streammerge.config.lines import Lines, parse_lines
from streammerge.config.lora import LoraOutput, parse_lora
from streammerge.config.matrices import Matrices, parse_matrices
from streammerge.config.moe import MoeSpec
from streammerge.config.references import parse_base, parse_reference, parse_text
from streammerge.config.settings import Setting, parse_setting
from streammerge.config.swept import Swept, parse_sweep
from streammerge.config.tensors import Tensors, parse_tensors
from streammerge.config.tokenizer import ChatTemplate, TokenizerSpec, parse_chat_template, parse_tokenizer
from streammerge.config.values import (
    parse_dtype,
    parse_exclude,
    parse_layer_range,
    parse_quantize,
    parse_seed,
)
from streammerge.config.wording import PATH_LIMIT, check_keys, child, refuse, shown
from streammerge.errors import printable
from streammerge.records import dataclass

_INPUTS = ("models", "slices", "modules", "checkpoints")
_MODEL_KEYS = ("model", "parameters", "alias", "fisher", "gram", "strip")
_SLICE_KEYS = ("sources", "base_model", "parameters")
_MODULE_KEYS = ("models", "slices", "parameters")


@dataclass(frozen=True)
class ModelSpec:
    """One entry of `models`."""

    reference: str
    """A directory, or a hub name with an optional ``@revision``."""
    parameters: Mapping[str, Setting] = field(default_factory=dict, hash=False)
    alias: str | None = None
    """The name that identifies the model in random masks, and distinguishes entries."""
    fisher: str | None = None
    """Path of the model's Fisher diagonal."""
    gram: str | None = None
    """Path of the model's Gram matrices."""
    path: str = ""
    """Its place in the config, for messages: ``config.yml: models[0]``."""
    layer_range: tuple[int, int] | None = None
    """The layers [first, end) that a slice takes; None: all."""
    again: int = 0
    """Number of earlier entries of the same model without an alias."""
    strip: str = ""
    """The prefix that is taken off the names of its tensors."""

    @property
    def name(self) -> str:
        """A name that is unique in the config."""
        return self.alias or self.reference + (f" ({self.again + 1})" if self.again else "")


@dataclass(frozen=True)
class Slice:
    """Consecutive layers of the output, merged from the same number of layers of each source."""

    sources: tuple[ModelSpec, ...]
    base_model: str | None = None
    """The slice's own base, which replaces the config's."""
    parameters: Mapping[str, Setting] = field(default_factory=dict, hash=False)
    path: str = ""
    base: ModelSpec | None = None
    """The base in effect, once it is determined; it is then not among the sources."""
    base_strip: str = ""
    """The prefix that is taken off the names of its own base."""

    @property
    def is_empty(self) -> bool:
        """Whether its range has no layers. An empty first slice gives the embedding; an empty last one, norm and head."""
        spec = self.sources[0] if self.sources else self.base
        return spec is not None and spec.layer_range is not None and len({*spec.layer_range}) == 1


@dataclass(frozen=True)
class Module:
    """A part of the output with its own stack of layers, such as a text decoder."""

    name: str | None
    """Its name in mergekit; None: the whole model."""
    slices: tuple[Slice, ...]
    """The slices; a single one without layer ranges if whole models are merged."""
    parameters: Mapping[str, Setting] = field(default_factory=dict, hash=False)
    path: str = ""

    @property
    def is_sliced(self) -> bool:
        """Whether layers are assembled from slices."""
        return any(spec.layer_range is not None for part in self.slices for spec in part.sources)


@dataclass(frozen=True)
class MergeConfig:
    """The whole config. Its values are plain, so that it pickles, compares and hashes."""

    merge_method: str
    models: tuple[ModelSpec, ...]
    """Every model once, in the order of the config; the base only if it is listed."""
    base_model: str | None = None
    dtype: str | None = None
    """Format code of the output dtype, such as `BF16`; the arithmetic does not depend on it. None:
    that of the inputs."""
    out_dtype: str | None = None
    """The dtype of the output; it overrides `dtype`."""
    quantize: str = "none"
    """Storage of the output: one of `QUANTIZE`."""
    parameters: Mapping[str, Setting] = field(default_factory=dict, hash=False)
    seed: int = 0
    exclude: tuple[str, ...] = ()
    """Regular expressions of tensors that are copied from the base (or first) model."""
    tensors: Tensors = "same"
    """Which tensors are merged: all models must have the same, those that all have, or each over those that have it."""
    lines: Lines | None = None
    """The scale of the task vectors by layer, if there is one."""
    matrices: Matrices = field(default_factory=Matrices)
    """The tensors that a method of whole matrices decomposes, and what all others get."""
    text: str = ""
    """The YAML, verbatim."""
    where: str = "config"
    """The name of the config in messages."""
    modules: tuple[Module, ...] = ()
    """The modules and their slices, which every form of config is reduced to."""
    notes: tuple[str, ...] = ()
    """Warnings about keys without effect."""
    tokenizer: TokenizerSpec | None = None
    """The vocabulary of the output, if vocabularies are aligned."""
    chat_template: ChatTemplate | None = None
    """The output's chat template; ``auto``: the most common one; None: the tokenizer's."""
    checkpoints: Checkpoints | None = None
    """The checkpoints to average, in place of listed models; `models` has none of them until they are looked for."""
    base_strip: str = ""
    """The prefix that is taken off the names of the base."""
    lora: LoraOutput | None = None
    """The adapter that is written in place of the merged model; None: the model."""
    sweep: tuple[Swept, ...] = ()
    """The parameters of a sweep, each with its values; a config with any is not one merge but several."""
    averaged: tuple[Averaged, ...] = ()
    """The checkpoints that were found, oldest first, including those with coefficient 0."""
    name: str | None = None
    """The name by which later stages know its result; None: it is the output."""
    stages: tuple[MergeConfig, ...] = ()
    """The stages that the output is made from, each after those that it uses itself."""
    moe: MoeSpec | None = None
    """The mixture of experts that the models become; None: they are merged."""

    @property
    def references(self) -> frozenset[str]:
        """Every model that it names, at any place."""
        found = {spec.reference for spec in self.models}
        found |= {part.base_model for module in self.modules for part in module.slices if part.base_model}
        found |= {self.base_model} if self.base_model else set()
        found |= {self.lora.base} if self.lora is not None and self.lora.base else set()
        if self.tokenizer is not None:
            found |= {self.tokenizer.source} - {"union", "base"}
            found |= {source.model for source in self.tokenizer.tokens.values() if source.model}
        return frozenset(found)

    def settings(self) -> Iterator[tuple[Mapping[str, Setting], bool]]:
        """Yield every map of parameters, and whether it belongs to one model."""
        yield self.parameters, False
        for module in self.modules:
            yield module.parameters, False
            for part in module.slices:
                yield part.parameters, False
                for spec in part.sources:
                    yield spec.parameters, True


def config_of(data: dict[str, object], text: str, where: str) -> MergeConfig:
    """Return the config that a map of plain values describes; ConfigError names what is wrong in it.

    Parameters
    ----------
    data
        Dicts with string keys, lists and scalars, as YAML gives them.
    text
        The YAML they come from.
    where
        The name of the config in messages.
    """
    where = printable(where, PATH_LIMIT)
    top = f"{where}:"
    notes: list[str] = []
    data = _without(data, top, notes)
    check_keys(data, top, KEYS, misplaced)
    if "merge_method" not in data:
        refuse(top, "'merge_method' is missing")
    base, base_strip = _base(data, top)
    modules = _modules(data, top, notes)
    return MergeConfig(
        merge_method=parse_text(data["merge_method"], child(top, "merge_method")),
        models=members_of(modules),
        base_model=base,
        base_strip=base_strip,
        dtype=parse_dtype(data.get("dtype"), child(top, "dtype")),
        out_dtype=parse_dtype(data.get("out_dtype"), child(top, "out_dtype")),
        quantize=parse_quantize(data.get("quantize"), child(top, "quantize")),
        parameters=_parameters(data.get("parameters"), child(top, "parameters")),
        seed=parse_seed(data.get("seed", 0), child(top, "seed")),
        exclude=parse_exclude(data.get("exclude", []), child(top, "exclude")),
        tensors=parse_tensors(data.get("tensors", "same"), child(top, "tensors"), whole=_are_whole(modules)),
        lines=parse_lines(data.get("lines"), child(top, "lines")),
        matrices=parse_matrices(data, top),
        text=text,
        where=where,
        modules=modules,
        notes=tuple(notes),
        tokenizer=parse_tokenizer(data, top),
        chat_template=parse_chat_template(data.get("chat_template"), child(top, "chat_template")),
        checkpoints=parse_checkpoints(data, top),
        lora=parse_lora(data, top),
        sweep=parse_sweep(data.get("sweep"), child(top, "sweep")),
    )


def _base(data: dict[str, object], path: str) -> tuple[str | None, str]:
    """Return the base that a map names, and the prefix that is taken off its names."""
    value = data.get("base_model")
    return (None, "") if value is None else parse_base(value, child(path, "base_model"))


def _modules(data: dict[str, object], path: str, notes: list[str]) -> tuple[Module, ...]:
    """Return the modules and slices of the output, from whichever of the three keys describes them."""
    given = [key for key in _INPUTS if data.get(key) is not None]
    if len(given) > 1:
        refuse(path, f"'{given[0]}' and '{given[1]}' cannot both be set")
    if given == ["checkpoints"]:
        return (Module(None, (Slice((), path=path),), {}, path),)
    if given != ["modules"]:
        return (Module(None, _slices(data, path, notes), {}, path),)
    place = child(path, "modules")
    modules = data["modules"]
    if not isinstance(modules, dict) or not modules:
        refuse(place, f"must be a map of modules (name: {{models: …}}), not {shown(modules)}")
    found = []
    for name, item in modules.items():
        where = child(place, name)
        if not isinstance(item, dict):
            refuse(where, f"must be a map (models: … or slices: …), not {shown(item)}")
        check_keys(item, where, _MODULE_KEYS, misplaced)
        if item.get("models") is not None and item.get("slices") is not None:
            refuse(where, "'models' and 'slices' cannot both be set")
        parameters = _parameters(item.get("parameters"), child(where, "parameters"))
        found.append(Module(parse_text(name, where), _slices(item, where, notes), parameters, where))
    return tuple(found)


def _slices(data: dict[str, object], path: str, notes: list[str]) -> tuple[Slice, ...]:
    """Return the slices of the config or of a module; whole models are one slice of all layers."""
    if data.get("slices") is None:
        if "models" not in data:
            refuse(path, "'models' is missing (or 'slices', or 'modules')")
        return (Slice(_models(data["models"], child(path, "models"), notes), path=path),)
    place = child(path, "slices")
    slices = data["slices"]
    if not isinstance(slices, list) or not slices:
        refuse(place, f"must be a list of slices (- sources: …), not {shown(slices)}")
    parts = tuple(_slice(item, f"{place}[{i}]", notes) for i, item in enumerate(slices))
    empty = [part for part in parts if part.is_empty]
    if len(empty) == len(parts):
        refuse(place, "no slice holds a layer")
    notes += [
        f"{part.path}: ignored: a slice without layers, and neither the first nor the last"
        for part in empty
        if part not in (parts[0], parts[-1])
    ]
    return parts


def _slice(data: object, path: str, notes: list[str]) -> Slice:
    if not isinstance(data, dict):
        refuse(path, f"must be a map (sources: …), not {shown(data)}")
    data = _without(data, path, notes)
    check_keys(data, path, _SLICE_KEYS, misplaced)
    if "sources" not in data:
        refuse(path, "'sources' is missing")
    sources = _models(data["sources"], child(path, "sources"), notes, layers=True)
    lengths = [spec.layer_range[1] - spec.layer_range[0] for spec in sources if spec.layer_range]
    for spec, length in zip(sources, lengths, strict=True):
        if length != lengths[0]:
            refuse(
                child(spec.path, "layer_range"),
                f"{length} layers, but {lengths[0]} of the slice's first source",
            )
    base, base_strip = _base(data, path)
    return Slice(
        sources=sources,
        base_model=base,
        base_strip=base_strip,
        parameters=_parameters(data.get("parameters"), child(path, "parameters")),
        path=path,
    )


def _are_whole(modules: tuple[Module, ...]) -> bool:
    return len(modules) == 1 and modules[0].name is None and not modules[0].is_sliced


def members_of(modules: tuple[Module, ...]) -> tuple[ModelSpec, ...]:
    """Return every model once, identified by its alias or its reference."""
    members: dict[str, ModelSpec] = {}
    for spec in (spec for module in modules for part in module.slices for spec in part.sources):
        first = members.setdefault(spec.name, spec)
        if (first.reference, first.fisher, first.gram) != (spec.reference, spec.fisher, spec.gram):
            beside = "Fisher diagonal" if first.fisher != spec.fisher else "store of Gram matrices"
            what = "model" if first.reference != spec.reference else beside
            refuse(spec.path, f"{shown(spec.name)} has a different {what} at {first.path}")
    return tuple(members.values())


def _models(data: object, path: str, notes: list[str], *, layers: bool = False) -> tuple[ModelSpec, ...]:
    """Return the models of a list; with `layers` each has a layer range."""
    if not isinstance(data, list) or not data:
        refuse(path, f"must be a list of models (- model: …), not {shown(data)}")
    models = [_model(item, f"{path}[{i}]", notes, layers) for i, item in enumerate(data)]
    found: list[ModelSpec] = []
    seen: dict[str, int] = {}
    times: dict[str, int] = {}
    for i, model in enumerate(models):
        if model.alias is None:
            times[model.reference] = times.get(model.reference, -1) + 1
            model = replace(model, again=times[model.reference])
        first = seen.setdefault(model.name, i)
        if first != i:
            refuse(
                model.path,
                f"{shown(model.name)} is {path.split('.')[-1].split()[-1]}[{first}] already "
                "(give one of them its own `alias:`)",
            )
        found.append(model)
    return tuple(found)


def _model(data: object, path: str, notes: list[str], layers: bool) -> ModelSpec:
    if isinstance(data, str):
        data = {"model": data}
    if not isinstance(data, dict):
        refuse(path, f"must be a map (model: …), not {shown(data)}")
    data = _without(data, path, notes)
    check_keys(data, path, (*_MODEL_KEYS, *(("layer_range",) if layers else ())), misplaced)
    for key in ("model", *(("layer_range",) if layers else ())):
        if key not in data:
            refuse(path, f"'{key}' is missing")
    texts = {
        key: parse_text(data[key], child(path, key))
        for key in ("alias", "fisher", "gram", "strip")
        if key in data
    }
    return ModelSpec(
        reference=parse_reference(data["model"], child(path, "model")),
        parameters=_parameters(data.get("parameters"), child(path, "parameters")),
        alias=texts.get("alias"),
        fisher=_expanded(texts.get("fisher")),
        gram=_expanded(texts.get("gram")),
        path=path,
        layer_range=parse_layer_range(data["layer_range"], child(path, "layer_range")) if layers else None,
        strip=texts.get("strip", ""),
    )


def _expanded(path: str | None) -> str | None:
    return None if path is None else os.path.expanduser(path)


def _without(data: dict[str, object], path: str, notes: list[str]) -> dict[str, object]:
    """Return `data` without keys that have no effect, with a note for each, and without ``x-…``: homes of anchors."""
    notes += [
        f"{child(path, key)}: ignored: {KEYS_WITHOUT_EFFECT[key]}"
        for key, value in data.items()
        if key in KEYS_WITHOUT_EFFECT and value is not None
    ]
    return {
        key: value
        for key, value in data.items()
        if key not in KEYS_WITHOUT_EFFECT and not key.startswith(ANCHORS)
    }


def _parameters(data: object, path: str) -> dict[str, Setting]:
    if data is None:
        return {}
    if not isinstance(data, dict):
        refuse(path, f"must be a map of parameters, not {shown(data)}")
    return {name: parse_setting(value, child(path, name)) for name, value in data.items()}
