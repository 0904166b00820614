"""Execute a plan: check, resume, run and commit a merge into a directory."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from streammerge.engine.executors.base import Executor, make_executor
from streammerge.engine.first_use import compile_first
from streammerge.engine.opening import open_reader
from streammerge.engine.profile import profile_values, write_profile
from streammerge.engine.scheduler import Scheduler, Tick
from streammerge.engine.telling import Density, differing, named_densities, not_finite_lines, of_floor
from streammerge.engine.worker import RunSpec, Worker
from streammerge.errors import Stopped, WorldError, printable
from streammerge.events import Control, Event
from streammerge.io.allocate import check_space
from streammerge.io.buffer_pool import Bytes
from streammerge.io.reader import IoMode, Reader
from streammerge.numerics.crc32 import crc32
from streammerge.output.commit import commit
from streammerge.output.directory import (
    check_contents,
    check_target,
    clear,
    locked,
    withdraw,
)
from streammerge.output.finished import Finished, find_finished
from streammerge.output.identity import Identity, identify
from streammerge.output.inputs import (
    ContentHasher,
    InputFile,
    beside,
    confirm,
    find_inputs,
    recognize,
)
from streammerge.output.journal import Journal, Known, Progress, Receipt
from streammerge.output.place import Place, place_of
from streammerge.output.shards import ShardWriter
from streammerge.planning.description import describe
from streammerge.planning.job import Job
from streammerge.planning.layout import folder_of
from streammerge.planning.plan import MergePlan

_UNRESERVED = "cannot reserve space on this file system: if it fills up, the merge stops; free space and run the same command again"
NonFinite = Literal["error", "warn"]
_CHECK_STEP = 1 << 20


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
    compile_seconds: float = 0.0
    """Seconds spent compiling kernels, once on a machine; not part of `seconds`."""


@dataclass(frozen=True)
class Options:
    """Options of a run; none of them changes the output's bytes."""

    overwrite: bool = False
    io: IoMode = "direct"
    profile: Path | None = None
    """The file to write the profile to, also when the run fails or is stopped; see `streammerge.engine.profile`."""
    nonfinite: NonFinite = "error"
    """Non-finite values are refused, or written and reported."""
    executor: str = "threads"
    """The name of the executor; see `streammerge.engine.executors`."""
    hash_inputs: bool = False
    """Whether to hash every input file first, so that it is recognised whatever its date. The manifest has the hashes."""


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
    control.emit(Event("plan", {**describe(plan), "out": str(out)}))
    for line in plan.warnings:
        control.warn(line)
    compiling = compile_first(plan, control)
    began = time.monotonic()
    reader = open_reader(plan, options.io, tolerant=options.nonfinite == "warn")
    try:
        identity = identify(plan, reader)
        if not out.exists():
            check_space(out, plan.layout.sizes, place.paths)
        with locked(place):
            check_contents(place)
            hasher = _make_hasher(plan, control)
            if not options.overwrite and (
                finished := find_finished(
                    place, plan, identity, hasher if options.hash_inputs else None, control
                )
            ):
                return replace(_complete(out, plan, finished), compile_seconds=compiling)
            before(plan, control)
            session = _Session(plan, place, reader, identity, options, executor, control, hasher)
            summary = session.run(card(plan), began)
            return replace(summary, compile_seconds=compiling)
    finally:
        reader.close()


def _make_hasher(plan: MergePlan, control: Control) -> ContentHasher:
    """Return the hasher of a run's input files, which reports progress and stops with the run."""

    def on_tick(nbytes: int) -> None:
        control.emit(Event("hash", {"bytes_read": nbytes}))

    return ContentHasher(plan.budget.workers, control.check, on_tick)


def _complete(out: Path, plan: MergePlan, finished: Finished) -> Summary:
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
    )


