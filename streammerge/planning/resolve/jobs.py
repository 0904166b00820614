"""Resolve a config and its models' headers to jobs: each output tensor with its inputs and parameters."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import field
from typing import Any, NamedTuple

from streammerge.checkpoint.companions import CompanionIndex, CompanionRef
from streammerge.checkpoint.index import TensorIndex
from streammerge.checkpoint.names import count_layers
from streammerge.config.schema import MergeConfig
from streammerge.config.wording import child
from streammerge.dtypes import FLOATS, INTEGERS, promoted
from streammerge.errors import ConfigError, ModelError, printable
from streammerge.formats.refs import SourceRef
from streammerge.methods.registry import Method
from streammerge.planning.job import Job
from streammerge.planning.resolve.agreement import check_kinds, check_shapes, compare_names
from streammerge.planning.resolve.assemble import OutputTensor, Stack, assemble
from streammerge.planning.resolve.find import Finder
from streammerge.planning.resolve.lines import check_lines, scaled_by_layer
from streammerge.planning.resolve.matching import Matched
from streammerge.planning.resolve.matrices import check_matrices, matrix_of, notes_on, read_as_deltas
from streammerge.planning.resolve.parameters import check_names, preset_of, resolve_parameters
from streammerge.planning.resolve.presence import Selection, select
from streammerge.planning.resolve.quantised import codes_of, is_of_codes
from streammerge.planning.resolve.uniform import check_uniform
from streammerge.planning.resolve.unmatched import unmatched
from streammerge.planning.resolve.vocabulary import Alignment
from streammerge.records import dataclass


class Lender(NamedTuple):
    """The tensor of the template model, or of a slice's own, whose dtype and shape an output tensor has."""

    reference: str
    """The model."""
    name: str
    """Its name there, as a merge sees it."""
    ref: SourceRef


@dataclass(frozen=True)
class Resolved:
    """The jobs of a config, with warnings for the user."""

    jobs: tuple[Job, ...]
    lenders: tuple[Lender, ...]
    """For each job, the tensor that decides how its own tensor is stored."""
    stacks: tuple[Stack, ...]
    """Stacks of layers that are assembled from slices."""
    warnings: tuple[str, ...]
    left_out: Mapping[str, str] = field(default_factory=dict)
    """Names of tensors that are not in the output, each with the reason; empty if all models must have the same."""


def resolve_jobs(
    config: MergeConfig,
    method: Method,
    template: TensorIndex,
    matched: Matched,
    fishers: Sequence[CompanionIndex] = (),
    alignment: Alignment | None = None,
    grams: Sequence[CompanionIndex] = (),
) -> Resolved:
    """Return the jobs in the file order of the first input.

    Parameters
    ----------
    config
        The config, with every slice's base determined.
    template
        The model whose tensors determine the names and dtypes of the output.
    matched
        Every model, in the template model's names.
    fishers
        One Fisher diagonal per model, for methods that use them.
    alignment
        The common order of the rows of the models' vocabularies.
    grams
        One store of Gram matrices per model, for methods that use them.

    Raises
    ------
    ConfigError
        If the config does not suit the method.
    ModelError
        If a tensor is missing, or shapes or dtypes do not fit.
    """
    indexes = matched.indexes
    warnings = [*config.notes, *check_names(config, method), *matched.notes]
    _check_models(config, method)
    check_lines(config, method)
    check_matrices(config, method)
    preset = preset_of(config, method)
    assembly = assemble(config, template, indexes)
    outputs = assembly.outputs
    excluded = [re.compile(pattern) for pattern in config.exclude]
    copied = {output.name for output in outputs if any(p.search(output.name) for p in excluded)}
    warnings += [*assembly.notes, *unmatched(config, outputs, indexes)]
    check_kinds(config, template, indexes)
    finder = Finder(indexes, alignment, matched.prefixes)
    selection = Selection(outputs, stacks=assembly.stacks)
    if config.tensors != "same":
        selection = select(config, method, outputs, template, finder, copied)
        outputs, copied = selection.outputs, copied | selection.copied
    finder.check([output for output in outputs if output.name not in copied])
    warnings += [*compare_names(config, outputs, template, indexes, excluded), *selection.notes]
    stacks = count_layers(output.name for output in outputs)
    binder = _Binder(config, method, fishers, grams, matched.own_names, stacks)
    jobs: list[Job] = []
    lenders: list[Lender] = []
    codes = codes_of(indexes)
    for output in outputs:
        ordinal = len(jobs)
        lender = finder.template_of(output)
        base, sources = finder.inputs(output)
        if is_of_codes(codes, output.template[0], lender):
            if output.name not in copied and method.name == "passthrough":
                _check_scale(output.name, method, resolve_parameters(method, preset, output, config.where))
            job = _copy(ordinal, output.name, lender, config, as_stored=True)
        elif output.name in copied or not sources or finder.is_copied(output):
            job = _copy(ordinal, output.name, lender, config)
        else:
            check_shapes(output.name, (*((base,) if base is not None else ()), *sources))
            parameters = resolve_parameters(method, preset, output, config.where)
            parameters = scaled_by_layer(config.lines, method, parameters, output.name, stacks)
            job = binder.merge(ordinal, output, lender, sources, base, parameters)
        jobs.append(job)
        lenders.append(Lender(*output.template, lender))
    warnings += [*_promotions(jobs, config), *finder.warnings(), *binder.warnings()]
    warnings += notes_on(jobs, config, method, outputs)
    check_uniform(jobs, method)
    return Resolved(tuple(jobs), tuple(lenders), selection.stacks, tuple(warnings), selection.left_out)


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
                f"{child(part.path, key)}: {method.name!r} takes {wanted}; the config has {n} (not counting the base)"
            )
        if method.base == "required" and part.base is None:
            role = (
                "the first of the two models"
                if most == 1
                else "the model that the others were fine-tuned from"
            )
            raise ConfigError(f"{config.where}: base_model: {method.name!r} needs one: {role}")


