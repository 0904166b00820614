"""The merge plan: what, where and how, from headers alone. Nothing below it looks at the config."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from streammerge.algebra.extent import Extent
from streammerge.checkpoint.companions import CompanionIndex
from streammerge.checkpoint.index import TensorIndex
from streammerge.config.schema import MergeConfig
from streammerge.dtypes import FLOATS
from streammerge.errors import BudgetError
from streammerge.formats.zarr_store import ChunkedRef
from streammerge.io.stamp import FileStamp
from streammerge.methods.registry import Method
from streammerge.methods.tensor_context import TensorContext
from streammerge.planning.files.config_json import merged_config
from streammerge.planning.files.ecosystem import ecosystem_of
from streammerge.planning.files.surroundings import Surroundings, surroundings
from streammerge.planning.files.tokenizer import TokenizerFiles, tokenizer_files
from streammerge.planning.job import Job
from streammerge.planning.layout import Layout, lay_out
from streammerge.planning.memory.allocate import Needs, StatisticsMemory, asked_together, lists_nbytes
from streammerge.planning.memory.budget import Budget
from streammerge.planning.memory.division import BLOCK_ELEMENTS, Division, runs_in_torch, torch_workspace
from streammerge.planning.overview import as_html, as_text, overview
from streammerge.planning.resolve.codes import holds_codes
from streammerge.planning.resolve.jobs import Resolved, resolve_jobs
from streammerge.planning.resolve.matching import match_names
from streammerge.planning.resolve.quantised import check_codes
from streammerge.planning.resolve.vocabulary import Alignment, align
from streammerge.planning.schedule import Chunk, Interval, StatisticsPass, Step, Work, steps
from streammerge.statistics.kinds import (
    AbsSum,
    FisherSquares,
    Gram,
    LowWords,
    Mixing,
    Squares,
    Statistic,
    passes_of,
)
from streammerge.units import format_at_least, format_size

__all__ = [
    "BLOCK_ELEMENTS",
    "LeftOut",
    "MergePlan",
    "describe",
    "make_plan",
    "needs_data",
    "runs_in_torch",
    "tensor_context_of",
    "tensor_values",
    "torch_workspace",
]

LeftOut = Literal["tokenizer", "model card"]
NEW_TOKEN_NBYTES = 2000
"""Of a token that is added to a tokenizer: its entries in two files, and their texts."""


@dataclass(frozen=True, repr=False)
class MergePlan:
    """Everything `merge` will do; `summary()` says it in a few lines."""

    config: MergeConfig
    method: Method
    models: tuple[TensorIndex, ...]
    base: TensorIndex | None
    jobs: tuple[Job, ...]
    access: tuple[Extent, ...]
    """What each job needs to see at once."""
    work: tuple[Work, ...]
    layout: Layout
    budget: Budget
    seed: int
    torch_only: bool
    """Every piece goes through the torch formulas."""
    warnings: tuple[str, ...] = field(default=())
    fishers: tuple[CompanionIndex, ...] = ()
    """The Fisher diagonal of each model, for a method that weighs by them."""
    grams: tuple[CompanionIndex, ...] = ()
    """The Gram matrices of each model, for a method that takes them."""
    device: str = "cpu"
    """``cpu`` or ``cuda:N``."""
    bases: tuple[TensorIndex, ...] = ()
    """Bases of slices, where they are others than `base`."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """The output's config.json; empty where the template model has none."""
    left_out: tuple[LeftOut, ...] = ()
    """Files beside the weights that are not wanted."""
    tokenizer: TokenizerFiles | None = None
    """Its tokenizer files, where they are not the template model's as they are."""
    vocabulary: str = ""
    """What identifies the rows that aligned vocabularies are gathered from."""
    statistics_memory: StatisticsMemory = field(default=StatisticsMemory())
    """What statistics may take beside the buffers."""
    division: Division | None = None
    """What the memory was divided by, to try other amounts of it."""
    beside: Surroundings = field(default=Surroundings())
    """The files beside the weights."""

    def __repr__(self) -> str:
        return f"<MergePlan\n{self.summary()}>"

    def __str__(self) -> str:
        return self.summary()

    def _repr_html_(self) -> str:
        """Return what a notebook shows."""
        return as_html(overview(self))

    def summary(self) -> str:
        """Return the method, the models, the tensors, the bytes and the memory, one a line."""
        return as_text(overview(self))

    @property
    def template(self) -> TensorIndex:
        """The model that lends its config, tokenizer and tensor names: the base, else the first."""
        return self.base if self.base is not None else self.models[0]

    @property
    def inputs(self) -> tuple[TensorIndex, ...]:
        """All models read, bases last; a base that is also one of the models comes once."""
        bases = [*([] if self.base is None else [self.base]), *self.bases]
        return (*self.models, *(base for base in bases if not any(base is model for model in self.models)))

    @property
    def stamped(self) -> dict[str, tuple[FileStamp, ...]]:
        """The files behind every model and what lies beside it, by its reference."""
        return {index.reference: index.stamps for index in self.inputs} | {
            index.reference: index.stamps for index in self.stores
        }

    @property
    def stores(self) -> tuple[CompanionIndex, ...]:
        """What lies beside the models: Fisher diagonals, Gram matrices."""
        return (*self.fishers, *self.grams)

    @property
    def random(self) -> bool:
        """Whether any random word may be drawn."""
        return any(self.method.draws(tensor_context_of(job), job.parameters) for job in _distinct(self.jobs))

    def steps(self, done: Mapping[int, Sequence[Interval]] | None = None) -> Iterator[Step]:
        """Yield what is left to do when `done` elements of each job are finished."""
        return steps(self.jobs, self.work, self.budget, done or {})

    def model_rounds(self) -> int:
        """Return how many whole-model statistics rounds come before the merge."""
        return max(
            (
                sum(statistics[0].extent == Extent.MODEL for statistics in self.rounds_of(job))
                for job in _distinct(self.jobs)
            ),
            default=0,
        )

    def rounds_reading(self, job: Job, extent: Extent) -> list[list[Statistic]]:
        """Return the rounds of one extent that need a pass over the files."""
        return [
            statistics
            for statistics in self.rounds_of(job)
            if statistics[0].extent == extent
            and any(needs_data(statistic, self.jobs) for statistic in statistics)
        ]

    def model_passes(self) -> int:
        """Return how many times the files are read for whole-model statistics before the merge."""
        return max((len(self.rounds_reading(job, Extent.MODEL)) for job in _distinct(self.jobs)), default=0)

    def rounds_of(self, job: Job) -> list[list[Statistic]]:
        """Return the statistics statistics of each round of a merge job, with placeholder answers."""
        if job.kind != "merge":
            return []
        return self.method.rounds(tensor_context_of(job), job.parameters)

    def bytes_to_read(self) -> int:
        """Return the bytes all passes read: each input once, and once more for each streamed pass."""
        total = sum(job.input_bytes + job.fisher_bytes for job in self.jobs)
        for job, how in zip(self.jobs, self.work, strict=True):
            rounds = self.rounds_reading(job, Extent.MODEL)
            if how.mode == "streamed":
                rounds += self.rounds_reading(job, Extent.TENSOR)
            for statistics in rounds:
                total += self._bytes_of(job, statistics)
        return total

    def bytes_of_passes(self) -> int:
        """Return the bytes of `bytes_to_read` that whole-model statistics read before the first element is written."""
        return sum(
            self._bytes_of(job, statistics)
            for job in self.jobs
            for statistics in self.rounds_reading(job, Extent.MODEL)
        )

    @staticmethod
    def _bytes_of(job: Job, statistics: Sequence[Statistic]) -> int:
        """Return the bytes that a round of statistics reads of a job."""
        squares = all(isinstance(statistic, FisherSquares) for statistic in statistics)
        return (job.fisher_bytes if squares else job.input_bytes) * passes_of(statistics)

    def identity(self) -> dict[str, str]:
        """Return what the output's bytes depend on, by name, each as a short digest or value."""
        layout = hashlib.blake2b(digest_size=16)
        for shard in self.layout.shards:
            layout.update(shard.name.encode() + shard.header)
        return {
            "config": _digest(self.config.text),
            "seed": str(self.seed),
            "shard size": layout.hexdigest(),
            **self.method.identity,
            "left out": ", ".join(self.left_out),
            **({} if self.tokenizer is None else {"tokenizer": self._tokenizer_digest()}),
        }

    def _tokenizer_digest(self) -> str:
        assert self.tokenizer is not None
        digest = hashlib.blake2b(self.vocabulary.encode(), digest_size=16)
        for name, data in sorted(self.tokenizer.changed.items()):
            digest.update(repr((name, len(data))).encode() + data)
        return digest.hexdigest()


