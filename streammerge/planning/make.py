"""Make the plan: resolve the jobs, divide the memory, lay out the shards, and collect all other files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import field
from typing import Any

from streammerge.backends.base import Backend
from streammerge.checkpoint.index import TensorIndex
from streammerge.checkpoint.weight_names import ADAPTER_WEIGHTS
from streammerge.config.schema import MergeConfig
from streammerge.errors import BudgetError, ConfigError, printable
from streammerge.methods.registry import Method
from streammerge.planning.backend import Device
from streammerge.planning.files.config_json import all_settings
from streammerge.planning.files.ecosystem import SENTENCE_TRANSFORMERS, ecosystem_of, ecosystem_of_component
from streammerge.planning.files.single_file import check_fits_one_file, kept_metadata, not_written
from streammerge.planning.files.surroundings import Surroundings, surroundings
from streammerge.planning.files.tokenizer import TokenizerFiles, tokenizer_files
from streammerge.planning.inputs import Inputs
from streammerge.planning.job import Job
from streammerge.planning.layout import Folder, Layout, lay_out, lay_out_file
from streammerge.planning.memory.allocate import Needs, lists_nbytes
from streammerge.planning.memory.budget import SMALLEST_CAPACITY, Budget
from streammerge.planning.memory.division import Division
from streammerge.planning.moe.resolve import resolve_experts, with_settings
from streammerge.planning.needs import likeness, needs_of
from streammerge.planning.options import DEFAULT_SHARD_SIZE, PlanOptions
from streammerge.planning.plan import MergePlan
from streammerge.planning.quantize.base import Material, Storage
from streammerge.planning.quantize.choose import choose_storage
from streammerge.planning.resolve.codes import holds_codes
from streammerge.planning.resolve.components import check_components, check_pipeline
from streammerge.planning.resolve.jobs import Resolved, resolve_jobs
from streammerge.planning.resolve.matching import Matched, match_names
from streammerge.planning.resolve.quantised import check_codes
from streammerge.planning.resolve.tokens import compare_tokens
from streammerge.planning.resolve.vocabulary import Alignment, align
from streammerge.planning.stages import with_shared
from streammerge.planning.streamed import held_nbytes
from streammerge.records import dataclass
from streammerge.units import format_at_least, format_size

_REFS_OF_CODES = 3
"""Additional references per quantised tensor: to its codes, its scales and their descriptions."""
NEW_TOKEN_NBYTES = 2000
"""Bytes per token that is added to a tokenizer: its entries in two files, and their text."""


_NO_LIMIT = 1 << 62
"""Bytes of the one file in which an adapter is computed."""
OTHER_SETTINGS = "params.json"
"""What Mistral's consolidated models have in place of config.json."""


@dataclass(frozen=True)
class Resources:
    """The memory, threads and processor of a merge."""

    budget: Budget
    """The memory of the process, before lists and statistics are subtracted."""
    device: Device
    backend: Backend


