"""From a config and the headers of its models to jobs: which tensor is merged from what, and how."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from streammerge.config.schema import MergeConfig
from streammerge.config.wording import child
from streammerge.dtypes import FLOATS, INTEGERS, promoted
from streammerge.errors import ConfigError, ModelError, printable
from streammerge.index.derived import GatheredRef, SourceRef, stored_dtype
from streammerge.index.fishers import ChunkedRef, FisherIndex, FisherRef
from streammerge.index.model import TensorIndex
from streammerge.methods.registry import Method
from streammerge.methods.requests import Band, TopK
from streammerge.methods.scope import Scope
from streammerge.planning.cells import Cell, Indexes, Stack, assemble
from streammerge.planning.job import Job
from streammerge.planning.parameters import bind, check_names, preset_of
from streammerge.planning.tied import tied_to
from streammerge.planning.unmatched import unmatched
from streammerge.planning.vocabulary import Alignment


@dataclass(frozen=True)
class Bound:
    """What `bind_jobs` makes of a config."""

    jobs: tuple[Job, ...]
    stacks: tuple[Stack, ...]
    """Layers that are stacked anew."""
    warnings: tuple[str, ...]


def bind_jobs(
    config: MergeConfig,
    method: Method,
    donor: TensorIndex,
    indexes: Indexes,
    fishers: Sequence[FisherIndex] = (),
    alignment: Alignment | None = None,
    grams: Sequence[FisherIndex] = (),
) -> Bound:
    """Return the jobs in the file order of the first input.

    Parameters
    ----------
    config
        With its bases settled.
    donor
        The model whose tensors decide the names and dtypes of the output.
    indexes
        Every model by its reference.
    fishers
        One diagonal per model, for a method that weighs by them.
    alignment
        How the rows of the models' vocabularies are put in one order.
    grams
        One store of Gram matrices per model, for a method that takes them.

    Raises
    ------
    ConfigError
        If the config does not suit the method.
    ModelError
        If a tensor is missing, or shapes or dtypes do not fit; the message has the cure.
    """
    warnings = [*config.notes, *check_names(config, method)]
    _check_models(config, method)
    preset = preset_of(config, method)
    assembly = assemble(config, donor, indexes)
    excluded = [re.compile(pattern) for pattern in config.exclude]
    copied = {cell.name for cell in assembly.cells if any(p.search(cell.name) for p in excluded)}
    warnings += [*assembly.notes, *unmatched(config, assembly.cells, indexes)]
    finder = _Finder(indexes, alignment)
    finder.check([cell for cell in assembly.cells if cell.name not in copied])
    warnings += _compare_names(config, assembly.cells, donor, indexes, excluded)
    binder = _Binder(config, method, fishers, grams)
    jobs: list[Job] = []
    for cell in assembly.cells:
        ordinal = len(jobs)
        lender = finder.donor_of(cell)
        base, sources = finder.inputs(cell)
        if cell.name in copied or not sources or cell.name in finder.buffers:
            job = _copy(ordinal, cell.name, lender, config)
        else:
            inputs = (*((base,) if base is not None else ()), *sources)
            _check_shapes(cell.name, inputs)
            parameters = bind(method, preset, cell.name, cell.depth, cell.models, cell.levels, config.where)
            job = binder.merge(ordinal, cell, lender, sources, base, parameters)
        jobs.append(job)
    warnings += [*_promotions(jobs, config), *finder.warnings(), *binder.warnings()]
    _check_uniform_trim(jobs, method)
    return Bound(tuple(jobs), assembly.stacks, tuple(warnings))


def _check_models(config: MergeConfig, method: Method) -> None:
    least, most = method.n_models
    for part in (part for module in config.modules for part in module.slices):
        n = len(part.sources)
        sliced = part.base is not None and part.base.layer_range is not None
        if n == 0 and sliced:
            continue  # The base's own layers are copied.
        key = "sources" if part.sources and part.sources[0].layer_range else "models"
        if n < least or (most is not None and n > most):
            wanted = (
                f"exactly {least}"
                if least == most
                else f"at least {least}"
                if n < least
                else f"at most {most}"
            )
            raise ConfigError(
                f"{child(part.path, key)}: {method.name!r} takes {wanted}, there are {n} (the base is not one of them)"
            )
        if method.base == "required" and part.base is None:
            role = (
                "the first of the two models"
                if most == 1
                else "the model that the others were fine-tuned from"
            )
            raise ConfigError(f"{config.where}: base_model: {method.name!r} needs one: {role}")


def _compare_names(
    config: MergeConfig, cells: Sequence[Cell], donor: TensorIndex, indexes: Indexes,
    excluded: Sequence[re.Pattern[str]],
) -> list[str]:  # fmt: skip
    """Return warnings of tensors that have no part in the merge; refuse where the donor alone lacks one."""
    warnings = []
    for index in indexes.values():
        warnings += [f"{printable(index.reference)}: {note}" for note in index.notes]
        if index.unlisted:
            warnings.append(f"{printable(index.reference)}: {len(index.unlisted)} tensors in its shards are not "
                            f"in its index and are left out (first: {printable(index.unlisted[0])})")  # fmt: skip
    if len(config.modules) > 1 or config.modules[0].is_sliced or config.modules[0].name is not None:
        return warnings
    names = {cell.name for cell in cells}
    models = [indexes[spec.reference] for spec in config.models]
    extra_everywhere = [
        n for n in models[0] if n not in names and all(n in model for model in models)
        and not any(p.search(n) for p in excluded)
    ]  # fmt: skip
    if extra_everywhere:
        raise ModelError(
            f"{printable(donor.reference)}: tensor {printable(extra_everywhere[0])} is missing, all other models "
            "have it; list it under `exclude:` to leave it out"
        )
    for model in (index for index in indexes.values() if any(index is model for model in models)):
        extra = [name for name in model if name not in names]
        if extra:
            warnings.append(f"{printable(model.reference)}: {len(extra)} tensors that {printable(donor.reference)} "
                            f"lacks are left out (first: {printable(extra[0])})")  # fmt: skip
    return warnings


class _Finder:
    """Finds the tensors of a cell in the models, or what stands for them there."""

    def __init__(self, indexes: Indexes, alignment: Alignment | None) -> None:
        self._indexes, self._alignment = indexes, alignment
        self._tied: dict[str, str] = {}
        self.buffers: set[str] = set()
        """Tensors that are no parameters and that not all models store: copied."""

    def check(self, cells: Sequence[Cell]) -> None:
        """Refuse a model that lacks tensors of the output, naming the first of them."""
        missing: dict[str, list[Cell]] = {}
        for cell in cells:
            lacking = [
                reference
                for reference, name in dict.fromkeys(_places(cell))
                if self._find(reference, name) is None
            ]
            if lacking and _BUFFER.search(cell.name) and self._find(*cell.donor) is not None:
                self.buffers.add(cell.name)
                continue
            for reference in lacking:
                missing.setdefault(reference, []).append(cell)
        for reference in (reference for reference in self._indexes if reference in missing):
            lacking_cells = missing[reference]
            cell = lacking_cells[0]
            more = f" and {len(lacking_cells) - 1} more" if len(lacking_cells) > 1 else ""
            name = next(name for place, name in _places(cell) if place == reference)
            raise ModelError(
                f"{printable(reference)}: tensor {printable(name)}{more} is missing, "
                f"{printable(_holder(cell, self._indexes))} has it; list it under `exclude:` to copy it from there"
            )

    def donor_of(self, cell: Cell) -> SourceRef:
        """Return the tensor that lends its dtype and shape."""
        found = self._find(*cell.donor)
        if found is None:
            reference, name = cell.donor
            raise ModelError(
                f"{printable(reference)}: tensor {printable(name)} is missing, and under `exclude:` it is to be "
                "copied from there"
            )
        return found

    def inputs(self, cell: Cell) -> tuple[SourceRef | None, tuple[SourceRef, ...]]:
        """Return the base's tensor, if there is one, and each source's."""
        if cell.name in self.buffers:
            return None, ()
        base = None if cell.part.base is None else self._find(cell.part.base.reference, cell.base)
        sources = [self._find(spec.reference, name) for spec, name in cell.models]
        return base, tuple(ref for ref in sources if ref is not None)

    def _find(self, reference: str, name: str) -> SourceRef | None:
        found = self._stored(reference, name)
        if found is None or self._alignment is None:
            return found
        return self._alignment.gather(reference, name, found, lambda other: self._stored(other, name))

    def _stored(self, reference: str, name: str) -> SourceRef | None:
        index = self._indexes[reference]
        if name in index:
            return index[name]
        embedding = tied_to(index, name)
        if embedding is None:
            return None
        self._tied[reference] = name
        return index[embedding]

    def warnings(self) -> list[str]:
        """Return what the user should know of all cells together."""
        lines = [
            f"{printable(reference)}: stores no {printable(name)}, its embedding takes part in its place (they are tied)"
            for reference, name in self._tied.items()
        ]
        if self.buffers:
            lines.append(f"{len(self.buffers)} buffers that not all models store are copied, not merged "
                         f"(first: {printable(min(self.buffers))})")  # fmt: skip
        return lines


_BUFFER = re.compile(r"(^|\.)(rotary_emb\.inv_freq|(attn|attention)\.(masked_)?bias|position_ids)$")
"""Tensors that some versions of `transformers` stored beside the parameters."""


def _places(cell: Cell) -> list[tuple[str, str]]:
    """Return every model that takes part in a cell, and the tensor's name there."""
    base = [] if cell.part.base is None else [(cell.part.base.reference, cell.base)]
    return [*base, *((spec.reference, name) for spec, name in cell.models)]


