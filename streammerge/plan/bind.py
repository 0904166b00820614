"""From a config and the headers of its models to jobs: which tensor is merged from what, and how."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from streammerge.config.schema import MergeConfig
from streammerge.config.settings import count_layers, layer_fraction
from streammerge.dtypes import FLOATS, INTEGERS
from streammerge.errors import ConfigError, ModelError, printable
from streammerge.index.fishers import FisherIndex, FisherRef
from streammerge.index.header import TensorRef
from streammerge.index.model import TensorIndex
from streammerge.methods.registry import Method
from streammerge.methods.requests import FisherSquares, Gram, SignTotal
from streammerge.methods.scope import Scope
from streammerge.plan.job import Job
from streammerge.plan.parameters import bind, check_names, preset_of


def bind_jobs(
    config: MergeConfig, method: Method, models: Sequence[TensorIndex], base: TensorIndex | None,
    fishers: Sequence[FisherIndex] = (),
) -> tuple[tuple[Job, ...], list[str]]:  # fmt: skip
    """Return the jobs in the file order of the first input, and warnings.

    `fishers` has one diagonal per model, for a method that weighs by them.

    Raises
    ------
    ConfigError
        If the config does not suit the method.
    ModelError
        If a tensor is missing, or shapes or dtypes do not fit; the message has the cure.
    """
    warnings = check_names(config, method)
    _check_models(config, method)
    preset = preset_of(config, method)
    donor = base if base is not None else models[0]
    excluded = [re.compile(pattern) for pattern in config.exclude]
    names = list(donor)
    copied = {name for name in names if any(pattern.search(name) for pattern in excluded)}
    warnings += _compare_names(donor, [*models], excluded)
    n_layers = count_layers(names)
    binder = _Binder(config, method, base, fishers)
    jobs: list[Job] = []
    for name in names:
        ordinal = len(jobs)
        if name in copied:
            job = _copy(ordinal, donor[name], config)
        else:
            sources = tuple(model[name] for model in models)
            inputs = (*((base[name],) if base is not None else ()), *sources)
            _check_shapes(name, inputs, config)
            parameters = bind(config, method, preset, name, layer_fraction(name, n_layers))
            job = binder.merge(ordinal, donor[name], sources, inputs, parameters)
        jobs.append(job)
    if len({ref.dtype for job in jobs for ref in job.inputs if job.kind == "merge"}) > 1:
        warnings.append("the models' float dtypes differ; each output tensor takes the dtype of "
                        f"{printable(donor.reference)} unless `dtype` says otherwise")  # fmt: skip
    warnings += binder.warnings()
    _check_uniform_trim(jobs, method)
    return tuple(jobs), warnings


def _check_models(config: MergeConfig, method: Method) -> None:
    least, most = method.n_models
    n = len(config.models)
    if n < least or (most is not None and n > most):
        wanted = (
            f"exactly {least}" if least == most else f"at least {least}" if n < least else f"at most {most}"
        )
        raise ConfigError(
            f"{config.where}: models: {method.name!r} takes {wanted}, there are {n} (the base is not one of them)"
        )
    if method.base == "required" and config.base_model is None:
        raise ConfigError(f"{config.where}: base_model: {method.name!r} needs one")


def _compare_names(
    donor: TensorIndex, models: Sequence[TensorIndex], excluded: Sequence[re.Pattern[str]]
) -> list[str]:
    for model in models:
        missing = [n for n in donor if n not in model and not any(p.search(n) for p in excluded)]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise ModelError(
                f"{printable(model.reference)}: tensor {printable(missing[0])}{more} is missing, "
                f"{printable(donor.reference)} has it; list it under `exclude:` to copy it from there"
            )
    warnings = []
    for index in (donor, *models):
        if index.unlisted:
            warnings.append(f"{printable(index.reference)}: {len(index.unlisted)} tensors in its shards are not "
                            f"in its index and are left out (first: {printable(index.unlisted[0])})")  # fmt: skip
    extra_everywhere = [
        n for n in models[0] if n not in donor and all(n in model for model in models)
        and not any(p.search(n) for p in excluded)
    ]  # fmt: skip
    if extra_everywhere:
        raise ModelError(
            f"{printable(donor.reference)}: tensor {printable(extra_everywhere[0])} is missing, all other models "
            "have it; list it under `exclude:` to leave it out"
        )
    for model in models:
        extra = [name for name in model if name not in donor]
        if extra:
            warnings.append(f"{printable(model.reference)}: {len(extra)} tensors that {printable(donor.reference)} "
                            f"lacks are left out (first: {printable(extra[0])})")  # fmt: skip
    return warnings


def _check_shapes(name: str, inputs: Sequence[TensorRef], config: MergeConfig) -> None:
    first = inputs[0]
    for ref in inputs[1:]:
        if ref.shape != first.shape:
            embeds = len(ref.shape) == len(first.shape) == 2 and ref.shape[1] == first.shape[1]
            cause = "vocabularies differ: align the tokenizers first, " if embeds else "shapes differ: "
            raise ModelError(
                f"tensor {printable(name)}: {list(ref.shape)} in {printable(ref.path)}, {list(first.shape)} in "
                f"{printable(first.path)}; {cause}or list it under `exclude:` to copy it from one model"
            )
        if (ref.dtype in FLOATS) != (first.dtype in FLOATS):
            raise ModelError(
                f"tensor {printable(name)}: {ref.dtype} in {printable(ref.path)}, {first.dtype} in {printable(first.path)}; "
                "these cannot be merged; list it under `exclude:` to copy it from one model"
            )


def _output_dtype(ref: TensorRef, config: MergeConfig) -> str:
    wanted = config.out_dtype or config.dtype
    return wanted if wanted is not None and ref.dtype in FLOATS else ref.dtype


def _copy(ordinal: int, ref: TensorRef, config: MergeConfig) -> Job:
    return Job(ordinal, ref.name, _output_dtype(ref, config), ref.shape, "copy", (ref,), None, {})


class _Binder:
    """Makes the jobs that are no plain copies, and remembers what the user should know of them."""

    def __init__(
        self, config: MergeConfig, method: Method, base: TensorIndex | None, fishers: Sequence[FisherIndex]
    ) -> None:
        self._config, self._method, self._base, self._fishers = config, method, base, fishers
        self._without_fisher: list[str] = []

    def merge(
        self, ordinal: int, donor: TensorRef, sources: tuple[TensorRef, ...], inputs: Sequence[TensorRef],
        parameters: Mapping[str, object],
    ) -> Job:  # fmt: skip
        """Return the job of a tensor that every input has with the same shape."""
        if not donor.n_elements:
            return _copy(ordinal, donor, self._config)
        if donor.dtype not in FLOATS:
            return _agree(ordinal, donor, inputs)
        dtype = _output_dtype(donor, self._config)
        base = self._recipe_base(donor.name, parameters)
        fishers = self._diagonals(donor)
        return Job(ordinal, donor.name, dtype, donor.shape, "merge", sources, base, parameters, fishers)

    def _recipe_base(self, name: str, parameters: Mapping[str, object]) -> TensorRef | None:
        drops = self._method.drops(parameters)
        if drops and self._base is None:
            raise ConfigError(
                f"{self._config.where}: base_model: a drop acts on differences from a base; name it here"
            )
        uses_base = drops or self._method.base in ("required", "optional")
        return self._base[name] if self._base is not None and uses_base else None

    def _diagonals(self, donor: TensorRef) -> tuple[FisherRef, ...]:
        if not self._fishers:
            return ()
        found = [index for index in self._fishers if donor.name in index]
        if not found:
            self._without_fisher.append(donor.name)
            return ()
        for index in self._fishers:
            if donor.name not in index:
                raise ModelError(
                    f"{printable(index.reference)}: no Fisher diagonal of tensor {printable(donor.name)}, "
                    f"{printable(found[0].reference)} has one; list the tensor under `exclude:` to copy it"
                )
            if index[donor.name].shape != donor.shape:
                raise ModelError(
                    f"{printable(index.reference)}: the Fisher diagonal of tensor {printable(donor.name)} has shape "
                    f"{list(index[donor.name].shape)}, the tensor has {list(donor.shape)}; it belongs to another model"
                )
        return tuple(index[donor.name] for index in self._fishers)

    def warnings(self) -> list[str]:
        """Return what the user should know of all jobs together."""
        if not self._without_fisher:
            return []
        n, first = len(self._without_fisher), printable(self._without_fisher[0])
        return [f"{n} tensors have no Fisher diagonal in any model and take the `fallback` (first: {first})"]


def _agree(ordinal: int, donor: TensorRef, inputs: Sequence[TensorRef]) -> Job:
    name = donor.name
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
    others = tuple(ref for ref in inputs if ref is not donor)
    return Job(ordinal, name, donor.dtype, donor.shape, "agree", (donor, *others), None, {})


def _check_uniform_trim(jobs: Sequence[Job], method: Method) -> None:
    """A statistic of the whole model is one number: what is asked for must not vary with the tensor."""
    first: list[tuple[object, ...]] | None = None
    checked: set[tuple[object, ...]] = set()
    for job in jobs:
        key = tuple(job.parameters.items())
        if job.kind != "merge" or key in checked:
            continue
        checked.add(key)
        try:
            rounds = method.rounds(Scope(job.n_models, has_base=job.base is not None), job.parameters)
        except ConfigError as error:
            raise ConfigError(f"tensor {printable(job.name, 120)}: {error}") from None
        asked: list[tuple[object, ...]] = [
            (type(r), r.vector.model, getattr(r, "density", None))
            if not isinstance(r, SignTotal | FisherSquares | Gram) else (type(r),)
            for requests in rounds for r in requests if r.scope == "model"
        ]  # fmt: skip
        if first is not None and asked != first:
            raise ConfigError(
                f"tensor {printable(job.name, 120)}: density differs from other tensors', but `trim_scope: model` "
                "trims the model as one; give one density per model"
            )
        first = asked
