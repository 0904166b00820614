"""From a config and the headers of its models to jobs: which tensor is merged from what, and how."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from streammerge.config.schema import MergeConfig
from streammerge.config.settings import count_layers, layer_fraction
from streammerge.dtypes import FLOATS, INTEGERS
from streammerge.errors import ConfigError, ModelError, printable
from streammerge.index.header import TensorRef
from streammerge.index.model import TensorIndex
from streammerge.methods.registry import Method, Scope
from streammerge.methods.requests import SignTotal
from streammerge.plan.job import Job
from streammerge.plan.parameters import bind, check_names, preset_of


def bind_jobs(
    config: MergeConfig, method: Method, models: Sequence[TensorIndex], base: TensorIndex | None
) -> tuple[tuple[Job, ...], list[str]]:
    """Return the jobs in the file order of the first input, and warnings.

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
            job = _merge(ordinal, donor[name], sources, inputs, base, config, method, parameters)
        jobs.append(job)
    if len({ref.dtype for job in jobs for ref in job.inputs if job.kind == "merge"}) > 1:
        warnings.append("the models' float dtypes differ; each output tensor takes the dtype of "
                        f"{printable(donor.reference)} unless `dtype` says otherwise")  # fmt: skip
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


def _merge(
    ordinal: int, donor: TensorRef, sources: tuple[TensorRef, ...], inputs: Sequence[TensorRef],
    base: TensorIndex | None, config: MergeConfig, method: Method, parameters: Mapping[str, object],
) -> Job:  # fmt: skip
    name = donor.name
    if not donor.n_elements:
        return _copy(ordinal, donor, config)
    if donor.dtype in FLOATS:
        recipe_base = base[name] if base is not None and method.base != "none" else None
        return Job(
            ordinal,
            name,
            _output_dtype(donor, config),
            donor.shape,
            "merge",
            sources,
            recipe_base,
            parameters,
        )
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
        if job.kind != "merge" or method.is_formula or key in checked:
            continue
        checked.add(key)
        try:
            rounds = method.rounds(Scope(job.n_models), job.parameters)
        except ConfigError as error:
            raise ConfigError(f"tensor {printable(job.name, 120)}: {error}") from None
        asked: list[tuple[object, ...]] = [
            (type(r), r.vector.model, getattr(r, "density", None)) if not isinstance(r, SignTotal) else (type(r),)
            for requests in rounds for r in requests if r.scope == "model"
        ]  # fmt: skip
        if first is not None and asked != first:
            raise ConfigError(
                f"tensor {printable(job.name, 120)}: density differs from other tensors', but `trim_scope: model` "
                "trims the model as one; give one density per model"
            )
        first = asked