def _holder(cell: Cell, indexes: Indexes) -> str:
    """Return a model that has the tensor of a cell."""
    return next(
        (place for place, name in (cell.donor, *_places(cell)) if name in indexes[place]), cell.donor[0]
    )


def _check_shapes(name: str, inputs: Sequence[SourceRef]) -> None:
    first = inputs[0]
    for ref in inputs[1:]:
        if ref.shape != first.shape:
            embeds = len(ref.shape) == len(first.shape) == 2 and ref.shape[1] == first.shape[1]
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
                "these cannot be merged; list it under `exclude:` to copy it from one model"
            )


def _output_dtype(inputs: Sequence[SourceRef], config: MergeConfig) -> str:
    """Return what the config says, of floats; else what the inputs, the base among them, promote to as in mergekit."""
    wanted = config.out_dtype or config.dtype
    if inputs[0].dtype not in FLOATS:
        return stored_dtype(inputs[0])
    return wanted if wanted is not None else promoted(stored_dtype(ref) for ref in inputs)


def _promotions(jobs: Sequence[Job], config: MergeConfig) -> list[str]:
    """Say which tensors are wider than some model stores them, since no `dtype` was given."""
    wider = [
        job for job in jobs if job.kind == "merge" and len({stored_dtype(ref) for ref in job.inputs}) > 1
    ]
    if not wider or config.dtype or config.out_dtype:
        return []
    kinds = sorted({stored_dtype(ref) for job in wider for ref in job.inputs})
    return [
        f"{len(wider)} tensors differ in dtype between the models ({', '.join(kinds)}) and take the one that holds them all: "
        f"{', '.join(sorted({job.dtype for job in wider}))}; `dtype:` in the config says otherwise "
        f"(first: {printable(wider[0].name)})"
    ]