def make_plan(
    config: MergeConfig,
    method: Method,
    models: Sequence[TensorIndex],
    base: TensorIndex | None,
    budget: Budget,
    *,
    shard_size: int,
    seed: int | None = None,
    device: str = "cpu",
    torch_only: bool = False,
    fishers: Sequence[CompanionIndex] = (),
    grams: Sequence[CompanionIndex] = (),
    notes: Sequence[str] = (),
    bases: Sequence[TensorIndex] = (),
    left_out: Sequence[LeftOut] = (),
    tensors_only: bool = False,
) -> MergePlan:
    """Decide everything about a merge.

    Parameters
    ----------
    fishers
        The Fisher diagonal of each model, for a method that weighs by them.
    grams
        The Gram matrices of each model, for a method that takes them.
    seed
        Overrides the config's.
    device
        ``cpu`` or ``cuda:N``, where what is not copied is computed.
    torch_only
        Every piece goes through the torch formulas (a GPU, or no compiled kernels).
    notes
        Warnings to show with the plan's own.
    bases
        Bases of slices, where they are others than `base`.
    left_out
        Files beside the weights that are not wanted.
    tensors_only
        No file is: the output stays in memory, and the models may have no folder.

    Raises
    ------
    InputError
        If the models, the config or the budget do not allow the merge.
    """
    template = base if base is not None else models[0]
    check_codes(config, method, (*models, *bases, template))
    every = {index.reference: index for index in (*models, *bases, template)}
    matched = match_names(template, every, config.exclude)
    indexes = matched.indexes
    alignment = None if config.tokenizer is None else align(config.tokenizer, template, indexes)
    if alignment is not None:
        _check_tokens(alignment, budget)
    resolved = resolve_jobs(config, method, template, matched, fishers, alignment, grams)
    jobs = resolved.jobs
    files = _Files()
    if not tensors_only:
        files = _files_beside(config, template, indexes, resolved, alignment, left_out)
    cache: dict[tuple[object, ...], Needs] = {}
    needs = []
    for job in jobs:
        key = (job.kind, bool(job.grams), *job.parameters.items())
        if key not in cache:
            cache[key] = _needs(job, method, jobs)
        needs.append(cache[key])

    n_refs = sum(len(index) for index in indexes.values()) + matched.n_blocks
    n_stored = sum(len(index) for index in (*fishers, *grams))
    lists = lists_nbytes(n_refs, n_stored, jobs, needs)
    lists += 0 if alignment is None else alignment.nbytes
    lists += 0 if files.tokenizer is None else sum(map(len, files.tokenizer.changed.values()))
    division = Division(
        budget, jobs, tuple(needs), lists, method, on_host=device == "cpu", torch_only=torch_only
    )
    allocation = division.allocate()
    return MergePlan(
        config,
        method,
        tuple(models),
        base,
        jobs,
        tuple(need.access for need in needs),
        allocation.work,
        lay_out(jobs, shard_size, ecosystem_of(template).stem, template.folders),
        allocation.budget,
        config.seed if seed is None else seed,
        torch_only,
        (*notes, *resolved.warnings, *files.remarks),
        tuple(fishers),
        tuple(grams),
        device,
        tuple(bases),
        files.settings,
        tuple(sorted(left_out)),
        files.tokenizer,
        "" if alignment is None else alignment.digest(),
        allocation.statistics,
        division,
        files.beside,
    )


