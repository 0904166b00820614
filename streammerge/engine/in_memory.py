"""Run a merge whose output stays in memory, without shards, journal or anything on the disk."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from streammerge.engine.nonfinite import trace
from streammerge.engine.scheduler import Scheduler, Tick, Unrecorded
from streammerge.engine.telling import differing, named_densities, of_floor
from streammerge.engine.worker import RunSpec, Worker
from streammerge.errors import printable
from streammerge.events import Control, Event
from streammerge.io.buffer_pool import Bytes
from streammerge.io.reader import Reader
from streammerge.io.stamp import check_unchanged
from streammerge.output.commit import cover, densities, floored
from streammerge.output.identity import identify
from streammerge.output.journal import Progress, Receipt
from streammerge.planning.description import describe
from streammerge.planning.layout import Places
from streammerge.planning.plan import MergePlan
from streammerge.tensors.encoders.base import Stored
from streammerge.tensors.held import torch_dtype

if TYPE_CHECKING:
    import torch

Take = Callable[[str, "torch.Tensor"], None]
"""Receives each tensor once it is complete, from any thread."""


class TensorSink:
    """Collects merged bytes in tensors, and hands over each tensor once it is complete.

    Parameters
    ----------
    plan
        The plan; its layout determines the tensor of each byte.
    take
        Receives the tensors; it may block to slow down the merge.
    """

    def __init__(self, plan: MergePlan, take: Take) -> None:
        self._plan, self._take = plan, take
        self._lock = threading.Lock()
        self._parts = {(job.ordinal, i): part for job in plan.jobs for i, part in enumerate(job.parts)}
        self._open: dict[tuple[int, int], tuple[torch.Tensor, Bytes]] = {}
        self._left = {key: part.nbytes for key, part in self._parts.items()}
        self._places = Places(plan.layout)
        self.bytes_written = 0

    def write(self, shard: int, offset: int, data: Bytes) -> None:
        """See `Sink`."""
        if not data.size:
            return  # tensors without elements are `hand_over_empty`'s
        begins, key = self._places.find(shard, offset)
        with self._lock:
            if key not in self._open:
                self._open[key] = self._make(self._parts[key])
            tensor, target = self._open[key]
        target[offset - begins : offset - begins + data.size] = data
        with self._lock:
            self.bytes_written += data.size
            self._left[key] -= data.size
            complete = not self._left[key]
            if complete:
                del self._open[key]
        if complete:
            self._take(self._parts[key].name, tensor)

    def hand_over_empty(self) -> None:
        """Hand over the tensors that have no elements."""
        for part in self._parts.values():
            if not part.nbytes:
                self._take(part.name, self._make(part)[0])

    @staticmethod
    def _make(part: Stored) -> tuple[torch.Tensor, Bytes]:
        import torch

        tensor = torch.empty(part.shape, dtype=torch_dtype(part.dtype))
        return tensor, tensor.reshape(-1).view(torch.uint8).numpy()

    def early(self) -> TensorSink:
        """See `Sink`: bytes are taken in any order."""
        return self

    def sync(self, shards: set[int]) -> None:
        """See `Sink`; nothing needs to be durable."""


def merge_in_memory(
    plan: MergePlan,
    reader: Reader,
    take: Take,
    *,
    tolerant: bool,
    control: Control,
) -> None:
    """Run a plan and hand over every merged tensor, in the order in which they are finished.

    Parameters
    ----------
    tolerant
        Whether non-finite values are written and reported; otherwise they are refused.

    Raises
    ------
    StreammergeError
        See `streammerge.errors`.
    """
    control.emit(Event("plan", {**describe(plan), "out": "memory"}))
    for line in plan.warnings:
        control.warn(line)
    sink = TensorSink(plan, take)
    spec = RunSpec(plan, None, identify(plan, reader), tolerant)
    worker = Worker(spec, reader, sink, control.stop)
    elements = sum(job.n_elements for job in plan.jobs)

    def on_tick(tick: Tick) -> None:
        control.emit(
            Event(
                "progress",
                {
                    "bytes_read": tick.bytes_read,
                    "bytes_written": tick.bytes_written,
                    "tensors": tick.tensors_done,
                    "tensors_total": len(plan.jobs),
                    "elements": tick.elements_done,
                    "elements_total": elements,
                },
            )
        )

    control.emit(Event("start", {"bytes_done": 0}))
    sink.hand_over_empty()
    scheduler = Scheduler(worker, [Unrecorded()], on_tick)
    scheduler.run([Progress({})])
    for stamp in (stamp for stamps in plan.stamped.values() for stamp in stamps):
        check_unchanged(stamp)
    chosen = cover(plan, scheduler.receipts)
    for line in (
        *differing(plan, scheduler.receipts),
        *_not_finite_lines(plan, reader, scheduler.receipts),
        *of_floor(floored(plan, chosen) if plan.fishers else None),
    ):
        control.warn(line)
    control.emit(
        Event(
            "done",
            {
                "tensors": len(plan.jobs),
                "bytes_read": reader.bytes_read,
                "bytes_written": sink.bytes_written,
                "densities": named_densities(plan, densities(plan, chosen)),
            },
        )
    )


def _not_finite_lines(plan: MergePlan, reader: Reader, receipts: Sequence[Receipt]) -> list[str]:
    """Return a line on the origin of NaN and infinity in each tensor; the output may already be freed."""
    counts: dict[int, int] = {}
    for receipt in receipts:
        counts[receipt.job] = counts.get(receipt.job, 0) + receipt.not_finite
    lines: list[str] = []
    for ordinal, count in sorted(counts.items()):
        job = plan.jobs[ordinal]
        if count:
            of_inputs = trace(reader, job, 0, job.n_elements, None).warnings()
            overflow = f"tensor {printable(job.name)}: {count} merged elements overflow {job.dtype}"
            lines += of_inputs or [overflow]
    return lines