def _copy(ordinal: int, name: str, ref: SourceRef, config: MergeConfig) -> Job:
    return Job(ordinal, name, _output_dtype((ref,), config), ref.shape, "copy", (ref,), None, {})


class _Binder:
    """Makes the jobs that are no plain copies, and remembers what the user should know of them."""

    def __init__(
        self,
        config: MergeConfig,
        method: Method,
        fishers: Sequence[FisherIndex],
        grams: Sequence[FisherIndex],
    ) -> None:
        self._config, self._method, self._fishers, self._grams = config, method, fishers, grams
        self._places = {spec.name: place for place, spec in enumerate(config.models)}
        self._without_fisher: list[str] = []
        self._shared: dict[tuple[object, ...], Mapping[str, object]] = {}

    def merge(
        self, ordinal: int, cell: Cell, donor: SourceRef, sources: tuple[SourceRef, ...], base: SourceRef | None,
        parameters: Mapping[str, object],
    ) -> Job:  # fmt: skip
        """Return the job of a tensor that every input has with the same shape."""
        if not donor.n_elements:
            return _copy(ordinal, cell.name, donor, self._config)
        if donor.dtype not in FLOATS:
            return _agree(ordinal, cell.name, donor, (*((base,) if base is not None else ()), *sources))
        recipe_base = self._recipe_base(base, parameters)
        dtype = _output_dtype((*sources, *(() if recipe_base is None else (recipe_base,))), self._config)
        members = tuple(self._places[spec.name] for spec in cell.part.sources)
        parameters = self._shared.setdefault(
            tuple(parameters.items()), parameters
        )  # there may be many tensors
        return Job(
            ordinal, cell.name, dtype, donor.shape, "merge", sources, recipe_base, parameters,
            self._diagonals(cell, donor, members, sources), self._matrices(cell, donor, members),
            members if members != tuple(range(len(self._places))) else (),
        )  # fmt: skip

    def _recipe_base(self, base: SourceRef | None, parameters: Mapping[str, object]) -> SourceRef | None:
        drops = self._method.drops(parameters)
        if drops and base is None:
            raise ConfigError(
                f"{self._config.where}: base_model: a drop acts on differences from a base; name it here"
            )
        return base if drops or self._method.base in ("required", "optional") else None

    def _diagonals(
        self, cell: Cell, donor: SourceRef, members: Sequence[int], sources: Sequence[SourceRef]
    ) -> tuple[FisherRef, ...]:
        if not self._fishers:
            return ()
        if any(isinstance(ref, GatheredRef) for ref in sources):
            self._without_fisher.append(cell.name)  # its rows are in the order of the model's own vocabulary
            return ()
        pairs = [(self._fishers[member], name) for member, name in zip(members, cell.sources, strict=True)]
        found = [index for index, name in pairs if name in index]
        if not found:
            self._without_fisher.append(cell.name)
            return ()
        for index, name in pairs:
            if name not in index:
                raise ModelError(
                    f"{printable(index.reference)}: no Fisher diagonal of tensor {printable(name)}, "
                    f"{printable(found[0].reference)} has one; list the tensor under `exclude:` to copy it"
                )
            if index[name].shape != donor.shape:
                raise ModelError(
                    f"{printable(index.reference)}: the Fisher diagonal of tensor {printable(name)} has shape "
                    f"{list(index[name].shape)}, the tensor has {list(donor.shape)}; it belongs to another model"
                )
        return tuple(index[name] for index, name in pairs)

    def _matrices(self, cell: Cell, donor: SourceRef, members: Sequence[int]) -> tuple[ChunkedRef, ...]:
        """Return the Gram matrices of a linear map's weight; none where a model has none, or of what is no matrix."""
        pairs = (
            [(self._grams[member], name) for member, name in zip(members, cell.sources, strict=True)]
            if self._grams
            else []
        )
        if len(donor.shape) != 2 or not pairs or not any(name in index for index, name in pairs):
            return ()
        found = []
        for index, name in pairs:
            ref = index.get(name)
            if (
                not isinstance(ref, ChunkedRef)
                or ref.shape != (donor.shape[1], donor.shape[1])
                or ref.dtype != "F32"
            ):
                raise ModelError(
                    f"{printable(index.reference)}: no Gram matrix of {donor.shape[1]} inputs for tensor {printable(name)}, as "
                    "others have; list the tensor under `exclude:` to copy it"
                )
            found.append(ref)
        return tuple(found)

    def warnings(self) -> list[str]:
        """Return what the user should know of all jobs together."""
        if not self._without_fisher:
            return []
        n, first = len(self._without_fisher), printable(self._without_fisher[0])
        return [
            f"{n} tensors have no Fisher diagonal in any model, or rows put in another order, and take the `fallback` (first: {first})"
        ]


