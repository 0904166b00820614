"""Computes the statistics of every tensor of a plan, and writes nothing."""

from __future__ import annotations

import threading
from collections.abc import Mapping

from streammerge.engine.first_use import compile_first
from streammerge.engine.opening import open_reader
from streammerge.engine.streaming import Streamer
from streammerge.engine.worker import Answers, RunSpec, Worker
from streammerge.events import Control, Event
from streammerge.io.stamp import check_unchanged
from streammerge.output.identity import identify
from streammerge.output.shards import NoSink
from streammerge.planning.description import describe
from streammerge.planning.job import Job
from streammerge.planning.plan import MergePlan


def measure(plan: MergePlan, control: Control) -> Mapping[int, Answers]:
    """Return the values of all statistics that a plan's method asks for, round by round, by the ordinal of each job.

    Tensors that fit the budget are read once. The values do not depend on memory or threads.

    Raises
    ------
    ModelError
        If a value is not finite; WorldError if reading fails.
    Stopped
        If the run was stopped.
    CannotCompileError
        If the kernels cannot be compiled here.
    """
    control.emit(Event("plan", {**describe(plan), "bytes_to_write": 0, "bytes_of_passes": 0}))
    for line in plan.warnings:
        control.warn(line)
    compile_first(plan, control)
    control.emit(Event("start", {"bytes_done": 0}))
    reader = open_reader(plan, "direct")
    merged = [job for job in plan.jobs if job.kind == "merge"]
    lock = threading.Lock()
    done = [0, 0]

    def on_job(job: Job) -> None:
        with lock:
            done[0] += 1
            done[1] += job.n_elements

    def tell() -> None:
        control.check()
        values = {
            "bytes_read": reader.bytes_read,
            "bytes_written": 0,
            "tensors": done[0],
            "tensors_total": len(merged),
            "elements": done[1],
            "elements_total": sum(job.n_elements for job in merged),
        }
        control.emit(Event("progress", values))

    try:
        spec = RunSpec(plan, None, identify(plan, reader), measures=True)
        with Worker(spec, reader, NoSink(), control.stop) as worker:
            if reader.computes is not None:
                reader.computes.join(worker, lambda values: None, tell, {})
            Streamer(worker, [lambda values: None], tell).tensor_rounds(merged, worker.outputs, on_job)
            for stamp in (stamp for stamps in plan.stamped.values() for stamp in stamps):
                check_unchanged(stamp)
            return dict(worker.answers)
    finally:
        reader.close()
