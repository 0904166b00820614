"""Execute a plan: check, resume, run and commit a merge into a directory."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import field, replace
from pathlib import Path
from typing import Any, NamedTuple

from streammerge.engine.executors.base import Executor, make_executor
from streammerge.engine.factors import check_loose
from streammerge.engine.first_use import compile_first
from streammerge.engine.opening import open_reader
from streammerge.engine.profile import profile_values, write_profile
from streammerge.engine.scheduler import Scheduler, Tick
from streammerge.engine.session import NonFinite, Options, OutputSession, Session
from streammerge.engine.telling import Density, named_densities
from streammerge.engine.worker import Worker
from streammerge.errors import Stopped
from streammerge.events import Control, Event
from streammerge.io.allocate import check_space
from streammerge.io.reader import Reader
from streammerge.output.adapter_cut import Residual, residuals_of
from streammerge.output.commit import cover, kept_by_job
from streammerge.output.directory import check_contents, check_target, locked
from streammerge.output.finished import Finished, find_finished
from streammerge.output.identity import identify
from streammerge.output.inputs import ContentHasher
from streammerge.output.place import place_of
from streammerge.planning.description import describe
from streammerge.planning.plan import MergePlan
from streammerge.records import dataclass

__all__ = ["NonFinite", "Options", "Summary", "execute"]


@dataclass(frozen=True)
class Summary:
    """The result of a merge."""

    out: str
    already_complete: bool
    tensors: int
    shards: int
    bytes_read: int
    bytes_written: int
    bytes_resumed: int
    """Number of output bytes that an earlier run had finished."""
    seconds: float
    densities: tuple[Density, ...]
    """The density of each model whose task vector lost entries."""
    warnings: tuple[str, ...]
    floored: Mapping[str, Any] | None = None
    """Fisher merges only: the number of elements that floors decided, of all elements, and the fraction."""
    edits: Mapping[str, str] = field(default_factory=dict)
    """Edited files, if the merge was already complete."""
    residuals: tuple[Residual, ...] = ()
    """An adapter's modules, each with the part of its change that the factors miss."""
    compile_seconds: float = 0.0
    """Seconds spent compiling kernels, once on a machine; not part of `seconds`."""
    kept: Mapping[int, tuple[int, ...]] = field(default_factory=dict, repr=False)
    """Number of surviving entries of each task vector, by the ordinal of the job; empty if the merge was already complete."""
    profile: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """Where the time went; see `streammerge.engine.profile`. Empty if the merge was already complete."""


class Begun(NamedTuple):
    """The beginning of every merge."""

    reader: Reader
    compiling: float
    """Seconds spent compiling kernels."""
    began: float
    """The time after that, as `time.monotonic` has it."""


def begin(plan: MergePlan, out: Path, options: Options, control: Control) -> Begun:
    """Tell the plan and its warnings, compile the kernels that are missing, and open a reader of the inputs."""
    control.emit(Event("plan", {**describe(plan), "out": str(out)}))
    for line in plan.warnings:
        control.warn(line)
    compiling = compile_first(plan, control)
    began = time.monotonic()
    reader = open_reader(plan, options.io, tolerant=options.nonfinite == "warn")
    reader.stop = control.stop
    return Begun(reader, compiling, began)


def execute(
    plan: MergePlan,
    out: Path,
    options: Options,
    control: Control,
    card: Callable[[MergePlan], str],
    before: Callable[[MergePlan, Control], None] = lambda plan, control: None,
) -> Summary:
    """Merge into `out`, or resume there.

    Parameters
    ----------
    card
        Function that returns the text of README.md.
    before
        Called before the first tensor is read, unless the merge was already complete.

    Raises
    ------
    StreammergeError
        See `streammerge.errors`; finished work stays durable for the next run.
    CannotCompileError
        If the kernels cannot be compiled, before anything is created; plan without them.
    """
    executor = make_executor(options.executor)
    place = place_of(out)
    check_target(place, plan.inputs, [index.reference for index in plan.fishers])
    reader, compiling, began = begin(plan, out, options, control)
    with closing(reader):
        identity = identify(plan, reader)
        check_loose(plan, reader)
        if not out.exists():
            check_space(out, plan.layout.sizes, place.paths)
        with locked(place):
            check_contents(place)
            hasher = make_hasher(plan, control)
            if not options.overwrite and (
                finished := find_finished(
                    place, plan, identity, hasher if options.hash_inputs else None, control
                )
            ):
                return replace(complete(out, plan, finished), compile_seconds=compiling)
            before(plan, control)
            session = Session(plan, place, identity, reader, options, control, hasher)
            outcome = run_sessions([session], reader, executor, options, control, card, began)
            return summary_of(session, reader, outcome, began, compiling)