def make_plan(
    config: MergeConfig, method: Method, inputs: Inputs, resources: Resources, options: PlanOptions
) -> MergePlan:
    """Decide everything about a merge.

    Parameters
    ----------
    options
        Only shard size, seed, notes and left-out files are used; `resources` determines the rest.

    Raises
    ------
    InputError
        If the models, the config or the budget do not allow the merge.
    """
    template, every = inputs.template, inputs.by_reference
    check_pipeline(config, template)
    check_codes(config, method, (*inputs.models, *inputs.bases, template))
    matched = match_names(template, every, config.exclude)
    alignment = None if config.tokenizer is None else align(config.tokenizer, template, matched.indexes)
    if alignment is not None:
        _check_tokens(alignment, resources.budget)
    seed = config.seed if options.seed is None else options.seed
    mixture = None if config.moe is None else resolve_experts(config, template, matched.indexes, seed)
    if mixture is None:
        resolved = resolve_jobs(config, method, template, matched, inputs.fishers, alignment, inputs.grams)
    else:
        resolved, template = mixture.resolved, with_settings(template, mixture)
    check_components(template, tuple(every.values()), resolved.jobs)
    told = (
        []
        if alignment is not None or mixture is not None
        else compare_tokens(inputs.models, template, resolved.jobs)
    )
    storage = choose_storage(Material(config, method, template, matched.indexes, resolved, inputs.merged))
    jobs = tuple(map(with_shared, storage.jobs)) if inputs.stages else storage.jobs
    files = _Files()
    if storage.adapter is not None:
        _check_adapter(config, options)
    elif not options.tensors_only:
        files = _files_beside(config, template, matched, resolved, storage, alignment, options)
    if options.file is not None:
        files = _of_single_file(files, storage, template, config)
    needs = _needs_of_all(jobs, method)
    lists = _lists_nbytes(inputs, matched, jobs, needs) + files.nbytes
    lists += 0 if alignment is None else alignment.nbytes
    lists += 0 if mixture is None else mixture.nbytes
    layout = _layout_of(jobs, template, options, adapter=storage.adapter is not None)
    lists += held_nbytes(layout) if options.streamed else 0
    division = Division(
        resources.budget, jobs, needs, lists, method, resources.backend, in_order=options.streamed
    )
    allocation = division.allocate()
    return MergePlan(
        config=config,
        method=method,
        models=inputs.models,
        base=inputs.base,
        jobs=jobs,
        access=tuple(need.access for need in needs),
        work=allocation.work,
        layout=layout,
        budget=allocation.budget,
        seed=seed,
        backend=resources.backend,
        device=resources.device.name,
        device_reason=resources.device.reason,
        division=division,
        warnings=(*options.notes, *told, *resolved.warnings, *storage.notes, *files.remarks),
        fishers=inputs.fishers,
        grams=inputs.grams,
        bases=inputs.bases,
        settings=files.settings,
        left_out=tuple(sorted(options.left_out)),
        tokenizer=files.tokenizer,
        vocabulary="" if alignment is None else alignment.digest(),
        statistics_memory=allocation.statistics,
        beside=files.beside,
        tensors_left_out=resolved.left_out,
        streamed=options.streamed,
        adapter=storage.adapter,
        stages=inputs.stages,
        gates=None if mixture is None else mixture.gates,
    )


def _folders_of(template: TensorIndex) -> list[Folder]:
    """Return the output's folders of weights, with the file names that the libraries reading them expect."""
    ecosystem = ecosystem_of(template)
    alone = ecosystem is SENTENCE_TRANSFORMERS
    return [
        *([] if template.is_pipeline else [Folder(stem=ecosystem.stem)]),
        *(Folder(one.folder, ecosystem_of_component(one).stem, alone) for one in template.components),
    ]


def _needs_of_all(jobs: Sequence[Job], method: Method) -> tuple[Needs, ...]:
    """Return the needs of each job; jobs with the same parameters share theirs."""
    known: dict[tuple[object, ...], Needs] = {}
    needs = []
    for job in jobs:
        key = likeness(job, method)
        if key not in known:
            known[key] = needs_of(job, method, jobs)
        needs.append(known[key])
    return tuple(needs)


def _lists_nbytes(inputs: Inputs, matched: Matched, jobs: Sequence[Job], needs: Sequence[Needs]) -> int:
    """Return the bytes of lists of tensors, those of stages and the statistics that a stage holds included."""
    n_refs = sum(len(index) for index in matched.indexes.values()) + matched.n_blocks
    n_refs += _REFS_OF_CODES * sum(
        ref.stored_format is not None for index in matched.indexes.values() for ref in index.values()
    )
    n_stored = sum(len(index) for index in (*inputs.fishers, *inputs.grams))
    of_stages = sum(stage.division.lists for stage in inputs.stages)
    of_stages += max((stage.statistics_memory.nbytes for stage in inputs.stages), default=0)
    return lists_nbytes(n_refs, n_stored, jobs, needs) + of_stages