@dataclass(frozen=True)
class _Files:
    """What an output has beside its weights."""

    settings: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: TokenizerFiles | None = None
    beside: Surroundings = field(default=Surroundings())
    remarks: tuple[str, ...] = ()


def _files_beside(
    config: MergeConfig,
    template: TensorIndex,
    indexes: Mapping[str, TensorIndex],
    resolved: Resolved,
    alignment: Alignment | None,
    left_out: Sequence[LeftOut],
) -> _Files:
    settings, remarks = merged_config(config, template, indexes, resolved.jobs, resolved.stacks, alignment)
    tokenizer = None
    if alignment is not None or config.chat_template is not None:
        tokenizer = tokenizer_files(config, template, indexes, alignment)
        remarks += [*(() if alignment is None else alignment.notes), *tokenizer.notes]
    source = tokenizer.directory if tokenizer else None if "tokenizer" in left_out else template.directory
    beside = surroundings(template, source, tokenizer, quantised=holds_codes(resolved.jobs))
    return _Files(settings, tokenizer, beside, (*remarks, *beside.notes))


def _check_tokens(alignment: Alignment, budget: Budget) -> None:
    """Refuse more new tokens than there is room for while the tokenizer's files are made."""
    needed = len(alignment.new) * NEW_TOKEN_NBYTES
    if needed > budget.capacity:
        raise BudgetError(
            f"a tokenizer with {len(alignment.new)} new tokens takes {format_size(needed)} to make: give at least "
            f"{format_at_least(needed + budget.reserve)}, or `tokenizer_source: base`"
        )


