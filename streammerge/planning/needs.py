"""The needs of a job: what its merge sees, asks for and reads."""

from __future__ import annotations

from collections.abc import Sequence

from streammerge.algebra.extent import Extent
from streammerge.formats.zarr_store import ChunkedRef
from streammerge.methods.registry import Method
from streammerge.methods.tensor_context import TensorContext
from streammerge.planning.job import Job
from streammerge.planning.memory.allocate import Needs, asked_together
from streammerge.statistics.kinds import AbsSum, FisherSquares, Gram, LowWords, Mixing, Squares, Statistic


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


def needs_of(job: Job, method: Method, jobs: Sequence[Job]) -> Needs:
    """Return the needs of one job."""
    if job.kind != "merge":
        return Needs(Extent.ELEMENT, holds=False, sums=False, extent=Extent.ELEMENT)
    context = tensor_context_of(job)
    rounds = method.rounds(context, job.parameters)
    own = [r for statistics in rounds for r in statistics if r.extent == Extent.TENSOR]
    holds = any(needs_data(statistic, jobs) for statistic in own)
    sums = any(isinstance(statistic, AbsSum | Squares | Gram) for statistic in own)
    extent = method.sees(context, job.parameters)
    return Needs(method.access_with(context, job.parameters), holds, sums, extent, *asked_together(rounds))
