"""The needs of a job: the extent of its arithmetic, its statistics, and its reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from streammerge.algebra.extent import Extent
from streammerge.checkpoint.tensor_kinds import kind_of
from streammerge.methods.registry import Method
from streammerge.methods.tensor_context import TensorContext
from streammerge.planning.job import Job, measured
from streammerge.planning.memory.allocate import Needs, asked_together
from streammerge.planning.settling import edges_of
from streammerge.statistics.base import Statistic


def tensor_context_of(job: Job) -> TensorContext:
    """Return the `TensorContext` of a merge job."""
    layer, n_layers = layer_of(job.name, job.stacks)
    return TensorContext(
        job.n_models,
        job.ordinal,
        job.name,
        job.shape,
        kind_of(job.name),
        layer,
        n_layers,
        has_base=job.base is not None,
        fisher=bool(job.fishers),
        gram=bool(job.grams),
        matrix=job.matrix,
        deltas=deltas_of(job),
    )


def deltas_of(job: Job) -> tuple[bool, ...]:
    """Return for each model of a job whether it is read as a difference from the base; empty if none is."""
    deltas = tuple(ref.is_delta for ref in job.sources)
    return deltas if any(deltas) else ()


def layer_of(name: str, stacks: Mapping[str, int]) -> tuple[int, int] | tuple[None, None]:
    """Return the index of a tensor's layer and the number of layers in its stack.

    >>> layer_of("model.layers.3.mlp.up_proj.weight", {"model.layers": 8}), layer_of("lm_head.weight", {})
    ((3, 8), (None, None))
    """
    for prefix, n_layers in stacks.items():
        if name.startswith(f"{prefix}."):
            number = name[len(prefix) + 1 :].partition(".")[0]
            if number.isdigit() and int(number) < n_layers:
                return int(number), n_layers
    return None, None


def likeness(job: Job, method: Method) -> tuple[object, ...]:
    """Return a key that jobs with equal needs share: usually their kind and parameters."""
    own = (job.ordinal,) if method.looks_at_names else ()
    return (job.kind, bool(job.grams), job.matrix, deltas_of(job), *job.parameters.items(), *own)


def needs_data(statistic: Statistic[Any], jobs: Sequence[Job]) -> bool:
    """Return whether a statistic needs a pass over the inputs: not if it needs no data, or only recorded numbers."""
    return any(statistic.reads(measured(job)) for job in jobs if job.kind == "merge")


def needs_of(job: Job, method: Method, jobs: Sequence[Job]) -> Needs:
    """Return the needs of one job."""
    if job.kind != "merge":
        return Needs(Extent.ELEMENT, holds=False, sums=False, extent=Extent.ELEMENT)
    context = tensor_context_of(job)
    rounds = method.rounds(context, job.parameters)
    own = [r for statistics in rounds for r in statistics if r.extent == Extent.TENSOR]
    holds = any(needs_data(statistic, jobs) for statistic in own)
    sums = any(statistic.cost.partials for statistic in own)
    extent = method.sees(context, job.parameters)
    return Needs(
        method.access_with(context, job.parameters),
        holds,
        sums,
        extent,
        *asked_together(rounds),
        settles=holds and edges_of(method, context, job.parameters) is not None,
    )