def _needs(job: Job, method: Method, jobs: Sequence[Job]) -> Needs:
    """Return what the merge of a job asks for."""
    if job.kind != "merge":
        return Needs(Extent.ELEMENT, holds=False, sums=False, extent=Extent.ELEMENT)
    context = tensor_context_of(job)
    rounds = method.rounds(context, job.parameters)
    own = [r for statistics in rounds for r in statistics if r.extent == Extent.TENSOR]
    holds = any(needs_data(statistic, jobs) for statistic in own)
    sums = any(isinstance(statistic, AbsSum | Squares | Gram) for statistic in own)
    extent = method.sees(context, job.parameters)
    return Needs(method.access_with(context, job.parameters), holds, sums, extent, *asked_together(rounds))


def tensor_context_of(job: Job) -> TensorContext:
    """Return what the method may know of a merge job."""
    return TensorContext(
        job.n_models,
        job.ordinal,
        fisher=bool(job.fishers),
        gram=bool(job.grams),
        has_base=job.base is not None,
        tensor=job.name,
    )


def needs_data(statistic: Statistic, jobs: Sequence[Job]) -> bool:
    """Return whether the answer takes a pass over the inputs; a Fisher store records its squares."""
    if isinstance(statistic, FisherSquares):
        return any(job.fishers and not isinstance(job.fishers[statistic.model], ChunkedRef) for job in jobs)
    return not isinstance(statistic, LowWords | Mixing)


def _distinct(jobs: Sequence[Job]) -> list[Job]:
    seen = {(bool(job.grams), *job.parameters.items()): job for job in jobs if job.kind == "merge"}
    return list(seen.values())


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def describe(plan: MergePlan) -> dict[str, object]:
    """Return the plan as plain values, for people and for ``--json``."""
    chunks = [step for step in plan.steps() if isinstance(step, Chunk)]
    surveys = sum(isinstance(step, StatisticsPass) for step in plan.steps())
    kinds: dict[str, int] = {}
    for job in plan.jobs:
        kinds[job.kind] = kinds.get(job.kind, 0) + 1
    return {
        "method": plan.method.name,
        "models": [model.reference for model in plan.models],
        "base_model": plan.base.reference if plan.base is not None else None,
        "tensors": len(plan.jobs),
        "tensors_by_kind": kinds,
        "elements": sum(job.n_elements for job in plan.jobs if job.dtype in FLOATS),
        "dtypes": sorted({job.dtype for job in plan.jobs}),
        "access": sorted({str(access) for access in plan.access}),
        "model_passes": plan.model_passes(),
        "streamed_tensors": surveys,
        "chunks": len(chunks),
        "largest_chunk_bytes": max((chunk.nbytes for chunk in chunks), default=0),
        "bytes_to_read": plan.bytes_to_read(),
        "bytes_of_passes": plan.bytes_of_passes(),
        "bytes_to_write": plan.layout.nbytes,
        "shards": [
            {"name": shard.name, "nbytes": shard.nbytes, "tensors": len(shard.jobs)}
            for shard in plan.layout.shards
        ],
        "memory": plan.budget.total,
        "memory_reserve": plan.budget.reserve,
        "threads": plan.budget.threads,
        "device": plan.device,
        "warnings": list(plan.warnings),
    }


def tensor_values(plan: MergePlan) -> list[dict[str, object]]:
    """Return how every tensor is handled and where it goes, as plain values."""
    return [
        {
            "name": job.name,
            "kind": job.kind,
            "dtype": job.dtype,
            "shape": list(job.shape),
            "access": str(plan.access[job.ordinal]),
            "mode": plan.work[job.ordinal].mode,
            "shard": plan.layout.shards[slot.shard].name,
            "offset": slot.offset,
            "nbytes": slot.nbytes,
            "parameters": dict(job.parameters),
        }
        for job, slot in zip(plan.jobs, plan.layout.slots, strict=True)
    ]
