"""The part of one process in a merge that several processes share."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from streammerge.engine.course import Course
from streammerge.engine.joined_course import JoinedCourse
from streammerge.engine.session import Session, written_names
from streammerge.engine.sharing import check_failure
from streammerge.engine.taking import Claiming, poll_seconds
from streammerge.engine.telling import differing, not_finite_lines
from streammerge.errors import StreammergeError, WorldError, printable
from streammerge.output.commit import commit
from streammerge.output.heartbeat import signs_of
from streammerge.output.identity import Identity
from streammerge.output.inputs import confirm
from streammerge.output.joining import (
    COMMIT,
    Entered,
    ShardDone,
    close_down,
    enter,
    shard_done,
    shard_record,
    shard_unit,
)
from streammerge.output.journal import Known, Progress, Receipt
from streammerge.output.manifest import read_manifest
from streammerge.output.own_shards import OwnShards, Publisher
from streammerge.output.place import RUN, Place
from streammerge.output.shards import ShardWriter
from streammerge.output.shared_ledger import run_of
from streammerge.output.volume import Gone
from streammerge.output.working_files import working_files
from streammerge.planning.layout import folder_of


def ended(place: Place, identity: Identity) -> Mapping[str, Any] | None:
    """Return the manifest of a merge that the other processes have finished; None while it is not."""
    if working_files(place.state).exists(f"{run_of(identity.public)}/{RUN}"):
        return None
    place.look_anew()
    manifest = read_manifest(place.out)
    return None if manifest is None or identity.changed(manifest["identity"]) else manifest


class JoinedSession(Session):
    """The part of one process in a merge that it shares with others; the parameters are those of `Session`."""

    _course: JoinedCourse
    _done: dict[int, ShardDone]
    _here: Entered | None = None
    _every: Sequence[Receipt] = ()

    def _make_writer(self) -> ShardWriter:
        run, direct = run_of(self.identity.public), self._options.io == "direct"
        self._shards = OwnShards(self.place, self.plan.layout, run, direct=direct)
        self._own = _OwnRecord(self)
        self._taking = self._options.taking or Claiming()
        self._lock = threading.Lock()
        self._elsewhere: set[int] = set()
        return self._shards

    @property
    def record(self) -> _OwnRecord:
        """The record of the receipts of this process."""
        return self._own

    @property
    def course(self) -> Course:
        """The shards that this process claims."""
        return self._course

    @property
    def elements_elsewhere(self) -> int:
        """Number of elements that other processes have finished since this one began."""
        shards, jobs = self.plan.layout.shards, self.plan.jobs
        return sum(
            jobs[job].n_elements for n in self._elsewhere for job in {job for job, _ in shards[n].parts}
        )

    def begin(self) -> Progress:
        """Enter the merge; return what has been done before."""
        alone = self._left_alone()
        self._here = enter(self.place, self.identity, self._about, self._files, self._hasher, self._told)
        self._known = self._entered.known
        check_failure(self._entered.ledger)
        self._done = self._recorded()
        self._adopt(alone)
        self._course = self._make_course()
        receipts = [receipt for done in self._done.values() for receipt in done.receipts]
        return Progress(self.identity.named, receipts, files=self._known)

    def _make_course(self) -> JoinedCourse:
        ledger, worker = self._entered.ledger, self._entered.heartbeat.worker
        return JoinedCourse(
            self.worker,
            ledger,
            self._shards,
            worker,
            self._taking,
            self._own.finished,
            self._note_done,
            self._control.check,
        )

    def _left_alone(self) -> Sequence[Receipt]:
        """Return what a merge that worked alone has recorded here."""
        self.journal.claim(shared=True)
        alone = self.journal.read()
        return () if alone is None else alone.receipts

    @property
    def _entered(self) -> Entered:
        assert self._here is not None, "not entered yet"
        return self._here

    def _about(self) -> dict[str, Any]:
        """Return what a first process tells the others."""
        known = {file.key: Known(file.stamp) for file in self._files}
        known |= self._hashed(known)
        names = {file.name for file in self._files if self._is_sidecar(file)}
        shards = self.plan.layout.shards
        return {
            "files": {key: [one.stamp, one.content] for key, one in known.items()},
            "shards": [[shard.name, shard.nbytes] for shard in shards],
            "beside": sorted({*names, *(shard.name for shard in shards if folder_of(shard.name))}),
        }

    def _recorded(self) -> dict[int, ShardDone]:
        """Return the records of shards whose files are there as they were written; others are forgotten."""
        ledger, shards = self._entered.ledger, self.plan.layout.shards
        units, found = ledger.done(), {}
        for number, shard in enumerate(shards):
            if (unit := shard_unit(number)) in units:
                done = shard_done(ledger.value(unit))
                if done is not None and done.written.lies_in(self.place.folder, shard.name):
                    found[number] = done
                else:
                    ledger.forget(unit)
        return found

    def _adopt(self, receipts: Sequence[Receipt]) -> None:
        """Record the shards that a merge which worked alone has finished, after a look at their bytes."""
        slots, by_shard = self.plan.layout.slots, dict[int, list[Receipt]]()
        for receipt in receipts:
            if receipt.job < len(slots):
                by_shard.setdefault(slots[receipt.job][0].shard, []).append(receipt)
        for number, own in sorted(by_shard.items()):
            unit, ledger = shard_unit(number), self._entered.ledger
            if number in self._done or not self._covers(number, own) or not ledger.claim(unit):
                continue
            written = self._shards.look_at(number, partial(self._all_sound, own))
            if written is None:
                ledger.forget(unit)
                continue
            ledger.record(unit, shard_record(written, own, []))
            self._done[number] = ShardDone(written, tuple(own), ())

    def _all_sound(self, receipts: Sequence[Receipt]) -> bool:
        return len(self._believe(receipts)) == len(receipts)

    def _covers(self, number: int, receipts: Sequence[Receipt]) -> bool:
        jobs = {job for job, _ in self.plan.layout.shards[number].parts}
        ends: dict[int, int] = dict.fromkeys(jobs, -1)
        for receipt in sorted(receipts, key=lambda receipt: receipt.start):
            if receipt.start <= max(0, ends.get(receipt.job, -1)):
                ends[receipt.job] = max(receipt.stop, ends.get(receipt.job, -1))
        return all(ends[job] == self.plan.jobs[job].n_elements for job in jobs)

    def _told(self) -> dict[str, Any]:
        """Return what other processes are told of this one."""
        idle = self._here is None or not self._here.ledger.in_hand
        return {**super()._told(), "idle": idle}

    def _note_done(self, numbers: set[int]) -> None:
        for line in self.taken_over():
            self._control.warn(line)
        with self._lock:
            self._elsewhere = numbers - self._done.keys() - self._own.finished

    def finish_shard(self, number: int, receipts: Sequence[Receipt]) -> None:
        """Make a shard durable and record it, unless somebody else was faster."""
        lines = (
            *differing(self.plan, receipts),
            *not_finite_lines(self.plan, self._reader, receipts, self._output),
        )
        written, unit, ledger = self._shards.end(number), shard_unit(number), self._entered.ledger
        try:
            if ledger.value(unit) is not None:
                self._shards.drop(number)
            else:
                ledger.record(unit, shard_record(written, receipts, lines))
        except BaseException:
            self._shards.drop(number)
            raise
        self._taking.recorded(ledger, unit)

    def every(self, receipts: Sequence[Receipt]) -> Sequence[Receipt]:
        """Return the receipts of all processes, if this one has committed."""
        return self._every

    def check(self, receipts: Sequence[Receipt]) -> None:
        """Raise WorldError if an input changed meanwhile; then nobody finishes the merge."""
        try:
            for file in self._files:
                confirm(file, self._known[file.key], self._hasher)
        except WorldError as error:
            self.fail(error)
            raise

    def fail(self, error: StreammergeError) -> None:
        """Tell the other processes of an error that they would meet too."""
        self._entered.ledger.fail(type(error).__name__, str(error))

    def finish(self, receipts: Sequence[Receipt], card: str) -> Mapping[str, Any]:
        """Commit the merge, or wait until a different process has done so; return the manifest."""
        with suppress(Gone):
            self._end_together(card)
        manifest = ended(self.place, self.identity)
        if manifest is None:
            raise Gone(COMMIT)
        return manifest

    def _end_together(self, card: str) -> None:
        ledger = self._entered.ledger
        while COMMIT not in ledger.done():
            if self._taking.take(ledger, [COMMIT]):
                try:
                    self._commit(card)
                    self._taking.recorded(ledger, COMMIT)
                except WorldError:
                    if COMMIT not in ledger.done() and ledger.about() is not None:
                        raise  # else a different process was faster, and has swept what this one needed
                break
            check_failure(ledger)
            if self._taking.pause(poll_seconds(), self.worker.stop):
                self._control.check()
        self._close_down()

    def _close_down(self) -> None:
        """Remove what the processes have left, and then the ledger."""
        run = self._entered.ledger.run
        close_down(self.place, run, written_names(self.plan), self.plan.layout.sizes.keys())

    def _commit(self, card: str) -> None:
        done = self._to_commit()
        if missing := [n for n in range(len(self.plan.layout.shards)) if n not in done]:
            name = self.plan.layout.shards[missing[0]].name
            raise WorldError(
                f"{printable(self.place.path(name))}: its file is gone: run the same command again"
            )
        for one in done.values():
            for line in one.lines:
                self._control.warn(line)
        receipts = [receipt for one in done.values() for receipt in one.receipts]
        contents = {key: known.content for key, known in self._known.items()}
        hashes = {file.name: contents[file.key] for file in self._files if self._is_sidecar(file)}
        self._publish(done, receipts, card, hashes, contents)
        self._entered.ledger.record(COMMIT, {})
        self._every = receipts

    def _to_commit(self) -> dict[int, ShardDone]:
        """Return every shard that can be committed."""
        return self._recorded()

    def _publish(
        self,
        done: Mapping[int, ShardDone],
        receipts: Sequence[Receipt],
        card: str,
        hashes: Mapping[str, str],
        contents: Mapping[str, str],
    ) -> None:
        """Give all files their names; `hashes` and `contents` as in `commit`."""
        publisher = Publisher(self.place, self.plan.layout, [done[n].written for n in sorted(done)])
        commit(self.plan, self.place, publisher, receipts, self.identity, card, hashes, contents)

    def close(self) -> None:
        """Give up claims, remove unfinished files, and give no more signs of life."""
        self.journal.close()
        self._shards.close()
        if self._here is not None:
            self._here.ledger.release()
            self._here.heartbeat.stop()

    def taken_over(self) -> list[str]:
        """Return lines on the shards that were taken over since the last call."""
        ledger, lines = self._entered.ledger, []
        while ledger.taken_over:
            unit, worker = ledger.taken_over.pop()
            known = [sign for sign in signs_of(working_files(self.place.state)) if sign.worker == worker]
            who = f"process {known[0].pid} on {printable(known[0].host, 80)}" if known else "a process"
            lines.append(f"{who} gives no sign of life: its part, {unit}, is done again here")
        return lines


class _OwnRecord:
    """Collects the receipts of this process, and records a shard when it is complete."""

    def __init__(self, session: JoinedSession) -> None:
        self._session = session
        self._receipts: dict[int, list[Receipt]] = {}
        self._left: dict[int, dict[int, int]] = {}
        self.finished: set[int] = set()
        self.answers: dict[str, Any] = {}
        """Values of streamed statistics, by job, for a second attempt of this process."""

    def add(self, receipts: Sequence[Receipt]) -> None:
        """See `Record`; the elements are durable."""
        plan = self._session.plan
        for receipt in receipts:
            number = plan.layout.slots[receipt.job][0].shard
            if number not in self._left:
                jobs = {job for job, _ in plan.layout.shards[number].parts}
                self._left[number] = {job: plan.jobs[job].n_elements for job in jobs}
            left = self._left[number]
            left[receipt.job] -= receipt.stop - receipt.start
            if left[receipt.job] <= 0:
                del left[receipt.job]
            self._receipts.setdefault(number, []).append(receipt)
            if not left:
                self._session.finish_shard(number, self._receipts.pop(number))
                self.finished.add(number)

    def add_answers(self, answers: Mapping[str, Any]) -> None:
        """See `Record`; a shard that is not finished is begun again, so nothing else keeps them."""
        self.answers |= answers
