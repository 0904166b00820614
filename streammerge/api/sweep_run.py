"""The course of a sweep: points are checked, merged in batches, scored and, unless they are kept, removed.

::

    check      plan every point from headers; compare with what an earlier run recorded; nothing is written
    batch      as many points as memory and disk have room for, merged from one read
    score      the command for each new point; what --keep does not keep is removed
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from streammerge.api.deciding import Opened, open_all, plan_opened, settle
from streammerge.api.sweep_events import OverAll
from streammerge.config.points import Point, points_of
from streammerge.config.schema import MergeConfig
from streammerge.engine.first_use import compile_first
from streammerge.engine.scoring import Score, score
from streammerge.engine.session import Options
from streammerge.engine.sweep import identify_alone, is_finished, merge_together, together
from streammerge.errors import BudgetError, MergedOverflowError, OutputError, WorldError, printable
from streammerge.events import Control, Event
from streammerge.io.disk import space_for
from streammerge.io.durable import make_directory, world_errors
from streammerge.io.lock import locked_directory
from streammerge.output.directory import check_target
from streammerge.output.identity import Digests
from streammerge.output.place import MANIFEST, STATE, Place, place_of
from streammerge.output.sweep_record import Row, SweepRecord, read_record, remove_tree
from streammerge.planning.description import describe
from streammerge.planning.memory.enough import asking_enough
from streammerge.planning.options import PlanOptions
from streammerge.planning.plan import MergePlan
from streammerge.planning.sweep import Room, check_swept, nbytes_of_point
from streammerge.records import dataclass
from streammerge.report.card import model_card
from streammerge.report.sweep import write_sweep_page
from streammerge.units import format_size

MOST_IN_BATCH = 64
"""Most points of a batch; more would hardly read less, and each has its plan in memory."""


@dataclass(frozen=True)
class Wishes:
    """What a caller wants of a sweep."""

    command: str | None = None
    """The command that scores a point."""
    timeout: float | None = None
    """Seconds after which it is ended."""
    keep: int | None = None
    """Number of best points to keep; None: all."""
    disk: int | None = None
    """Bytes that all outputs may take together; None: what is free."""


class SweepRun:
    """One run of a sweep into a directory.

    Parameters
    ----------
    config
        A config with a sweep.
    out
        The directory.
    """

    def __init__(
        self,
        config: MergeConfig,
        out: Path,
        planning: PlanOptions,
        options: Options,
        wishes: Wishes,
        control: Control,
    ) -> None:
        self._config, self._out, self._planning = config, out, planning
        self._options, self._wishes, self._outer = options, wishes, control
        self._digests: Digests = {}
        self._tried: set[str] = set()
        """Points that were scored in this run, or whose command failed."""
        self._finished: set[str] = set()
        """Points whose output is complete in its directory."""
        self.bytes_read = self.bytes_written = 0

    def run(self) -> SweepRecord:
        """Do what is left of the sweep, and return its record.

        Raises
        ------
        StreammergeError
            See `streammerge.errors`; the same call goes on.
        """
        record = self._check()
        with world_errors(self._out):
            make_directory(self._out)
        with locked_directory(
            self._out,
            f"{printable(self._out)}: a sweep or merge is writing there already: wait for it, or choose a different OUT",
        ):
            record.save()
            self._discard(record)
            self._look_around(record)
            self._score_new(record)
            while names := self._to_merge(record):
                self._merge_some(record, names)
                self._score_new(record)
            self._prune(record)
            write_sweep_page(record, self._config.where, self._plan(next(iter(self._points))), self._outer)
        return record

    # --- before anything is written

    @cached_property
    def _points(self) -> dict[str, Point]:
        return {point.name: point for point in points_of(self._config)}

    @cached_property
    def _opened(self) -> Opened:
        return open_all(next(iter(self._points.values())).config, self._planning)

    def _plan(self, name: str) -> MergePlan:
        return plan_opened(self._points[name].config, self._opened, self._planning)

    def _plan_all(self, memory: int | None) -> None:
        """Plan every point in so much memory."""
        given = replace(self._planning, memory=memory)
        opened = open_all(next(iter(self._points.values())).config, given)
        for point in self._points.values():
            plan_opened(point.config, opened, given)

    def _check(self) -> SweepRecord:
        """Plan every point and return the record that the sweep begins with.

        Raises
        ------
        InputError
            If a value, a model, the memory or the disk does not allow a point.
        OutputError
            If the directory holds anything else.
        """
        points = self._points
        first = next(iter(points.values())).config
        _, method = settle(first)
        check_swept(self._config, method)
        found = read_record(self._out)
        before = None if self._options.overwrite else found
        record = SweepRecord(self._out, self._wishes.command)
        warnings: dict[str, None] = {}
        for name, point in points.items():
            self._outer.check()
            try:
                plan = self._plan(name)
            except BudgetError as error:
                raise asking_enough(error, self._plan_all) from None
            check_target(self._place, plan.inputs, [index.reference for index in plan.stores])
            check_target(place_of(self._out / name), plan.inputs)
            identity = identify_alone(plan, self._digests)
            row = Row(point.spelled, identity.public)
            if before is not None and name in before.rows:
                if changed := identity.changed(before.rows[name].identity):
                    self._refuse(f"a sweep with a different {printable(', '.join(changed[:3]))}")
                row = before.rows[name]
            record.rows[name] = row
            warnings |= dict.fromkeys(plan.warnings)
            self._measure(plan)
        if before is not None:
            self._compare(record, before)
        self._stale = [] if before is not None or found is None else list(found.rows)
        self.room.check()
        self._check_space(record)
        for line in warnings:
            self._outer.warn(line)
        return record

    def _measure(self, plan: MergePlan) -> None:
        """Note the sizes of a point; all points have the same tensors."""
        self.room = Room(len(self._points), nbytes_of_point(plan), self._keep, self._wishes.disk)
        self._elements, self._tensors = sum(job.n_elements for job in plan.jobs), len(plan.jobs)
        self._sizes = plan.layout.sizes

    @property
    def _keep(self) -> int | None:
        keep = self._wishes.keep
        return None if keep is None or keep >= len(self._points) else keep

    @property
    def _place(self) -> Place:
        """The directory of the sweep, whatever its name."""
        return Place(self._out, self._out, self._out / STATE, self._out / MANIFEST)

    def _compare(self, record: SweepRecord, before: SweepRecord) -> None:
        """Refuse a directory with points that the config does not have, or with scores of a different command."""
        if gone := [name for name in before.rows if name not in record.rows]:
            self._refuse(f"the point {printable(gone[0], 200)}, which the config does not have")
        scored = any(row.score is not None for row in before.rows.values())
        if scored and record.command is not None and before.command != record.command:
            self._refuse(f"scores of a different command ({printable(before.command, 120)})")
        record.command = record.command or before.command

    def _refuse(self, what: str) -> None:
        raise OutputError(
            f"{printable(self._out)}: holds {what}: choose a different OUT, or replace it with --overwrite"
        )

    def _check_space(self, record: SweepRecord) -> None:
        """Refuse a sweep for which too little disk space is free.

        Raises
        ------
        WorldError
            With both numbers.
        """
        if all(
            (row.removed and row.score is not None) or (self._out / name / MANIFEST).exists()
            for name, row in record.rows.items()
        ):
            return  # nothing is left to merge
        held = [name for name in record.rows if os.path.lexists(self._out / name)]
        allocated = sum(self._allocated(name) for name in held)
        needed = self.room.least * self.room.nbytes - allocated
        if needed > (free := self._free()):
            what = f"{self.room.least} of {self.room.points} points at a time"
            raise WorldError(
                f"{printable(self._out)}: needs {format_size(needed)} for {what}, {format_size(free)} are free: No space left "
                "on device; free some space and run the same command again, or choose a different OUT"
            )

    def _free(self) -> int:
        try:
            return space_for(self._out, {}).free
        except OSError:
            return 1 << 62  # writing will report the problem

    def _allocated(self, name: str) -> int:
        """Return the bytes that the shards of a point have on the disk."""
        out = self._out / name
        try:
            return sum(self._sizes.values()) - space_for(out, self._sizes, place_of(out).paths).needed
        except OSError:
            return 0

    # --- what is there

    def _discard(self, record: SweepRecord) -> None:
        """Remove what --overwrite replaces, and what an interrupted removal has left."""
        for name in self._stale:
            remove_tree(self._out / name)
        for name, row in record.rows.items():
            if row.removed and row.score is not None:
                remove_tree(self._out / name)

    def _look_around(self, record: SweepRecord) -> None:
        """Find the points that are finished; of those that are removed, merge again what is to be kept or has no score."""
        wanted = self._wanted(record)
        for name, row in record.rows.items():
            if row.removed and (row.score is None or name in wanted):
                remove_tree(self._out / name)
                record.note(name, removed=False)
            elif (self._out / name).exists() and self._is_finished(name):
                self._finished.add(name)
        record.save()

    def _wanted(self, record: SweepRecord) -> set[str]:
        """Return the points that --keep keeps, as far as scores are known: more than an earlier run kept, perhaps."""
        scores = {name: row.score for name, row in record.rows.items() if row.score is not None}
        return set(sorted(scores, key=scores.__getitem__, reverse=True)[: self._keep])

    def _to_merge(self, record: SweepRecord) -> list[str]:
        return [
            name
            for name, row in record.rows.items()
            if name not in self._finished and not row.removed and name not in self._tried
        ]

    # --- merging

    def _merge_some(self, record: SweepRecord, names: list[str]) -> None:
        """Merge as many of the points as memory and disk have room for."""
        allocated = sum(self._allocated(name) for name in names)
        most = self.room.most_at_once(len(self._finished), self._free(), allocated)
        most = min(most, MOST_IN_BATCH)
        chosen = together({name: self._plan(name) for name in names[:most]}, most)
        for plan in chosen.values():
            compile_first(plan, self._outer)
        emit = self._over_all(record, chosen, len(names))
        try:
            merged = merge_together(
                {self._out / name: plan for name, plan in chosen.items()},
                self._digests,
                replace(self._options, overwrite=False),
                self._outer.part(emit),
                model_card,
            )
        except MergedOverflowError as error:
            self._give_up(record, error.output or next(iter(chosen)), error)
            return
        self.bytes_read += merged.bytes_read
        self.bytes_written += merged.bytes_written
        self._finished |= chosen.keys()
        for name in chosen:
            record.note(name, seconds=merged.seconds / len(chosen), reason="")
        record.save()

    def _give_up(self, record: SweepRecord, name: str, error: MergedOverflowError) -> None:
        """Note that a point cannot be merged; the others of its batch continue where they are."""
        self._tried.add(name)
        remove_tree(self._out / name)
        reason = str(error).removeprefix(f"{printable(error.output, 200)}: ")
        record.note(name, score=None, seconds=None, reason=reason)
        record.save()
        values = {"point": name, "score": None, "seconds": None, "reason": reason}
        self._outer.emit(Event("point", values))

    def _over_all(self, record: SweepRecord, chosen: Mapping[str, MergePlan], left: int) -> OverAll:
        """Return the receiver of a batch's events."""
        first = next(iter(chosen.values()))
        done = len(record.rows) - left
        if self._teller is None:
            batches = -(-left // len(chosen))
            told = {
                **describe(first),
                "out": str(self._out),
                "points": len(record.rows),
                "bytes_to_read": first.bytes_to_read() * batches,
                "bytes_of_passes": first.bytes_of_passes() * batches,
                "bytes_to_write": first.layout.nbytes * len(record.rows),
            }
            self._teller = OverAll(
                self._outer, len(record.rows) * self._elements, len(record.rows) * self._tensors
            )
            self._outer.emit(Event("plan", told))
        self._teller.base = {
            "bytes_read": self.bytes_read,
            "bytes_written": self.bytes_written,
            "elements": done * self._elements,
            "tensors": done * self._tensors,
            "bytes_done": done * first.layout.nbytes,
        }
        return self._teller

    _teller: OverAll | None = None

    # --- scores

    def _score_new(self, record: SweepRecord) -> None:
        """Score the finished points that have no score, and remove what is not kept."""
        for name, row in list(record.rows.items()):
            if name not in self._finished or row.score is not None or name in self._tried:
                continue
            self._outer.check()
            self._tried.add(name)
            if self._wishes.command is not None:
                self._outer.emit(Event("scoring", {"point": name}))
                began = time.monotonic()
                found = score(self._wishes.command, self._out / name, self._wishes.timeout, self._outer)
                seconds = (row.seconds or 0.0) + time.monotonic() - began
                if not self._is_whole(name):
                    found = Score(None, "the command changed or removed files of the point")
                    self._finished.discard(name)
                record.note(name, score=found.value, reason=found.reason, seconds=seconds)
                record.save()
            row = record.rows[name]
            values = {"point": name, "score": row.score, "seconds": row.seconds, "reason": row.reason}
            self._outer.emit(Event("point", values))
            self._prune(record)

    def _is_whole(self, name: str) -> bool:
        """Return whether a point's files are still those of its merge, by their names and sizes."""
        try:
            return self._is_finished(name)
        except OutputError:
            return False

    def _is_finished(self, name: str) -> bool:
        plan = self._plan(name)
        return is_finished(plan, self._out / name, identify_alone(plan, self._digests), self._outer)

    def _prune(self, record: SweepRecord) -> None:
        """Remove the finished points that are not among the best; those without a score come last."""
        if self._keep is None:
            return
        names = [name for name in record.rows if name in self._finished]
        known = [name for name in names if record.rows[name].score is not None or name in self._tried]
        scores = {name: record.rows[name].score for name in known}
        ranked = sorted(known, key=lambda name: -math.inf if (s := scores[name]) is None else s, reverse=True)
        for name in ranked[self._keep :]:
            record.note(name, removed=True)
            record.save()
            self._finished.discard(name)
            remove_tree(self._out / name)
