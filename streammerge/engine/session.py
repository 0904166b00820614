"""One output of a run: its directory's records when the run begins, and its commit when everything is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from streammerge.checkpoint.weight_names import ADAPTER_CONFIG
from streammerge.engine.course import Alone, Course
from streammerge.engine.nonfinite import labelled
from streammerge.engine.scheduler import Record
from streammerge.engine.taking import Taking
from streammerge.engine.telling import differing, not_finite_lines, of_energy, of_floor
from streammerge.engine.worker import RunSpec, Worker
from streammerge.errors import WorldError, printable
from streammerge.events import Control
from streammerge.io.buffer_pool import Bytes
from streammerge.io.reader import IoMode, Reader
from streammerge.numerics.crc32 import crc32
from streammerge.output.adapter import commit_adapter
from streammerge.output.adapter_cut import EmptyAdapterError, residuals_of
from streammerge.output.commit import commit
from streammerge.output.directory import clear, sweep, withdraw
from streammerge.output.identity import Identity
from streammerge.output.inputs import ContentHasher, InputFile, beside, confirm, find_inputs, recognize
from streammerge.output.joining import discard_runs, left_by_runs
from streammerge.output.journal import Journal, Known, Progress, Receipt
from streammerge.output.left_by_run import left_by_run
from streammerge.output.place import CONFIG_COPY, MANIFEST, Place
from streammerge.output.presence import Presence
from streammerge.output.shards import ShardWriter
from streammerge.planning.job import Job
from streammerge.planning.layout import folder_of
from streammerge.planning.plan import MergePlan
from streammerge.records import dataclass

_UNRESERVED = "cannot reserve space on this file system: if it fills up, the merge stops; free space and run the same command again"
_CHECK_STEP = 1 << 20
NonFinite = Literal["error", "warn"]


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
    join: bool = False
    """Whether other processes share the merge; see `streammerge.engine.joined`."""
    taking: Taking | None = None
    """What decides which units of a shared merge this process does; None: it claims them."""
    hash_inputs: bool = False
    """Whether to hash every input file first, so that it is recognised whatever its date. The manifest has the hashes."""


class OutputSession(Protocol):
    """One output of a run, in a directory or in an object store."""

    plan: MergePlan
    place: Place
    worker: Worker

    @property
    def record(self) -> Record:
        """The record of receipts and of values of statistics."""

    @property
    def course(self) -> Course:
        """What is done, and in which order."""

    @property
    def elements_elsewhere(self) -> int:
        """Number of elements that other processes have finished since this one began."""

    def begin(self) -> Progress:
        """Open the records and the shards; return what earlier runs have done, as far as the bytes are sound."""

    def look(self) -> None:
        """Tell the user what there is to tell; called a few times a second, from the thread that runs."""

    def bytes_of(self, receipts: Sequence[Receipt]) -> int:
        """Return the number of output bytes that some receipts cover."""

    def every(self, receipts: Sequence[Receipt]) -> Sequence[Receipt]:
        """Return the receipts of the whole output, given those of this process; empty if others did not tell theirs."""

    def check(self, receipts: Sequence[Receipt]) -> None:
        """Raise WorldError if an input changed meanwhile; warn of copies that differ and of non-finite values."""

    def finish(self, receipts: Sequence[Receipt], card: str) -> Mapping[str, Any]:
        """Publish the output and return its manifest."""

    def close(self) -> None:
        """Close the records and the shards."""


class Session:
    """One output of a run, whose directory is locked.

    Parameters
    ----------
    plan, place, identity
        The merge, where it goes, and what it depends on.
    reader
        An open reader of its inputs.
    hasher
        Hashes its input files.
    """

    def __init__(
        self,
        plan: MergePlan,
        place: Place,
        identity: Identity,
        reader: Reader,
        options: Options,
        control: Control,
        hasher: ContentHasher,
    ) -> None:
        self.plan, self.place, self.identity = plan, place, identity
        self._reader, self._control, self._hasher = reader, control, hasher
        self._options = options
        self._files = find_inputs(plan, plan.beside.files)
        self.journal = Journal(place, identity.named)
        self._presence = Presence(place, self._told)
        self._writer = self._make_writer()
        known = {} if reader.computes is None else reader.computes.identities
        spec = RunSpec(plan, place.out, identity, options.nonfinite == "warn", options.io, stages=known)
        self.worker = Worker(spec, reader, self._writer, control.stop)
        self._known: dict[str, Known] = {}

    def _make_writer(self) -> ShardWriter:
        return ShardWriter(self.place, self.plan.layout, direct=self._options.io == "direct")

    @property
    def record(self) -> Record:
        """The record of receipts and of values of statistics."""
        return self.journal

    @property
    def course(self) -> Course:
        """What is done, and in which order."""
        return Alone(self.plan)

    @property
    def elements_elsewhere(self) -> int:
        """Number of elements that other processes have finished since this one began."""
        return 0

    def begin(self) -> Progress:
        """Open the journal and the shards; return what earlier runs have done, as far as the bytes are sound."""
        progress = self._continue()
        shards = [shard.name for shard in self.plan.layout.shards if folder_of(shard.name)]
        if shards:
            self.journal.announce(shards)  # so that a later merge that starts over can remove them
        self._writer.open(anew=not progress.identity)
        if self._writer.unreserved:
            self._control.warn(f"{printable(self.place.out)}: {_UNRESERVED}")
        self._known = progress.files
        return replace(progress, receipts=self._believe(progress.receipts))

    def look(self) -> None:
        """Tell the user what there is to tell; called a few times a second, from the thread that runs."""

    def bytes_of(self, receipts: Sequence[Receipt]) -> int:
        """Return the number of output bytes that some receipts cover."""
        jobs = self.plan.jobs
        spans = ((first, last) for r in receipts for first, last in jobs[r.job].spans(r.start, r.stop))
        return sum(last - first for first, last in spans)

    def every(self, receipts: Sequence[Receipt]) -> Sequence[Receipt]:
        """Return the receipts of the whole output, given those of this process; empty if others did not tell theirs."""
        return receipts

    def check(self, receipts: Sequence[Receipt]) -> None:
        """Raise WorldError if an input changed meanwhile; warn of copies that differ and of non-finite values."""
        for file in self._files:
            confirm(file, self._known[file.key], self._hasher)
        for line in (
            *differing(self.plan, receipts),
            *not_finite_lines(self.plan, self._reader, receipts, self._output, self.worker.label),
        ):
            self._control.warn(line)

    def finish(self, receipts: Sequence[Receipt], card: str) -> Mapping[str, Any]:
        """Publish the output and return its manifest."""
        contents = {key: known.content for key, known in self._known.items()}
        hashes = {file.name: contents[file.key] for file in self._files if self._is_sidecar(file)}
        self.journal.announce(hashes)
        plan, place, writer, identity = self.plan, self.place, self._writer, self.identity
        if plan.adapter is not None:
            try:
                manifest = commit_adapter(
                    plan, place, writer, self._reader, receipts, identity, card, contents
                )
            except EmptyAdapterError:
                self._forget()  # the same command would end here again
                raise
        else:
            manifest = commit(plan, place, writer, receipts, identity, card, hashes, contents)
        self._presence.end()
        self.journal.remove()
        for line in (*of_floor(manifest.get("floored")), *of_energy(plan, residuals_of(manifest))):
            self._control.warn(labelled(self.worker.label) + line)
        return manifest

    def _forget(self) -> None:
        """Remove everything of a run that cannot have an output."""
        self._presence.end()
        clear(self.place)
        sweep(self.place, written_names(self.plan))
        self.journal.remove()

    def close(self) -> None:
        """Close the journal and the shards."""
        self.journal.close()
        self._writer.close()
        self._presence.end()

    def _told(self) -> dict[str, Any]:
        """Return what other processes are told of this one."""
        read, written = self._reader.bytes_read, self._writer.bytes_written
        return {"moved": read + written, "bytes_read": read, "bytes_written": written}

    def _continue(self) -> Progress:
        """Return the records of an earlier run; without any, or with --overwrite, start over.

        Input files are recognised by stamp or content; files that need a hash and have none are hashed.
        """
        journal, files = self.journal, self._files
        journal.claim()
        self._presence.check()
        progress = left = None
        if not self._options.overwrite:
            progress = journal.read()
            left = left_by_run(self.place, self.identity, self.plan.layout)
        if progress is None and left is not None:
            progress = Progress(self.identity.named, files=dict(left.files))
        known = {file.key: Known(file.stamp) for file in files}
        if progress is not None:
            what = f"{printable(self.place.out)}: holds an unfinished merge"
            known = recognize(files, progress.files, self._hasher, what)
        known |= self._hashed(known)
        self._presence.begin()
        if progress is None:
            announced = journal.announced() | left_by_runs(self.place)
            journal.start_over()
            discard_runs(self.place)
            clear(self.place, announced)
        else:
            withdraw(self.place)
        journal.open(known)
        if progress is not None and left is not None:
            journal.add(left.receipts)
            left.take(self.place, self.plan.layout)
            progress = replace(progress, receipts=[*progress.receipts, *left.receipts])
        if progress is not None:
            sweep(self.place, written_names(self.plan))
        return replace(progress or Progress({}), files=known)

    def _hashed(self, known: Mapping[str, Known]) -> dict[str, Known]:
        """Return the files that need a content hash and have none, with their hash."""
        wanted = [
            file
            for file in self._files
            if not known[file.key].content and (self._options.hash_inputs or self._is_sidecar(file))
        ]
        hashed = self._hasher.hash_once(wanted)
        return {key: Known(known[key].stamp, content) for key, content in hashed.items()}

    def _is_sidecar(self, file: InputFile) -> bool:
        return file.group == beside(self.plan)

    def _believe(self, receipts: Sequence[Receipt]) -> list[Receipt]:
        """Return the receipts whose bytes have the recorded checksum; others are computed again."""
        slots = self.plan.layout.slots
        plausible = [
            r
            for r in receipts
            if r.job < len(slots)
            and len(r.crcs) == len(slots[r.job])
            and not any(slot.shard in self._writer.fresh for slot in slots[r.job])
            and _is_cut(self.plan.jobs[r.job], r.start, r.stop)
            and (self.worker.tolerant or not r.not_finite or self.plan.jobs[r.job].is_copied)
        ]
        with ThreadPoolExecutor(self.plan.budget.workers) as threads:
            sound = list(threads.map(self._is_sound, plausible))
        return [receipt for receipt, fine in zip(plausible, sound, strict=True) if fine]

    def _is_sound(self, receipt: Receipt) -> bool:
        spans = self.plan.jobs[receipt.job].spans(receipt.start, receipt.stop)
        slots = self.plan.layout.slots[receipt.job]
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

    def _output(self, job: int, first: int, last: int) -> Bytes:
        slot = self.plan.layout.slots[job][0]
        return np.frombuffer(self._writer.read(slot.shard, slot.offset + first, last - first), np.uint8)


def written_names(plan: MergePlan) -> set[str]:
    """Return the names of all files that a merge writes to its output."""
    tokenizer = {} if plan.tokenizer is None else plan.tokenizer.changed
    made = {CONFIG_COPY, "README.md", *plan.settings, *tokenizer, *plan.beside.files, *plan.layout.indexes}
    made |= set() if plan.adapter is None else {ADAPTER_CONFIG}
    return {*made, *plan.layout.sizes, MANIFEST}


def _is_cut(job: Job, start: int, stop: int) -> bool:
    """Return whether a piece of a job may reach from `start` to `stop`."""
    ends = stop % job.unit == 0 or stop == job.n_elements
    return 0 <= start <= stop <= job.n_elements and start % job.unit == 0 and ends
