"""Stages: merges whose results later ones take as models, computed as they are read, and never written.

A stage is a plan. Its tensors are `StageRef`, and an index of these is a model like any other::

    config    document 1 (name: a)        document 2: models a, m3
    plans     MergePlan of a  ──> index of StageRef ──> MergePlan of the output
    reading   a piece of the output's tensor: pieces of a's inputs, a's rule, rounded to a's dtype
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from streammerge.algebra.extent import Extent
from streammerge.checkpoint.index import CONFIG_NAME, TensorIndex
from streammerge.dtypes import itemsize
from streammerge.errors import BudgetError, ConfigError, printable
from streammerge.formats.parts import all_parts
from streammerge.formats.refs import MadeRef, SourceRef, TensorRef, middle_of
from streammerge.planning.job import Job
from streammerge.planning.needed_kernels import needed_kernels
from streammerge.planning.needs import needs_data
from streammerge.planning.plan import MergePlan
from streammerge.records import dataclass
from streammerge.units import format_size

_BLOCK = 1 << 18
"""Least number of elements of a stage computed at a time, if its rule can be cut there."""


@dataclass(frozen=True)
class StageResult:
    """A stage, and its result as later stages see it."""

    plan: MergePlan
    index: TensorIndex
    """Its tensors, as a model."""

    @property
    def name(self) -> str:
        """The name that stands for it in a config."""
        return self.plan.name


@dataclass(frozen=True, eq=False, slots=True)
class StageRef(MadeRef):
    """A tensor of a stage's result."""

    stage: str
    job: Job
    row: int
    """It is computed in multiples of this number of elements."""
    block: int
    """Elements computed at a time; a multiple of `row`."""
    lease_bytes: int
    """Bytes of the buffer in which a block is computed."""
    own_kernels: frozenset[str]
    """Groups of compiled kernels that the stage uses."""
    has_statistics: bool
    """Whether its rule depends on statistics that are read from its inputs."""
    statistics_bytes: int
    """Bytes that these statistics read."""
    is_all: bool
    """Whether its rule must see the whole tensor."""

    @property
    def name(self) -> str:
        """Its name in the stage's result."""
        return self.job.name

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape there."""
        return self.job.shape

    @property
    def dtype(self) -> str:
        """The dtype that the stage's result has."""
        return self.job.dtype

    @property
    def path(self) -> str:
        """For messages: the stage, in place of a file."""
        return f"stage {self.stage}"

    @property
    def source(self) -> SourceRef:
        """The first tensor that it is merged from."""
        return self.job.sources[0]

    @property
    def stored_dtype(self) -> str:
        """See `SourceRef`: the dtype that its file would have."""
        return self.job.dtype

    @property
    def parts(self) -> tuple[SourceRef, ...]:
        """See `SourceRef`."""
        return self.job.inputs

    @property
    def kernels(self) -> frozenset[str]:
        """See `SourceRef`."""
        return self.own_kernels

    @property
    def scratch_bytes(self) -> int:
        """See `Ref`: the buffer of a block, aligned to a page."""
        return self.lease_bytes + (1 << 13)

    @property
    def sample(self) -> tuple[int, int]:
        """See `SourceRef`: the sample of the stage as if it were written, so that random masks are the same."""
        offset, size = middle_of(self.nbytes)
        return offset // itemsize(self.dtype), (offset + size) // itemsize(self.dtype)

    @property
    def stages(self) -> frozenset[str]:
        """See `SourceRef`."""
        return frozenset({self.stage}).union(*(part.stages for part in self.parts))

    @property
    def bytes_before(self) -> int:
        """See `SourceRef`."""
        return self.statistics_bytes

    @property
    def asks(self) -> bool:
        """See `SourceRef`."""
        return self.has_statistics or any(part.asks for part in self.parts)

    @property
    def is_whole(self) -> bool:
        """See `SourceRef`."""
        return self.is_all or any(part.is_whole for part in self.parts)

    @property
    def stored_format(self) -> None:
        """See `SourceRef`: a result is computed in floats, whatever its inputs are stored as."""
        return

    @property
    def file_bytes(self) -> int:
        """See `SourceRef`: the bytes of all its inputs."""
        return self.job.input_bytes + self.job.fisher_bytes

    def extents(self, start: int, stop: int) -> Iterator[tuple[TensorRef, int, int]]:
        """See `SourceRef`: the same elements of all its inputs; a rule may read more around them."""
        for ref in self.job.inputs:
            yield from ref.extents(start, stop)


