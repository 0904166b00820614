"""The merge plan: everything that is read, computed and written, from headers. Execution does not use the config."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import field
from functools import cached_property
from typing import Any

from streammerge.algebra.extent import Extent
from streammerge.backends.base import Backend
from streammerge.checkpoint.companions import CompanionIndex
from streammerge.checkpoint.index import TensorIndex
from streammerge.checkpoint.refs.gates import Gates
from streammerge.config.schema import MergeConfig
from streammerge.dtypes import FLOATS
from streammerge.errors import printable
from streammerge.formats.parts import all_parts
from streammerge.io.stamp import FileStamp
from streammerge.methods.registry import Method
from streammerge.planning.backend import backend_of, formulas_of, has_bits_of_device
from streammerge.planning.files.surroundings import Surroundings
from streammerge.planning.files.tokenizer import TokenizerFiles
from streammerge.planning.job import Job
from streammerge.planning.layout import Layout
from streammerge.planning.low_rank.adapter import AdapterPlan
from streammerge.planning.low_rank.memory import passes_over
from streammerge.planning.memory.allocate import StatisticsMemory
from streammerge.planning.memory.budget import Budget
from streammerge.planning.memory.division import Division
from streammerge.planning.needs import likeness, needs_data, tensor_context_of
from streammerge.planning.options import LeftOut
from streammerge.planning.overview import as_html, as_text, first_few
from streammerge.planning.schedule import Interval, Step, Work, steps
from streammerge.planning.streamed import order_in, reads_twice, rehearsed
from streammerge.planning.template import template_of
from streammerge.records import dataclass
from streammerge.statistics.base import Source, Statistic
from streammerge.units import format_size


@dataclass(frozen=True, repr=False)
class MergePlan:
    """Everything that a merge will do; `summary()` gives an overview. It pickles, and a copy merges to the same bytes."""

    config: MergeConfig
    method: Method
    models: tuple[TensorIndex, ...]
    base: TensorIndex | None
    jobs: tuple[Job, ...]
    access: tuple[Extent, ...]
    """The extent of each job."""
    work: tuple[Work, ...]
    layout: Layout
    budget: Budget
    seed: int
    backend: Backend
    """The chosen backend; see `backend_of` for jobs that it cannot compute."""
    device: str
    """The backend's device: ``cpu`` or ``cuda:N``."""
    division: Division
    """The division of the memory, to try other amounts."""
    warnings: tuple[str, ...] = ()
    fishers: tuple[CompanionIndex, ...] = ()
    """The Fisher diagonal of each model, for methods that use them."""
    grams: tuple[CompanionIndex, ...] = ()
    """The Gram matrices of each model, for methods that use them."""
    bases: tuple[TensorIndex, ...] = ()
    """Bases of single slices that differ from `base`."""
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """The output's config.json files, those of its components too, by path; none if the template model has none."""
    left_out: tuple[LeftOut, ...] = ()
    """Files that are not written to the output."""
    tokenizer: TokenizerFiles | None = None
    """The output's tokenizer files, if they differ from those of the template model."""
    vocabulary: str = ""
    """A digest of the rows that aligned vocabularies are gathered from."""
    statistics_memory: StatisticsMemory = field(default=StatisticsMemory())
    """The memory that statistics may use in addition to the buffers."""
    tensors_left_out: Mapping[str, str] = field(default_factory=dict)
    """Names of the models' tensors that are not in the output, each with the reason (`tensors: common` or `any`)."""
    beside: Surroundings = field(default=Surroundings())
    """Files that are copied to the output in addition to the weights."""
    adapter: AdapterPlan | None = None
    """The adapter that is written in place of a model; None: a model."""
    stages: tuple[MergePlan, ...] = ()
    """The plans of stages whose results are among its models, each after the stages that it uses itself."""
    gates: Gates | None = None
    """The gates of a mixture of experts, which are computed before its tensors are written; None if there are none."""
    device_reason: str = ""
    """Why the device was chosen."""
    streamed: bool = False
    """Whether tensors are merged in the order of their bytes in the output, as an object store takes them."""

    @property
    def name(self) -> str:
        """The name of a stage; empty for the plan of the output."""
        return self.config.name or ""

    def __repr__(self) -> str:
        return f"<MergePlan\n{self.summary()}>"

    def __str__(self) -> str:
        return self.summary()

    def _repr_html_(self) -> str:
        """Return the overview as HTML, for a notebook."""
        return as_html(self._overview())

    def summary(self) -> str:
        """Return the method, the models, the tensors, the bytes and the memory, one per line."""
        return as_text(self._overview())

    def _overview(self) -> dict[str, str]:
        names = [printable(model.reference, 80) for model in self.models]
        elements = sum(job.n_elements for job in self.jobs if job.dtype in FLOATS)
        dtypes = ", ".join(sorted({part.dtype for job in self.jobs for part in job.parts}))
        return {
            "method": self.method.name,
            "models": f"{len(names)}: {first_few(names)}",
            **({} if self.base is None else {"base": printable(self.base.reference, 80)}),
            "tensors": f"{len(self.jobs)} tensors, {elements:,} parameters, {dtypes}",
            "bytes": f"reads {format_size(self.bytes_to_read())}, writes {format_size(self.layout.nbytes)}",
            "memory": f"at most {format_size(self.budget.total)}, on {self.device}, {self.budget.threads} threads",
            **({"warnings": first_few(self.warnings, "; ")} if self.warnings else {}),
        }

    def backend_of(self, job: Job) -> Backend:
        """Return the backend that computes a job."""
        return backend_of(job, self.method, self.backend)

    @property
    def template(self) -> TensorIndex:
        """The model whose config.json, tokenizer and tensor names the output has: see `template_of`."""
        return template_of(self.models, self.base)

    @property
    def inputs(self) -> tuple[TensorIndex, ...]:
        """All models that are read, bases last; a base that is also a model appears once."""
        bases = [*([] if self.base is None else [self.base]), *self.bases]
        return (*self.models, *(base for base in bases if not any(base is model for model in self.models)))

    @property
    def originals(self) -> tuple[TensorIndex, ...]:
        """The models stored in files: its own and those of its stages, each once."""
        names = {stage.name for stage in self.stages}
        indexes = (index for plan in (*self.stages, self) for index in plan.inputs)
        found = {
            index.reference: index for index in indexes if index.reference.partition("+")[0] not in names
        }
        return tuple(found.values())

    @property
    def stamped(self) -> dict[str, tuple[FileStamp, ...]]:
        """The files of every model and of every store, by its reference."""
        return {index.reference: index.stamps for index in self.inputs} | {
            index.reference: index.stamps for index in self.stores
        }

    @property
    def stores(self) -> tuple[CompanionIndex, ...]:
        """The models' stores of Fisher diagonals and Gram matrices."""
        return (*self.fishers, *self.grams)

    @property
    def random(self) -> bool:
        """Whether the merge may draw random words."""
        return any(
            self.method.draws(tensor_context_of(job), job.parameters)
            for job in _distinct(self.jobs, self.method)
        )

    def steps(self, done: Mapping[int, Sequence[Interval]] | None = None) -> Iterator[Step]:
        """Yield the remaining steps; `done` has the finished elements of each job."""
        if not self.streamed:
            return steps(self.jobs, self.work, self.budget, done or {})
        numbers = range(len(self.layout.shards))
        return (step for number in numbers for step in self.steps_in(number, done or {}))

    def steps_in(self, shard: int, done: Mapping[int, Sequence[Interval]]) -> Iterator[Step]:
        """Yield the steps of the jobs of a shard, in the order in which they are merged."""
        order = self.order_in(shard)
        found = steps([self.jobs[job] for job in order], [self.work[job] for job in order], self.budget, done)
        return rehearsed(found, self.layout) if self.streamed else found

    def order_in(self, shard: int) -> list[int]:
        """Return the ordinals of the jobs of a shard, in the order in which they are merged."""
        return (
            order_in(self.layout, shard)
            if self.streamed
            else sorted({job for job, _ in self.layout.shards[shard].parts})
        )

    def model_rounds(self) -> int:
        """Return the number of rounds of whole-model statistics before the merge."""
        return max(
            (
                sum(statistics[0].extent == Extent.MODEL for statistics in self.rounds_of(job))
                for job in _distinct(self.jobs, self.method)
            ),
            default=0,
        )

    def rounds_reading(self, job: Job, extent: Extent) -> list[list[Statistic[Any]]]:
        """Return the rounds of one extent that need a pass over the files."""
        return [
            statistics
            for statistics in self.rounds_of(job)
            if statistics[0].extent == extent and any(map(self._is_read, statistics))
        ]

    def _is_read(self, statistic: Statistic[Any]) -> bool:
        if statistic not in self._known_reads:  # cached: thousands of tensors ask for the same statistic
            self._known_reads[statistic] = needs_data(statistic, self.jobs)
        return self._known_reads[statistic]

    @cached_property
    def _known_reads(self) -> dict[Statistic[Any], bool]:
        return {}

    def model_passes(self) -> int:
        """Return the number of passes over the files for whole-model statistics before the merge."""
        return max(
            (len(self.rounds_reading(job, Extent.MODEL)) for job in _distinct(self.jobs, self.method)),
            default=0,
        )

    def rounds_of(self, job: Job) -> list[list[Statistic[Any]]]:
        """Return the statistics of each round of a merge job, given placeholder values."""
        if job.kind != "merge":
            return []
        key = (*likeness(job, self.method), job.n_models, job.base is None, bool(job.fishers), job.shape)
        if key not in self._known_rounds:  # cached: thousands of tensors have the same parameters
            self._known_rounds[key] = self.method.rounds(tensor_context_of(job), job.parameters)
        return self._known_rounds[key]

    @cached_property
    def _known_rounds(self) -> dict[tuple[object, ...], list[list[Statistic[Any]]]]:
        return {}

    def bytes_to_read(self) -> int:
        """Return the bytes that all passes read: each input once, and once more per streamed pass.

        A tensor that is merged while its thresholds are counted is read once, unless they lie outside of the sample's
        bracket (one in a million), or too many elements are equal to them.
        """
        total = sum(job.input_bytes + job.fisher_bytes for job in self.jobs)
        if self.streamed:
            total += reads_twice(self.layout, self.jobs)
        for job, how in zip(self.jobs, self.work, strict=True):
            rounds = self.rounds_reading(job, Extent.MODEL)
            if how.reads_twice:
                rounds += self.rounds_reading(job, Extent.TENSOR)
                if job.encoder is not None and job.encoder.needs_peak:  # it is merged twice
                    total += job.input_bytes + job.fisher_bytes
            if job.kind == "factor":
                total += int((passes_over(job, how) - 1) * job.input_bytes)
            for statistics in rounds:
                total += self._bytes_of(job, statistics)
        if self.stages:
            total += sum(
                ref.bytes_before for ref in all_parts([ref for job in self.jobs for ref in job.inputs])
            )
        return total

    def bytes_of_statistics(self, job: Job) -> int:
        """Return the bytes that the statistics of a job read if all of them are streamed."""
        rounds = (self.rounds_reading(job, extent) for extent in (Extent.MODEL, Extent.TENSOR))
        return sum(self._bytes_of(job, statistics) for some in rounds for statistics in some)

    def bytes_of_passes(self) -> int:
        """Return the part of `bytes_to_read` that whole-model statistics read before the first element is written."""
        return sum(
            self._bytes_of(job, statistics)
            for job in self.jobs
            for statistics in self.rounds_reading(job, Extent.MODEL)
        )

    @staticmethod
    def _bytes_of(job: Job, statistics: Sequence[Statistic[Any]]) -> int:
        """Return the bytes of a job that a round of statistics reads."""
        fishers = all(statistic.source is Source.FISHERS for statistic in statistics)
        passes = max(statistic.cost.passes for statistic in statistics)
        return (job.fisher_bytes if fishers else job.input_bytes) * passes

    def identity(self) -> dict[str, str]:
        """Return everything that the output's bytes depend on, by name, each as a short digest or value."""
        layout = hashlib.blake2b(digest_size=16)
        for shard in self.layout.shards:
            # A single file may be called anything, later too.
            layout.update((b"" if self.layout.single_file else shard.name.encode()) + shard.header)
        return {
            "config": _digest(self.config.text),
            "seed": str(self.seed),
            "shard size": layout.hexdigest(),
            **self.method.identity,
            "left out": ", ".join(self.left_out),
            **{
                f"stage {stage.config.name}: {name}": value
                for stage in self.stages
                for name, value in stage.identity().items()
                if name not in ("config", "shard size", "left out")
            },
            **({} if self.tokenizer is None else {"tokenizer": self._tokenizer_digest()}),
            **({} if self.gates is None else self.gates.identity),
            **({"device": self.device.partition(":")[0]} if self._device_counts else {}),
        }

    @property
    def _device_counts(self) -> bool:
        """Whether the last bits may be the device's."""
        return has_bits_of_device(self.method) and not formulas_of(self.backend).on_host

    def _tokenizer_digest(self) -> str:
        assert self.tokenizer is not None
        digest = hashlib.blake2b(self.vocabulary.encode(), digest_size=16)
        for name, data in sorted(self.tokenizer.changed.items()):
            digest.update(repr((name, len(data))).encode() + data)
        return digest.hexdigest()


def _distinct(jobs: Sequence[Job], method: Method) -> list[Job]:
    """Return one merge job for each set of parameters."""
    seen = {likeness(job, method): job for job in jobs if job.kind == "merge"}
    return list(seen.values())


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