def make_hasher(plan: MergePlan, control: Control) -> ContentHasher:
    """Return the hasher of a run's input files, which reports progress and stops with the run."""

    def on_tick(nbytes: int) -> None:
        control.emit(Event("hash", {"bytes_read": nbytes}))

    return ContentHasher(plan.budget.workers, control.check, on_tick)


def complete(out: Path, plan: MergePlan, finished: Finished) -> Summary:
    """Return the summary of a merge that was already complete."""
    manifest = finished.manifest
    return Summary(
        str(out),
        True,
        len(plan.jobs),
        len(plan.layout.shards),
        0,
        0,
        plan.layout.nbytes,
        0.0,
        named_densities(plan, manifest.get("densities", [])),
        plan.warnings,
        manifest.get("floored"),
        finished.edits,
        residuals_of(manifest),
    )


@dataclass(frozen=True)
class Outcome:
    """What a run did for each of its outputs."""

    manifests: tuple[Mapping[str, Any], ...]
    resumed: int
    """Number of bytes of all outputs that an earlier run had finished."""
    kept: Mapping[int, tuple[int, ...]]
    """Number of surviving entries of each task vector of the first output, by the ordinal of the job."""
    profile: Mapping[str, Any]


def run_sessions(
    sessions: Sequence[OutputSession],
    reader: Reader,
    executor: Executor,
    options: Options,
    control: Control,
    card: Callable[[MergePlan], str],
    began: float,
) -> Outcome:
    """Merge into the directories of several sessions, reading each input once, and publish the outputs.

    Parameters
    ----------
    sessions
        Sessions whose plans differ only in the parameters of jobs, and divide the memory together; they are closed.
    began
        The time when the run began, for the profile.
    """
    worker, running = sessions[0].worker, 0.0
    worker.lead([session.worker for session in sessions[1:]])
    try:
        before = [session.begin() for session in sessions]
        done = zip(sessions, before, strict=True)
        resumed = sum(session.bytes_of(progress.receipts) for session, progress in done)
        control.emit(Event("resume" if resumed else "start", {"bytes_done": resumed}))
        records = [session.record for session in sessions]
        scheduler = Scheduler(worker, records, _teller(sessions, control), executor, sessions[0].course)
        started = time.monotonic()
        worker.stages.add("start", started - began, time.process_time())
        try:
            scheduler.run(before)
        finally:
            running = time.monotonic() - started
            for line in worker.remarks:
                control.warn(line)
            if (signum := control.signal()) is not None:
                raise Stopped(signum) from None
        for number, session in enumerate(sessions):
            session.check(scheduler.receipts_of(number))
        control.emit(Event("commit"))
        with worker.stages.time("commit"):
            manifests = tuple(
                session.finish(scheduler.receipts_of(number), card(session.plan))
                for number, session in enumerate(sessions)
            )
        every = sessions[0].every(scheduler.receipts_of(0))
        kept = kept_by_job(cover(sessions[0].plan, every)) if every else {}
        profile = _profile_values(worker, running, time.monotonic() - began)
        return Outcome(manifests, resumed, kept, profile)
    finally:
        for session in sessions:
            session.close()
        if options.profile is not None:
            write_profile(options.profile, _profile_values(worker, running, time.monotonic() - began))


def _teller(sessions: Sequence[OutputSession], control: Control) -> Callable[[Tick], None]:
    """Return the function that turns progress into events."""
    jobs = [job for session in sessions for job in session.plan.jobs]
    elements = sum(job.n_elements for job in jobs)

    def tell(tick: Tick) -> None:
        for session in sessions:
            session.look()
        control.emit(
            Event(
                "progress",
                {
                    "bytes_read": tick.bytes_read,
                    "bytes_written": tick.bytes_written,
                    "tensors": tick.tensors_done,
                    "tensors_total": len(jobs),
                    "elements": tick.elements_done + sum(session.elements_elsewhere for session in sessions),
                    "elements_total": elements,
                },
            )
        )

    return tell


def _profile_values(worker: Worker, running: float, seconds: float) -> dict[str, Any]:
    budget = worker.plan.budget
    return profile_values(
        worker.stages,
        seconds=seconds,
        running=running,
        workers=budget.workers,
        threads=budget.threads,
        read=worker.reader.bytes_read,
        written=sum(output.writer.bytes_written for output in worker.outputs),
    )


def summary_of(
    session: OutputSession, reader: Reader, outcome: Outcome, began: float, compiling: float
) -> Summary:
    """Return the summary of a run with one output."""
    plan, manifest = session.plan, outcome.manifests[0]
    return Summary(
        str(session.place.out),
        False,
        len(plan.jobs),
        len(plan.layout.shards),
        reader.bytes_read,
        session.worker.writer.bytes_written,
        outcome.resumed,
        time.monotonic() - began,
        named_densities(plan, manifest["densities"]),
        plan.warnings,
        manifest.get("floored"),
        residuals=residuals_of(manifest),
        compile_seconds=compiling,
        kept=outcome.kept,
        profile=outcome.profile,
    )