def stage_index(plan: MergePlan, directory: Path) -> TensorIndex:
    """Return the result of a stage as a model, its tensors in the order that its files would have.

    Parameters
    ----------
    directory
        Where its config.json, its tokenizer and what else accompanies the weights lie.

    Raises
    ------
    ConfigError
        If the stage's result is to be quantised.
    """
    if plan.config.quantize != "none":
        raise ConfigError(
            f"{plan.config.where}: quantize: a stage is not stored: quantise the output, or write the stage with --keep-stages"
        )
    kernels = needed_kernels(plan)
    tensors = {
        job.name: _ref(plan, job, kernels)
        for shard in plan.layout.shards
        for job in (plan.jobs[ordinal] for ordinal, _ in shard.parts)
    }
    stamps = {stamp.path: stamp for stamps in plan.stamped.values() for stamp in stamps}
    return TensorIndex(
        plan.name,
        directory,
        tuple(stamps[path] for path in sorted(stamps)),
        tensors,
        config=plan.settings.get(plan.template.settings_file, {}),
        components=tuple(
            replace(part, config=plan.settings.get(f"{part.folder}/{CONFIG_NAME}", part.config))
            for part in plan.template.components
        ),
        settings_file=plan.template.settings_file,
    )


def _ref(plan: MergePlan, job: Job, kernels: frozenset[str]) -> SourceRef:
    """Return a reference to a tensor of a stage; for a tensor copied as it is, the original reference, renamed."""
    if job.is_copied:
        return job.sources[0].renamed(job.name)
    work = plan.work[job.ordinal]
    whole = work.extent == Extent.TENSOR
    row = max(1, job.n_elements) if whole else work.row
    block = min(-(-_BLOCK // row) * row, max(row, -(-job.n_elements // row) * row))
    asked = [statistic for statistics in plan.rounds_of(job) for statistic in statistics]
    return StageRef(
        plan.name,
        job,
        row,
        block,
        work.lease_bytes(min(block, job.n_elements)),
        kernels,
        any(needs_data(statistic, [job]) for statistic in asked),
        plan.bytes_of_statistics(job),
        whole,
    )


def stage_refs(refs: Sequence[SourceRef]) -> Iterator[StageRef]:
    """Yield the tensors of stages that some tensors are made of, each once, after the tensors it is made of itself."""
    return (ref for ref in all_parts(refs) if isinstance(ref, StageRef))


def check_reads(plan: MergePlan, most: float) -> None:
    """Refuse a plan whose stages read their inputs too often.

    Parameters
    ----------
    most
        Bytes that may be read for each byte of the inputs.

    Raises
    ------
    BudgetError
        If they do; the message has both numbers, and names the stage whose writing saves most.
    """
    once = bytes_once(plan)
    times = plan.bytes_to_read() / max(1, once)
    if not plan.stages or plan.adapter is not None or times <= most:
        return
    wanted = Counter[str]()
    for job in plan.jobs:
        for ref in stage_refs(job.inputs):
            wanted[ref.stage] += ref.bytes_before + ref.file_bytes
    worst = max(wanted, key=lambda name: wanted[name])
    raise BudgetError(
        f"the stages read their inputs {times:.1f} times ({format_size(plan.bytes_to_read())} for {format_size(once)}), "
        f"at most {most:g} is allowed: write them with --keep-stages DIR (most is read for stage {printable(worst, 80)}), "
        f"or allow it with --max-reads {math.ceil(times)}"
    )


def bytes_once(plan: MergePlan) -> int:
    """Return the bytes of all tensors in files that a plan reads, each counted once."""
    refs = all_parts([ref for job in plan.jobs for ref in job.inputs])
    return sum(
        {(ref.stored.path, ref.stored.offset): ref.file_bytes for ref in refs if not ref.parts}.values()
    )


def with_shared(job: Job) -> Job:
    """Return a job that knows which tensors several of its stages read. They are read once, and held for all stages."""
    if not any(isinstance(ref, StageRef) for ref in job.inputs):
        return job
    times = Counter(place_of(ref) for ref in _plain_leaves(job.inputs))
    direct = {place_of(ref) for ref in job.inputs if ref.plain is not None}
    shared = {
        place_of(ref): ref
        for ref in _plain_leaves(job.inputs)
        if times[place_of(ref)] > 1 and place_of(ref) not in direct and ref.n_elements == job.n_elements
    }
    return replace(job, shared=tuple(shared.values()))


def place_of(ref: SourceRef) -> tuple[str, int, str] | None:
    """Return the place of a tensor's bytes in a file; None if the tensor is computed."""
    plain = ref.plain
    return None if plain is None else (plain.path, plain.offset, plain.dtype)


def _plain_leaves(refs: Sequence[SourceRef]) -> Iterator[SourceRef]:
    """Yield the tensors in files from which some tensors are computed, element by element."""
    for ref in refs:
        if ref.plain is not None:
            yield ref
        elif isinstance(ref, StageRef):
            yield from _plain_leaves(ref.parts)
