"""A plan as plain values, for ``--json``, for events and for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from streammerge.dtypes import FLOATS
from streammerge.planning.job import Job
from streammerge.planning.layout import Slot
from streammerge.planning.low_rank.adapter import AdapterPlan
from streammerge.planning.plan import MergePlan
from streammerge.planning.schedule import Chunk


def describe(plan: MergePlan) -> dict[str, object]:
    """Return the plan as plain values."""
    chunks = streamed = largest = 0
    for step in plan.steps():
        if isinstance(step, Chunk):
            chunks, largest = chunks + 1, max(largest, step.nbytes)
        else:
            streamed += plan.work[step.job].reads_twice
    return {
        "method": plan.method.name,
        "models": [model.reference for model in plan.models],
        "checkpoints": [
            {"model": one.reference, "coefficient": one.coefficient} for one in plan.config.averaged
        ],
        "base_model": plan.base.reference if plan.base is not None else None,
        "quantised": {model.reference: model.stored_formats for model in plan.inputs if model.stored_formats},
        "tensors": len(plan.jobs),
        "tensors_by_kind": dict(Counter(job.kind for job in plan.jobs)),
        "components": {
            folder: dict(Counter(job.kind for job in plan.jobs if job.name.startswith(f"{folder}/")))
            for folder in plan.template.folders
        },
        "tensors_left_out": dict(plan.tensors_left_out),
        "elements": sum(job.n_elements for job in plan.jobs if job.dtype in FLOATS),
        "dtypes": sorted({part.dtype for job in plan.jobs for part in job.parts}),
        "stored_as": dict(Counter(job.encoder.label for job in plan.jobs if job.encoder is not None)),
        "access": sorted({str(access) for access in plan.access}),
        "model_passes": plan.model_passes(),
        "streamed_tensors": streamed,
        "chunks": chunks,
        "largest_chunk_bytes": largest,
        "bytes_to_read": plan.bytes_to_read(),
        "bytes_of_passes": plan.bytes_of_passes(),
        "bytes_to_write": plan.layout.nbytes,
        **({} if plan.adapter is None else {"adapter": _adapter(plan.adapter)}),
        "shards": [
            {"name": plan.layout.beside or shard.name, "nbytes": shard.nbytes, "tensors": len(shard.parts)}
            for shard in plan.layout.shards
        ],
        "memory": plan.budget.total,
        "memory_reserve": plan.budget.reserve,
        "threads": plan.budget.threads,
        "device": plan.device,
        "device_reason": plan.device_reason,
        "warnings": list(plan.warnings),
    }


def _adapter(adapter: AdapterPlan) -> dict[str, object]:
    """Return what an adapter will hold."""
    asked = adapter.asked
    rank = (
        {"rank": asked.rank}
        if asked.rank is not None
        else {"energy": asked.energy, "max_rank": asked.max_rank}
    )
    return {**rank, "modules": len(adapter.factored), "modules_whole": len(adapter.saved)}


def tensor_values(plan: MergePlan) -> list[dict[str, object]]:
    """Return the handling and the destination of every tensor, as plain values."""
    return [
        {
            "name": job.name,
            "kind": job.kind,
            "dtype": job.parts[0].dtype,
            "shape": list(job.shape),
            "access": str(plan.access[job.ordinal]),
            "mode": plan.work[job.ordinal].mode,
            "shard": plan.layout.shards[slots[0].shard].name,
            "offset": slots[0].offset,
            "nbytes": sum(slot.nbytes for slot in slots),
            "parameters": dict(job.parameters),
            **({} if job.encoder is None else {"stored": job.encoder.label, "parts": _parts(job, slots)}),
        }
        for job, slots in zip(plan.jobs, plan.layout.slots, strict=True)
    ]


def _parts(job: Job, slots: Sequence[Slot]) -> list[dict[str, object]]:
    """Return the tensors that a job is stored as, and where."""
    return [
        {
            "name": part.name,
            "dtype": part.dtype,
            "shape": list(part.shape),
            "offset": slot.offset,
            "nbytes": slot.nbytes,
        }
        for part, slot in zip(job.parts, slots, strict=True)
    ]