def _agree(ordinal: int, name: str, donor: SourceRef, inputs: Sequence[SourceRef]) -> Job:
    dtypes = {ref.dtype for ref in inputs}
    if donor.dtype not in INTEGERS and len(inputs) > 1:
        raise ModelError(
            f"tensor {printable(name)} in {printable(donor.path)} is {donor.dtype}, a quantised or complex dtype that "
            "is not merged; dequantise the models first, or list it under `exclude:` to copy it from one model"
        )
    if len(dtypes) > 1:
        raise ModelError(
            f"tensor {printable(name)}: integer dtypes differ ({', '.join(sorted(dtypes))}); list it under `exclude:`"
        )
    others = tuple(ref for ref in dict.fromkeys(inputs) if ref != donor)
    return Job(ordinal, name, donor.dtype, donor.shape, "agree", (donor, *others), None, {})


def _check_uniform_trim(jobs: Sequence[Job], method: Method) -> None:
    """A statistic of the whole model is one number: what is asked for must not vary with the tensor."""
    first: list[tuple[object, ...]] | None = None
    members: set[tuple[int, ...]] = set()
    checked: set[tuple[object, ...]] = set()
    for job in jobs:
        key = (job.members, *job.parameters.items())
        if job.kind != "merge" or key in checked:
            continue
        checked.add(key)
        try:
            scope = Scope(job.n_models, has_base=job.base is not None, tensor=job.name)
            rounds = method.rounds(scope, job.parameters)
        except ConfigError as error:
            raise ConfigError(f"tensor {printable(job.name, 120)}: {error}") from None
        asked: list[tuple[object, ...]] = [
            (type(r), r.vector.model, r.density) if isinstance(r, TopK | Band) else (type(r),)
            for requests in rounds for r in requests if r.scope == "model"
        ]  # fmt: skip
        if asked:
            members.add(job.members)
        if len(members) > 1:
            raise ConfigError(
                f"tensor {printable(job.name, 120)}: merged from other models than others, but `trim_scope: model` "
                "trims each model as one; merge all slices from the same models"
            )
        if first is not None and asked != first:
            raise ConfigError(
                f"tensor {printable(job.name, 120)}: density differs from other tensors', but `trim_scope: model` "
                "trims the model as one; give one density per model"
            )
        first = asked