class _Session:
    """The state of one locked run."""

    def __init__(
        self,
        plan: MergePlan,
        place: Place,
        reader: Reader,
        identity: Identity,
        options: Options,
        executor: Executor,
        control: Control,
        hasher: ContentHasher,
    ) -> None:
        self._hasher, self._hash_inputs = hasher, options.hash_inputs
        self._plan, self._place, self._reader = plan, place, reader
        self._identity = identity
        self._control = control
        self._writer = ShardWriter(place, plan.layout, direct=options.io == "direct")
        known = {} if reader.computes is None else reader.computes.identities
        spec = RunSpec(plan, place.out, identity, options.nonfinite == "warn", options.io, known)
        self._worker = Worker(spec, reader, self._writer, control.stop)
        self._executor = executor
        self._overwrite = options.overwrite
        self._profile = options.profile
        self._running = 0.0
        self._elements = sum(job.n_elements for job in plan.jobs)

    def run(self, card: str, began: float) -> Summary:
        files = find_inputs(self._plan, self._plan.beside.files)
        journal = Journal(self._place, self._identity.named)
        stages = self._worker.stages
        try:
            progress = self._continue(journal, files)
            shards = [shard.name for shard in self._plan.layout.shards if folder_of(shard.name)]
            if shards:
                journal.announce(shards)  # so that a later merge that starts over can remove them
            self._writer.open()
            if self._writer.unreserved:
                self._control.warn(f"{printable(self._place.out)}: {_UNRESERVED}")
            sound = self._believe(progress.receipts)
            resumed = sum(_receipt_bytes(self._plan, receipt) for receipt in sound)
            self._control.emit(Event("resume" if resumed else "start", {"bytes_done": resumed}))
            scheduler = Scheduler(self._worker, journal, self._on_tick, self._executor)
            started = time.monotonic()
            stages.add("start", started - began, time.process_time())
            try:
                scheduler.run(sound, progress.answers)
            finally:
                self._running = time.monotonic() - started
                if (signum := self._control.signal()) is not None:
                    raise Stopped(signum) from None
            for file in files:
                confirm(file, progress.files[file.key], self._hasher)
            for line in (
                *differing(self._plan, scheduler.receipts),
                *not_finite_lines(self._plan, self._reader, scheduler.receipts, self._output),
            ):
                self._control.warn(line)
            self._control.emit(Event("commit"))
            with stages.time("commit"):
                contents = {key: known.content for key, known in progress.files.items()}
                hashes = {file.name: contents[file.key] for file in files if self._is_sidecar(file)}
                journal.announce(hashes)
                manifest = commit(
                    self._plan,
                    self._place,
                    self._writer,
                    scheduler.receipts,
                    self._identity,
                    card,
                    hashes,
                    contents,
                )
                journal.remove()
        finally:
            journal.close()
            self._writer.close()
            if self._profile is not None:
                write_profile(self._profile, self._profile_values(time.monotonic() - began))
        for line in of_floor(manifest.get("floored")):
            self._control.warn(line)
        return self._summary(manifest, resumed, began)

    def _continue(self, journal: Journal, files: Sequence[InputFile]) -> Progress:
        """Return the records of an earlier run; without any, or with --overwrite, start over.

        Input files are recognised by stamp or content; files that need a hash and have none are hashed.
        """
        journal.claim()
        progress = None if self._overwrite else journal.read()
        known = {file.key: Known(file.stamp) for file in files}
        if progress is not None:
            what = f"{printable(self._place.out)}: holds an unfinished merge"
            known = recognize(files, progress.files, self._hasher, what)
        hashed = self._hasher.hash(
            [
                file
                for file in files
                if not known[file.key].content and (self._hash_inputs or self._is_sidecar(file))
            ]
        )
        known |= {key: Known(known[key].stamp, content) for key, content in hashed.items()}
        if progress is None:
            announced = journal.announced()
            journal.start_over()
            clear(self._place, announced)
        else:
            withdraw(self._place)
        journal.open(known)
        return replace(progress or Progress({}), files=known)

    def _is_sidecar(self, file: InputFile) -> bool:
        return file.group == beside(self._plan)

    def _believe(self, receipts: Sequence[Receipt]) -> list[Receipt]:
        """Return the receipts whose bytes have the recorded checksum; others are computed again."""
        slots = self._plan.layout.slots
        plausible = [
            r
            for r in receipts
            if r.job < len(slots)
            and len(r.crcs) == len(slots[r.job])
            and not any(slot.shard in self._writer.fresh for slot in slots[r.job])
            and _is_cut(self._plan.jobs[r.job], r.start, r.stop)
            and (self._worker.tolerant or not r.not_finite or self._plan.jobs[r.job].is_copied)
        ]
        with ThreadPoolExecutor(self._plan.budget.workers) as threads:
            sound = list(threads.map(self._is_sound, plausible))
        return [receipt for receipt, fine in zip(plausible, sound, strict=True) if fine]

    def _is_sound(self, receipt: Receipt) -> bool:
        spans = self._plan.jobs[receipt.job].spans(receipt.start, receipt.stop)
        slots = self._plan.layout.slots[receipt.job]
        return all(
            self._has(slot.shard, slot.offset + first, slot.offset + last, crc)
            for slot, (first, last), crc in zip(slots, spans, receipt.crcs, strict=True)
        )

    def _has(self, shard: int, position: int, end: int, crc: int) -> bool:
        """Return whether the bytes of a shard from `position` to `end` have a checksum."""
        value = 0
        while position < end and not self._control.stop.is_set():
            try:
                data = self._writer.read(shard, position, min(_CHECK_STEP, end - position))
            except WorldError:
                return False  # It is computed again; if the disk is faulty, writing fails with a clear error.
            value = crc32(data, value)
            position += len(data)
            if not data:
                return False
        return value == crc

    def _on_tick(self, tick: Tick) -> None:
        self._control.emit(
            Event(
                "progress",
                {
                    "bytes_read": tick.bytes_read,
                    "bytes_written": tick.bytes_written,
                    "tensors": tick.tensors_done,
                    "tensors_total": len(self._plan.jobs),
                    "elements": tick.elements_done,
                    "elements_total": self._elements,
                },
            )
        )

    def _output(self, job: int, first: int, last: int) -> Bytes:
        slot = self._plan.layout.slots[job][0]
        return np.frombuffer(self._writer.read(slot.shard, slot.offset + first, last - first), np.uint8)

    def _profile_values(self, seconds: float) -> dict[str, Any]:
        budget = self._plan.budget
        return profile_values(
            self._worker.stages,
            seconds=seconds,
            running=self._running,
            workers=budget.workers,
            threads=budget.threads,
            read=self._reader.bytes_read,
            written=self._writer.bytes_written,
        )

    def _summary(self, manifest: Mapping[str, Any], resumed: int, began: float) -> Summary:
        return Summary(
            str(self._place.out),
            False,
            len(self._plan.jobs),
            len(self._plan.layout.shards),
            self._reader.bytes_read,
            self._writer.bytes_written,
            resumed,
            time.monotonic() - began,
            named_densities(self._plan, manifest["densities"]),
            self._plan.warnings,
            manifest.get("floored"),
        )


def _is_cut(job: Job, start: int, stop: int) -> bool:
    """Return whether a piece of a job may reach from `start` to `stop`."""
    ends = stop % job.unit == 0 or stop == job.n_elements
    return 0 <= start <= stop <= job.n_elements and start % job.unit == 0 and ends


def _receipt_bytes(plan: MergePlan, receipt: Receipt) -> int:
    spans = plan.jobs[receipt.job].spans(receipt.start, receipt.stop)
    return sum(last - first for first, last in spans)