def _output_dtype(inputs: Sequence[SourceRef], config: MergeConfig) -> str:
    """Return the dtype of an output tensor: the config's or, as in mergekit, the promotion of all inputs' dtypes."""
    wanted = config.out_dtype or config.dtype
    if inputs[0].dtype not in FLOATS:
        return inputs[0].stored_dtype
    return wanted if wanted is not None else promoted(ref.stored_dtype for ref in inputs)


def _promotions(jobs: Sequence[Job], config: MergeConfig) -> list[str]:
    """Return a warning on tensors whose promoted dtype is wider than that of some model, if no `dtype` is given."""
    wider = [job for job in jobs if job.kind == "merge" and len({ref.stored_dtype for ref in job.inputs}) > 1]
    if not wider or config.dtype or config.out_dtype:
        return []
    kinds = sorted({ref.stored_dtype for job in wider for ref in job.inputs})
    return [
        f"{len(wider)} tensors differ in dtype between the models ({', '.join(kinds)}); the output uses the promoted dtype "
        f"{', '.join(sorted({job.dtype for job in wider}))}; set `dtype:` to choose a different one "
        f"(first: {printable(wider[0].name)})"
    ]


def _copy(ordinal: int, name: str, ref: SourceRef, config: MergeConfig, *, as_stored: bool = False) -> Job:
    dtype = ref.stored_dtype if as_stored else _output_dtype((ref,), config)
    return Job(ordinal, name, dtype, ref.shape, "copy", (ref.as_stored(dtype),), None, {})


def is_plain_copy(job: Job, method: Method) -> bool:
    """Return whether the values of a job are those of its one source."""
    if job.kind != "merge":
        return True
    return method.name == "passthrough" and len(job.sources) == 1 and not _is_scaled(method, job.parameters)


def _is_scaled(method: Method, parameters: Mapping[str, Any]) -> bool:
    """Return whether a `passthrough` scales the tensor."""
    scale = parameters.get("scale", ()) if method.name == "passthrough" else ()
    return any(factor not in (None, 1.0) for factor in scale)


def _check_scale(name: str, method: Method, parameters: Mapping[str, Any]) -> None:
    """Refuse to scale a quantised tensor, since its codes are copied."""
    if _is_scaled(method, parameters):
        raise ModelError(
            f"tensor {printable(name)} is quantised, or is a scale of a quantised tensor, so it cannot be scaled: dequantise "
            "the model first"
        )


