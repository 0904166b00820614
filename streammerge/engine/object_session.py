"""The part of one process in a merge into an object store, which others may share; see `engine.joined_session`.

A merge into a store is always one that others could share: a second process with the same merge takes shards of it.
Shards have their final names when they are whole, so the end of a merge only adds the small files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from streammerge.engine.joined_course import JoinedCourse
from streammerge.engine.joined_session import JoinedSession
from streammerge.engine.session import Options, written_names
from streammerge.engine.telling import differing, of_energy, of_floor
from streammerge.errors import InputError, StreammergeError, printable
from streammerge.output.adapter_cut import EmptyAdapterError, residuals_of
from streammerge.output.joining import ShardDone, shard_done, shard_record, shard_unit
from streammerge.output.journal import Progress, Receipt
from streammerge.output.object_adapter import commit_adapter_object
from streammerge.output.object_commit import commit_objects
from streammerge.output.object_place import object_of, objects_of, withdraw_objects
from streammerge.output.object_readback import is_as_received
from streammerge.output.object_shards import ObjectShards
from streammerge.output.shards import ShardWriter
from streammerge.output.shared_ledger import run_of
from streammerge.output.volume import Gone
from streammerge.output.working_files import working_files
from streammerge.planning.plan import MergePlan


def check_streamable(plan: MergePlan, options: Options) -> None:
    """Refuse what cannot be written in the order of its bytes.

    Raises
    ------
    InputError
        If the plan or the options ask for it.
    """
    cure = "give a directory as OUT, and copy it to the store afterwards"
    if plan.adapter is not None and options.join:
        raise InputError(
            "output: lora: --join and --on share out shards, and an adapter is one file: leave the option out"
        )
    if options.join and options.overwrite:
        raise InputError(
            "--join with --overwrite: each process would discard what the others have done: discard it once, by "
            "`merge --overwrite` without --join, then join"
        )
    if options.executor != "threads":
        raise InputError(f"executor {options.executor!r} does not write to an object store: {cure}")


class ObjectSession(JoinedSession):
    """One output of a run; the parameters are those of `Session`."""

    _shards: ObjectShards
    resumed = 0
    """Bytes of the output that were finished when it began."""
    _last: ShardDone | None = None
    """The shard that is whole but for its end, since its presence marks a finished model."""

    def _make_writer(self) -> ShardWriter:
        super()._make_writer()
        run, stop = run_of(self.identity.public), self._control.stop
        by_itself = self._options.taking is None  # else a scheduler says who commits
        self._shards = ObjectShards(
            self.place,
            self.plan.layout,
            run,
            stop,
            self._check_run,
            holds_last=by_itself,
            tell=self._control.warn,
        )
        return self._shards

    def begin(self) -> Progress:
        """Enter the merge; return what has been done before."""
        progress = super().begin()
        self.resumed = self.bytes_of(progress.receipts)
        if len(self._done) < len(self.plan.layout.shards):
            withdraw_objects(self.place, objects_of(self.place))
        return progress if self._options.join else replace(progress, answers=self._own.answers)

    def look(self) -> None:
        """Tell the user of waits for the store."""
        self._shards.tell_remarks()

    def go_on_from(self, before: ObjectSession) -> None:
        """Take over from a session of the same process that lost an upload: what it has counted, and its statistics.

        The shards that it has finished are recorded.
        """
        self._own.answers |= before._own.answers
        self._shards.bytes_written = before._shards.bytes_written
        self._taking.given_up()

    @property
    def has_finished_some(self) -> bool:
        """Whether this process has recorded a shard since it began."""
        held = set() if self._last is None else {self._last_number}
        return bool(self._own.finished - held)

    def _make_course(self) -> JoinedCourse:
        here = self._entered
        return JoinedCourse(
            self.worker,
            here.ledger,
            self._shards,
            here.heartbeat.worker,
            self._taking,
            self._own.finished,
            self._note_done,
            self._control.check,
            counts_alone=not self._options.join,
        )

    def _left_alone(self) -> Sequence[Receipt]:
        return ()

    def _about(self) -> dict[str, Any]:
        return {**super()._about(), "beside": sorted(written_names(self.plan))}

    def _told(self) -> dict[str, Any]:
        """Return what other processes are told of this one; it may wait for them with a whole shard in hand."""
        told = super()._told()
        waits = self._last is not None and self._entered.ledger.in_hand <= {shard_unit(self._last_number)}
        return {**told, "idle": told["idle"] or waits}

    @property
    def _last_number(self) -> int:
        assert self.plan.layout.last is not None
        return self.plan.layout.last

    def _check_run(self) -> None:
        """Raise Gone if the merge has ended without this process, so that it adds nothing to a finished output."""
        if self._here is not None and self._here.ledger.about() is None:
            raise Gone(self._here.ledger.run)

    def _recorded(self) -> dict[int, ShardDone]:
        """Return the shards that are as they were recorded; others are forgotten."""
        ledger, found = self._entered.ledger, dict[int, ShardDone]()
        units, present = ledger.done(), objects_of(self.place)
        self._shards.present = present
        for number in range(len(self.plan.layout.shards)):
            if (unit := shard_unit(number)) not in units:
                continue
            done = shard_done(ledger.value(unit))
            there = present.get(object_of(self.place, self.plan.layout, ledger.run, number))
            if done is not None and self._is_there(number, done, there):
                found[number] = done
            else:
                ledger.forget(unit)
        return found

    def _is_there(self, number: int, done: ShardDone, there: tuple[int, str] | None) -> bool:
        """Return whether a shard is as its record says; one that was written twice may have a different ETag, and is read."""
        if there is None or there[0] != done.written.nbytes:
            return False
        if there[1] == done.written.e_tag:
            return True
        name = object_of(self.place, self.plan.layout, self._entered.ledger.run, number)
        return is_as_received(self.plan, str(self.place.path(name)), number, done.receipts)

    def finish_shard(self, number: int, receipts: Sequence[Receipt]) -> None:
        """Record a shard that the store has whole; one that marks a finished model waits for the end."""
        lines = (*differing(self.plan, receipts), *self._counted(receipts))
        written = self._shards.end(number)
        if number == self.plan.layout.last and self._shards.holds_last:
            self._last = ShardDone(written, tuple(receipts), lines)
            return
        unit = shard_unit(number)
        self._entered.ledger.record(unit, shard_record(written, receipts, lines))
        self._taking.recorded(self._entered.ledger, unit)

    def _counted(self, receipts: Sequence[Receipt]) -> list[str]:
        counts: dict[int, int] = {}
        for receipt in receipts:
            counts[receipt.job] = counts.get(receipt.job, 0) + receipt.not_finite
        return [
            f"tensor {printable(self.plan.jobs[job].name)}: {count} elements are NaN or infinite"
            for job, count in counts.items()
            if count
        ]

    def _to_commit(self) -> dict[int, ShardDone]:
        done = self._recorded()
        return done if self._last is None else {**done, self._last_number: self._last}

    def _publish(
        self,
        done: Mapping[int, ShardDone],
        receipts: Sequence[Receipt],
        card: str,
        hashes: Mapping[str, str],
        contents: Mapping[str, str],
    ) -> None:
        plan, place, shards = self.plan, self.place, self._shards
        if plan.adapter is not None:
            self._publish_adapter(receipts, card, contents)
            return
        manifest = commit_objects(
            plan, place, shards, receipts, self.identity, card, hashes, contents, self._check_run
        )
        if self._last is not None:
            record = shard_record(shards.end(self._last_number), self._last.receipts, self._last.lines)
            self._entered.ledger.record(shard_unit(self._last_number), record)
        for line in of_floor(manifest.get("floored")):
            self._control.warn(line)

    def _publish_adapter(self, receipts: Sequence[Receipt], card: str, contents: Mapping[str, str]) -> None:
        plan, stop = self.plan, self._control.stop
        try:
            manifest = commit_adapter_object(
                plan, self.place, self._reader, receipts, self.identity, card, contents, stop, self._check_run
            )
        except EmptyAdapterError:
            self._close_down()  # the same command would end here again
            raise
        for line in of_energy(plan, residuals_of(manifest)):
            self._control.warn(line)

    def fail(self, error: StreammergeError) -> None:
        """Tell the other processes of an error that they would meet too."""
        with suppress(Gone):  # nothing of an adapter that would be empty is kept
            super().fail(error)

    def _close_down(self) -> None:
        """Remove the working files; abort what dead processes were uploading, and end it for those that only sleep."""
        from streammerge.io.object_leftovers import abort_uploads  # it takes an HTTP client

        volume, layout, run = working_files(self.place.state), self.plan.layout, self._entered.ledger.run
        volume.discard(run)
        names = {object_of(self.place, layout, run, number) for number in range(len(layout.shards))}
        abort_uploads(str(self.place.folder), {*names, *written_names(self.plan)})
        volume.clear()
        self.place.look_anew()
