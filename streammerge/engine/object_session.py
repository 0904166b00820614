"""One output of a run that lies in an object store; see `engine.session` for one in a directory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from streammerge.engine.course import Alone, Course
from streammerge.engine.scheduler import Record
from streammerge.engine.session import Options, written_names
from streammerge.engine.telling import differing, of_floor
from streammerge.engine.worker import RunSpec, Worker
from streammerge.errors import ConfigError, InputError, printable
from streammerge.events import Control
from streammerge.io import volumes
from streammerge.io.reader import Reader
from streammerge.output.identity import Identity
from streammerge.output.inputs import ContentHasher, beside, confirm, find_inputs, recognize
from streammerge.output.journal import Known, Progress, Receipt
from streammerge.output.object_commit import commit_objects
from streammerge.output.object_place import Present, clear_objects, withdraw_objects
from streammerge.output.object_records import ObjectRecords
from streammerge.output.object_shards import ObjectShards
from streammerge.output.place import Place
from streammerge.planning.plan import MergePlan


def check_streamable(plan: MergePlan, options: Options) -> None:
    """Refuse what cannot be written in the order of its bytes.

    Raises
    ------
    InputError
        If the plan or the options ask for it.
    """
    cure = "give a directory as OUT, and copy it to the store afterwards"
    if plan.adapter is not None:
        raise ConfigError(f"{plan.config.where}: an adapter is not written to an object store: {cure}")
    if any(len(job.parts) > 1 for job in plan.jobs):
        raise ConfigError(
            f"{plan.config.where}: quantised tensors, of several parts each, are not written to an object store: {cure}"
        )
    if options.join:
        raise InputError(f"--join shares directories, not object stores: {cure}")
    if options.executor != "threads":
        raise InputError(f"executor {options.executor!r} does not write to an object store: {cure}")


class ObjectSession:
    """One output of a run; see `OutputSession`.

    Parameters
    ----------
    present
        Every object that lies there now.
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
        present: Present,
    ) -> None:
        self.plan, self.place, self.identity = plan, place, identity
        self._control, self._hasher, self._options = control, hasher, options
        self._present = present
        self._files = find_inputs(plan, plan.beside.files)
        known = {} if reader.computes is None else reader.computes.identities
        spec = RunSpec(plan, place.out, identity, options.nonfinite == "warn", options.io, known)
        stop = control.stop
        self._writer = ObjectShards(str(place.out), plan.layout, stop)
        self.worker = Worker(spec, reader, self._writer, stop)
        self.journal = ObjectRecords(plan, place, identity.named, self._writer)
        self._known: dict[str, Known] = {}

    @property
    def record(self) -> Record:
        """See `OutputSession`."""
        return self.journal

    @property
    def course(self) -> Course:
        """See `OutputSession`."""
        return Alone(self.plan)

    @property
    def elements_elsewhere(self) -> int:
        """See `OutputSession`."""
        return 0

    def every(self, receipts: Sequence[Receipt]) -> Sequence[Receipt]:
        """See `OutputSession`."""
        return receipts

    def begin(self) -> Progress:
        """Read the records and open the first shard; return what earlier runs have done."""
        progress = None if self._options.overwrite else self.journal.read(self._present)
        self._known = {file.key: Known(file.stamp) for file in self._files}
        if progress is not None:
            what = f"{printable(self.place.out)}: holds an unfinished merge"
            self._known = recognize(self._files, progress.files, self._hasher, what)
        group = beside(self.plan)
        missing = [
            file
            for file in self._files
            if not self._known[file.key].content and (self._options.hash_inputs or file.group == group)
        ]
        hashed = self._hasher.hash_once(missing)
        self._known |= {key: Known(self._known[key].stamp, content) for key, content in hashed.items()}
        announced = self.journal.announced()
        names = written_names(self.plan)
        if progress is None:
            self.journal.done.clear()
            self.journal.open(self._known, {*names, *announced})  # from now on it counts as ours
            clear_objects(self.place, self._present, announced)
        else:
            withdraw_objects(self.place, self._present)
        self.journal.open(self._known, names)
        self._writer.begin(self.journal.done)
        return replace(progress or Progress({}), files=self._known)

    def bytes_of(self, receipts: Sequence[Receipt]) -> int:
        """Return the number of output bytes that some receipts cover."""
        jobs = self.plan.jobs
        spans = ((first, last) for r in receipts for first, last in jobs[r.job].spans(r.start, r.stop))
        return sum(last - first for first, last in spans)

    def check(self, receipts: Sequence[Receipt]) -> None:
        """Raise WorldError if an input changed meanwhile; warn of copies that differ and of non-finite values."""
        for file in self._files:
            confirm(file, self._known[file.key], self._hasher)
        for line in differing(self.plan, receipts):
            self._control.warn(line)
        counts: dict[int, int] = {}
        for receipt in receipts:
            counts[receipt.job] = counts.get(receipt.job, 0) + receipt.not_finite
        for job, count in counts.items():
            if count:
                name = printable(self.plan.jobs[job].name)
                self._control.warn(f"tensor {name}: {count} elements are NaN or infinite")

    def finish(self, receipts: Sequence[Receipt], card: str) -> dict[str, Any]:
        """Publish the output and return its manifest."""
        contents = {key: known.content for key, known in self._known.items()}
        hashes = {file.name: contents[file.key] for file in self._files if file.group == beside(self.plan)}
        manifest = commit_objects(
            self.plan, self.place, self._writer, receipts, self.identity, card, hashes, contents
        )
        self.journal.remove()
        volumes.forget(self.place.out)
        for line in of_floor(manifest.get("floored")):
            self._control.warn(line)
        return manifest

    def close(self) -> None:
        """Abort what is not finished."""
        self._writer.close()