class _Binder:
    """Makes the jobs that are not copies, and collects warnings."""

    def __init__(
        self,
        config: MergeConfig,
        method: Method,
        fishers: Sequence[CompanionIndex],
        grams: Sequence[CompanionIndex],
        own_names: Mapping[str, Mapping[str, str]],
        stacks: Mapping[str, int],
    ) -> None:
        self._config, self._method, self._fishers, self._grams = config, method, fishers, grams
        self._own_names, self._stacks = own_names, stacks
        self._places = {spec.name: place for place, spec in enumerate(config.models)}
        self._without_fisher: list[str] = []
        self._shared: dict[tuple[object, ...], Mapping[str, object]] = {}

    def merge(
        self,
        ordinal: int,
        output: OutputTensor,
        template: SourceRef,
        sources: tuple[SourceRef, ...],
        base: SourceRef | None,
        parameters: Mapping[str, object],
    ) -> Job:
        """Return the job of a tensor that all inputs have with the same shape."""
        if not template.n_elements:
            return _copy(ordinal, output.name, template, self._config)
        if template.dtype not in FLOATS:
            return _agree(ordinal, output.name, template, (*((base,) if base is not None else ()), *sources))
        plain = template.as_stored(_output_dtype((template,), self._config))
        if (
            plain is not template
            and self._method.name == "passthrough"
            and not _is_scaled(self._method, parameters)
        ):
            return _copy(ordinal, output.name, template, self._config)  # FP8, code by code
        rule_base = self._rule_base(base, parameters)
        lenders = (template,) if template.stored_format else (*sources, *((rule_base,) if rule_base else ()))
        dtype = _output_dtype(lenders, self._config)
        members = tuple(self._places[spec.name] for spec in output.part.sources)
        parameters = self._shared.setdefault(
            tuple(parameters.items()), parameters
        )  # there may be many tensors
        matrix = None
        if self._method.matrices:
            matrix = matrix_of(self._config.matrices, output.name, template.shape, self._stacks)
            if matrix is None and rule_base is not None and self._config.matrices.rest == "base":
                kept = rule_base.as_stored(dtype)
                return Job(ordinal, output.name, dtype, template.shape, "copy", (kept,), None, {})
        return Job(
            ordinal,
            output.name,
            dtype,
            template.shape,
            "merge",
            sources if matrix is None else read_as_deltas(sources, rule_base),
            rule_base,
            parameters,
            self._diagonals(output, template, members, sources),
            self._matrices(output, template, members),
            members if members != tuple(range(len(self._places))) else (),
            self._stacks,
            matrix=matrix,
        )

    def _rule_base(self, base: SourceRef | None, parameters: Mapping[str, object]) -> SourceRef | None:
        drops = self._method.drops(parameters)
        if drops and base is None:
            raise ConfigError(
                f"{self._config.where}: base_model: a drop needs a base model; set `base_model`"
            )
        return base if drops or self._method.base in ("required", "optional") else None

    def _diagonals(
        self, output: OutputTensor, template: SourceRef, members: Sequence[int], sources: Sequence[SourceRef]
    ) -> tuple[CompanionRef, ...]:
        if not self._fishers:
            return ()
        if any(ref.is_gathered for ref in sources):
            self._without_fisher.append(
                output.name
            )  # the diagonal's rows are in the order of the model's own vocabulary
            return ()
        pairs = self._stored(self._fishers, output, members)
        found = [index for index, name in pairs if name in index]
        if not found:
            self._without_fisher.append(output.name)
            return ()
        for index, name in pairs:
            if name not in index:
                raise ModelError(
                    f"{printable(index.reference)}: the Fisher diagonal of tensor {printable(name)} is missing, but "
                    f"{printable(found[0].reference)} has one: list the tensor under `exclude:` to copy it"
                )
            if index[name].shape != template.shape:
                raise ModelError(
                    f"{printable(index.reference)}: the Fisher diagonal of tensor {printable(name)} has shape "
                    f"{list(index[name].shape)}, the tensor has {list(template.shape)}: the store belongs to a different model"
                )
        return tuple(index[name] for index, name in pairs)

    def _stored(
        self, stores: Sequence[CompanionIndex], output: OutputTensor, members: Sequence[int]
    ) -> list[tuple[CompanionIndex, str]]:
        """Return the store of each source, and the model's own name of the output tensor."""
        return [
            (stores[member], self._own_names.get(spec.reference, {}).get(name, name))
            for member, (spec, name) in zip(members, output.models, strict=True)
        ]

    def _matrices(
        self, output: OutputTensor, template: SourceRef, members: Sequence[int]
    ) -> tuple[CompanionRef, ...]:
        """Return the Gram matrices of a linear map's weight; empty if no model has one or the tensor is not a matrix."""
        pairs = self._stored(self._grams, output, members) if self._grams else []
        if len(template.shape) != 2 or not pairs or not any(name in index for index, name in pairs):
            return ()
        found = []
        for index, name in pairs:
            ref = index.get(name)
            if ref is None or ref.shape != (template.shape[1], template.shape[1]) or ref.dtype != "F32":
                raise ModelError(
                    f"{printable(index.reference)}: the Gram matrix of {template.shape[1]} inputs for tensor {printable(name)} is "
                    "missing, but other models have one: list the tensor under `exclude:` to copy it"
                )
            found.append(ref)
        return tuple(found)

    def warnings(self) -> list[str]:
        """Return warnings about all jobs together."""
        if not self._without_fisher:
            return []
        n, first = len(self._without_fisher), printable(self._without_fisher[0])
        return [
            f"{n} tensors have no Fisher diagonal in any model, or have reordered rows; they use the `fallback` (first: {first})"
        ]


def _agree(ordinal: int, name: str, template: SourceRef, inputs: Sequence[SourceRef]) -> Job:
    dtypes = {ref.dtype for ref in inputs}
    if template.dtype not in INTEGERS and len(inputs) > 1:
        raise ModelError(
            f"tensor {printable(name)} in {printable(template.path)} is {template.dtype}, a quantised or complex dtype that "
            "is not merged; dequantise the models first, or list it under `exclude:` to copy it from one model"
        )
    if len(dtypes) > 1:
        raise ModelError(
            f"tensor {printable(name)}: integer dtypes differ ({', '.join(sorted(dtypes))}); list it under `exclude:`"
        )
    others = tuple(ref for ref in dict.fromkeys(inputs) if ref != template)
    return Job(ordinal, name, template.dtype, template.shape, "agree", (template, *others), None, {})