@dataclass(frozen=True)
class _Files:
    """The files of an output in addition to its weights."""

    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    tokenizer: TokenizerFiles | None = None
    beside: Surroundings = field(default=Surroundings())
    remarks: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """Size of the files that are held in memory until they are written."""
        return 0 if self.tokenizer is None else sum(map(len, self.tokenizer.changed.values()))


def _files_beside(
    config: MergeConfig,
    template: TensorIndex,
    matched: Matched,
    resolved: Resolved,
    storage: Storage,
    alignment: Alignment | None,
    options: PlanOptions,
) -> _Files:
    indexes = matched.indexes
    settings, remarks = all_settings(config, template, indexes, storage, resolved.stacks, alignment)
    tokenizer = None
    if alignment is not None or config.chat_template is not None:
        tokenizer = tokenizer_files(config, template, indexes, alignment)
        remarks += [*(() if alignment is None else alignment.notes), *tokenizer.notes]
    source = (
        tokenizer.directory if tokenizer else None if "tokenizer" in options.left_out else template.directory
    )
    beside = surroundings(
        template,
        source,
        tokenizer,
        quantised=storage.keeps or (storage.declared is None and holds_codes(storage.jobs)),
    )
    if not settings and options.file is None and OTHER_SETTINGS not in beside.files:
        what = f"no config.json in {printable(template.reference)}, and so none in the output"
        remarks = [*remarks, f"{what}: put the one of its architecture there before you load it"]
    return _Files(settings, tokenizer, beside, (*remarks, *beside.notes))


def _layout_of(jobs: Sequence[Job], template: TensorIndex, options: PlanOptions, *, adapter: bool) -> Layout:
    if options.file is not None:
        return lay_out_file(jobs, options.file, kept_metadata(template))
    if adapter:
        return lay_out(jobs, _NO_LIMIT, beside=ADAPTER_WEIGHTS, adjacent=options.streamed)
    return lay_out(jobs, options.shard_size, _folders_of(template))


def _check_adapter(config: MergeConfig, options: PlanOptions) -> None:
    """Refuse an adapter that is to be a single file, held in memory, or cut into shards."""
    if options.file is not None:
        raise ConfigError(f"{config.where}: output: lora is a directory of several files: give one as OUT")
    if options.tensors_only:
        raise ConfigError(f"{config.where}: output: lora is written to a directory, not held in memory")
    if options.shard_size != DEFAULT_SHARD_SIZE:
        raise ConfigError(
            f"{config.where}: output: lora is one file, which PEFT does not read in shards: leave --shard-size (shard_size) out"
        )


def _of_single_file(files: _Files, storage: Storage, template: TensorIndex, config: MergeConfig) -> _Files:
    """Return the files of an output that is one file: none; refuse one that is incomplete without them."""
    if storage.declared is not None or storage.keeps:
        raise ConfigError(
            f"{config.where}: quantize: what is quantised is declared in config.json, which one file has not: give a "
            "directory as OUT, or leave `quantize` out"
        )
    check_fits_one_file(template, {} if files.tokenizer is None else files.tokenizer.changed, config.where)
    return _Files(remarks=not_written(template, list(files.beside.files)))


def _check_tokens(alignment: Alignment, budget: Budget) -> None:
    """Refuse new tokens if the tokenizer's files would not fit in memory."""
    needed = len(alignment.new) * NEW_TOKEN_NBYTES
    if needed > max(budget.capacity, SMALLEST_CAPACITY):  # less is refused with all that the merge needs
        raise BudgetError(
            f"adding {len(alignment.new)} tokens to the tokenizer needs {format_size(needed)}: give at least --memory "
            f"{format_at_least(needed + budget.reserve)}, or use `tokenizer_source: base`",
            needed + budget.reserve,
        )
