"""Computes tensors of stages as they are read: a worker for each stage, and the statistics that its rules need.

::

    prepare(job)    statistics of the stages that a tensor is made of, deepest first, before its first piece
    read(ref, …)    blocks of the stage's tensor: its inputs are read, its rule applied, rounded to its dtype
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from streammerge.dtypes import itemsize
from streammerge.engine.answers import follow, restored
from streammerge.engine.streaming import Streamer
from streammerge.engine.task import merged_elements
from streammerge.engine.worker import Knowledge, RunSpec, Worker
from streammerge.formats.readers import reads
from streammerge.io.buffer_pool import Bytes
from streammerge.io.reader import Reader
from streammerge.io.scratch import Scratch
from streammerge.output.identity import Identity, identify
from streammerge.output.shards import NoSink
from streammerge.planning.job import Job
from streammerge.planning.plan import MergePlan
from streammerge.planning.stages import StageRef, stage_refs

_DIVIDER = "/"
"""Separates the name of a stage from the number of its job in a journal."""


@reads(StageRef)
def _read_stage(
    reader: Reader, ref: StageRef, start: int, stop: int, target: Bytes, scratch: Scratch
) -> None:
    reader.computes.read(ref, start, stop, target, scratch)


class StageRuns:
    """The stages of a plan, each with a worker that is made when it is first needed.

    Parameters
    ----------
    plan
        What is written.
    reader
        Reads the inputs of all stages; afterwards it refers to this object.
    tolerant
        Whether non-finite values pass from one stage to the next, as they do into an output.
    """

    def __init__(self, plan: MergePlan, reader: Reader, *, tolerant: bool = False) -> None:
        self._plans = {stage.name: stage for stage in plan.stages}
        self._reader, self._tolerant = reader, tolerant
        self._driver: Worker | None = None
        self._note: Callable[[Mapping[str, Any]], None] = lambda values: None
        self._on_wait: Callable[[], None] = lambda: None
        self._known_before: Mapping[str, list[list[object]]] = {}
        self._workers: dict[str, Worker] = {}
        self._identities: dict[str, Identity] = {}
        self._lock = threading.Lock()
        self._passes = threading.RLock()
        """Held while the statistics of a stage, and of the stages it is made of, are streamed: one stage at a time."""
        self._whole: set[str] = set()
        """Stages whose statistics of the whole model are known."""
        self._uses = Counter(
            (ref.stage, ref.job.ordinal) for job in plan.jobs for ref in stage_refs(job.inputs)
        )
        reader.computes = self

    def join(
        self,
        driver: Worker,
        note: Callable[[Mapping[str, Any]], None],
        on_wait: Callable[[], None],
        known: Mapping[str, list[list[object]]],
    ) -> None:
        """Share the threads and the buffers of the worker that merges the output.

        Parameters
        ----------
        note
            Records values of statistics, by stage and job, as JSON holds them.
        on_wait
            Called four times a second while statistics are streamed; an exception that it raises ends the pass.
        known
            The values that an earlier run has recorded.
        """
        self._driver, self._note, self._on_wait, self._known_before = driver, note, on_wait, known
        for worker in self._workers.values():
            worker.share(driver)

    @property
    def identities(self) -> dict[str, Identity]:
        """The identity of each stage, for workers elsewhere: computing it may read whole stages."""
        return {name: self.worker(name).spec.identity for name in self._plans}

    def adopt(self, identities: Mapping[str, Identity]) -> None:
        """Take the identities of stages that a different worker has computed."""
        self._identities.update(identities)

    def close(self) -> None:
        """End the stages' own threads, which exist only if no driver shared its threads with them."""
        for worker in self._workers.values() if self._driver is None else ():
            worker.__exit__()

    def worker(self, name: str) -> Worker:
        """Return the worker of a stage."""
        if (known := self._workers.get(name)) is not None:
            return known
        plan = self._plans[name]
        identity = self._identities.get(name) or identify(plan, self._reader)
        spec = RunSpec(plan, None, identity, self._tolerant)
        with self._lock:
            if name not in self._workers:
                worker = _StageWorker(spec, self._reader, NoSink())
                if self._driver is not None:
                    worker.share(self._driver)
                self._workers[name] = worker
            return self._workers[name]

    # --- statistics

    def prepare(self, job: Job) -> None:
        """Compute the statistics of all stages that a job's tensor is made of; known ones cost nothing.

        It waits for passes over files, so the caller must hold no buffer.
        """
        for ref in stage_refs(job.inputs):
            self._know(ref)

    def _know(self, ref: StageRef) -> None:
        if not ref.has_statistics:
            return
        worker = self.worker(ref.stage)
        if not isinstance(follow(worker, ref.job), list):
            return
        with self._passes:
            self._restore(worker, ref)
            if isinstance(follow(worker, ref.job), list):
                streamer = Streamer(worker, [self._noted(ref.stage)], self._on_wait)
                if ref.stage not in self._whole:
                    streamer.model_rounds()
                    self._whole.add(ref.stage)
                streamer.answer(ref.job, worker.outputs)

    def _restore(self, worker: Worker, ref: StageRef) -> None:
        """Take the values that an earlier run recorded for a job; whole-model values are computed again."""
        if ref.job.ordinal in worker.answers or worker.plan.model_rounds():
            return
        before = self._known_before.get(f"{ref.stage}{_DIVIDER}{ref.job.ordinal}", [])
        if rounds := restored(worker, ref.job, before):
            worker.answers[ref.job.ordinal] = rounds

    def _noted(self, stage: str) -> Callable[[Mapping[str, Any]], None]:
        def note(values: Mapping[str, Any]) -> None:
            self._note({f"{stage}{_DIVIDER}{job}": rounds for job, rounds in values.items()})

        return note

    def known(self, jobs: Iterable[Job]) -> Knowledge:
        """Return the values of statistics that the stages of some jobs have."""
        refs = (ref for job in jobs for ref in stage_refs(job.inputs) if ref.has_statistics)
        return {
            (ref.stage, ref.job.ordinal): list(self.worker(ref.stage).answers.get(ref.job.ordinal, []))
            for ref in refs
        }

    def learn(self, answers: Knowledge) -> None:
        """Take values of statistics from other workers."""
        for (stage, job), rounds in answers.items():
            if stage in self._plans:
                self.worker(stage).answers[job] = rounds

    def forget(self, job: Job) -> None:
        """Drop the statistics of stages that no job other than this finished one uses."""
        for ref in stage_refs(job.inputs):
            key = ref.stage, ref.job.ordinal
            with self._lock:
                self._uses[key] -= 1
                unused = not self._uses[key]
            rounds = self._plans[ref.stage].model_rounds()
            if unused and ref.has_statistics and not rounds and ref.stage in self._workers:
                self._workers[ref.stage].answers.pop(ref.job.ordinal, None)

    # --- elements

    def read(self, ref: StageRef, start: int, stop: int, target: Bytes, scratch: Scratch) -> None:
        """Compute elements `start` to `stop` of a stage's tensor.

        Raises
        ------
        ModelError
            If a value is not finite; WorldError if reading an input fails.
        """
        self._know(ref)
        worker, width = self.worker(ref.stage), itemsize(ref.dtype)
        buffer = scratch.pages(ref.lease_bytes)
        for first in range(start // ref.row * ref.row, stop, ref.block):
            last = min(first + ref.block, ref.n_elements, -(-stop // ref.row) * ref.row)
            data = merged_elements(worker, ref.job, first, last, buffer)
            begin, end = max(start, first), min(stop, last)
            target[(begin - start) * width : (end - start) * width] = data[
                (begin - first) * width : (end - first) * width
            ]


class _StageWorker(Worker):
    """The worker of a stage."""

    is_stage = True
