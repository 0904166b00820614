"""Open the inputs of a merge: its models, and their Fisher and Gram stores."""

from __future__ import annotations

from collections.abc import Callable

from streammerge.checkpoint.companions import CompanionIndex, open_fisher, open_grams
from streammerge.checkpoint.components import shared_folders
from streammerge.checkpoint.index import TensorIndex, open_model, with_adapter
from streammerge.checkpoint.stripped import stripped
from streammerge.config.schema import MergeConfig
from streammerge.config.stages import stage_of
from streammerge.config.strips import strips_of
from streammerge.errors import ModelError, NotDownloadedError, printable
from streammerge.io.files import meant
from streammerge.io.reader import Reader
from streammerge.methods.registry import Method
from streammerge.planning.plan import MergePlan
from streammerge.planning.stages import StageResult
from streammerge.planning.template import template_of
from streammerge.records import dataclass
from streammerge.tensors.fingerprint import check_belongs


@dataclass(frozen=True)
class Sources:
    """How the references of a config are opened: from files, or from models that the caller holds in memory."""

    model: Callable[[str], TensorIndex] = open_model
    fisher: Callable[[str], CompanionIndex] = open_fisher
    grams: Callable[[str], CompanionIndex] = open_grams
    reader: Reader | None = None
    """The reader of the opened models; None: a new reader for files."""
    stages: tuple[StageResult, ...] = ()
    """The results of stages by which models of these names are replaced, each after the stages that it uses itself."""


@dataclass(frozen=True)
class Inputs:
    """The models of a merge, each opened once, and their stores."""

    models: tuple[TensorIndex, ...]
    base: TensorIndex | None = None
    bases: tuple[TensorIndex, ...] = ()
    """Bases of single slices that differ from `base`."""
    fishers: tuple[CompanionIndex, ...] = ()
    """The Fisher diagonal of each model, for methods that use them."""
    grams: tuple[CompanionIndex, ...] = ()
    """The Gram matrices of each model, for methods that use them."""
    stages: tuple[MergePlan, ...] = ()
    """The stages whose results are among the models, each after the stages that it uses itself."""
    merged: TensorIndex | None = None
    """The merge of these models as a model of its own, in fp64, if an adapter is made of it; it is the last stage."""

    @property
    def template(self) -> TensorIndex:
        """The model whose config.json, tokenizer and tensor names the output has: see `template_of`."""
        return template_of(self.models, self.base)

    @property
    def own(self) -> tuple[TensorIndex, ...]:
        """The models and the base."""
        return (*self.models, *(() if self.base is None else (self.base,)))

    @property
    def by_reference(self) -> dict[str, TensorIndex]:
        """Every model and base, by its reference."""
        return {index.reference: index for index in (*self.models, *self.bases, self.template)}


def open_inputs(config: MergeConfig, method: Method, sources: Sources) -> Inputs:
    """Open every model once, the base, the bases of slices, and the models' stores.

    Raises
    ------
    InputError
        If one of them is missing or malformed, or a store belongs to a different model.
    """
    opened: dict[str, TensorIndex] = {}
    strips = strips_of(config)

    def get(reference: str) -> TensorIndex:
        if reference not in opened:
            opened[reference] = stripped(_open(reference, sources), strips.get(reference, ""))
        return opened[reference]

    _find_all(config, get)
    if (
        sources.model is open_model
        and not sources.stages
        and len(config.modules) == 1
        and not config.modules[0].is_sliced
    ):
        joined = shared_folders(list(opened.values()), open_model)
        opened = dict(zip(opened, joined, strict=True))
    models = [get(spec.reference) for spec in config.models]
    of_adapter = None if config.lora is None else config.lora.base
    base = None if config.base_model is None else get(config.base_model)
    if base is None and of_adapter is not None:
        base = get(of_adapter)
    others = {
        part.base.reference: get(part.base.reference)
        for module in config.modules
        for part in module.slices
        if part.base is not None
    }
    fishers = _open_beside("fisher", sources.fisher, config, models, sources.reader) if method.fisher else []
    grams = _open_beside("gram", sources.grams, config, models, sources.reader) if method.gram else []
    bases = (index for index in others.values() if index is not base)
    stages = tuple(result.plan for result in sources.stages)
    return Inputs(tuple(models), base, tuple(bases), tuple(fishers), tuple(grams), stages)


def _open(reference: str, sources: Sources) -> TensorIndex:
    """Open a model, or take the result of a stage, with or without an adapter."""
    results = {result.name: result.index for result in sources.stages}
    stage = stage_of(reference, list(results))
    if stage is None:
        return sources.model(reference)
    index = results[stage]
    return index if reference == stage else with_adapter(reference, index, reference[len(stage) + 1 :])


def _find_all(config: MergeConfig, get: Callable[[str], TensorIndex]) -> None:
    """Open every model; name all that must be downloaded first in one message."""
    parts = [part for module in config.modules for part in module.slices]
    references = [spec.reference for spec in config.models]
    references += [config.base_model] if config.base_model is not None else []
    references += [config.lora.base] if config.lora is not None and config.lora.base is not None else []
    references += [part.base.reference for part in parts if part.base is not None]
    lacking: dict[str, NotDownloadedError] = {}
    for reference in dict.fromkeys(references):
        try:
            get(reference)
        except NotDownloadedError as error:
            lacking[error.reference] = error
    if len(lacking) == 1:
        raise next(iter(lacking.values()))
    if lacking:
        some = list(lacking.values())
        names = ", ".join(printable(error.reference, 80) + meant(error.reference) for error in some)
        commands = "; ".join(printable(error.command, 120) for error in some)
        raise ModelError(
            f"{len(some)} models are neither local directories nor in {some[0].where}: {names}; if these are hub names, "
            f"download them first with `{commands}`"
        )


def _open_beside(
    key: str,
    open_store: Callable[[str], CompanionIndex],
    config: MergeConfig,
    models: list[TensorIndex],
    reader: Reader | None,
) -> list[CompanionIndex]:
    """Open the store that each model's entry names under `key`; refuse a store of a different model."""
    stores = []
    for spec, model in zip(config.models, models, strict=True):
        reference = getattr(spec, key)
        if reference is None:
            return []  # check_names refuses it, with the entry's path
        index = open_store(reference)
        what = "Fisher diagonal" if key == "fisher" else "store of Gram matrices"
        check_belongs(index, model, what, reader)
        stores.append(index)
    return stores
