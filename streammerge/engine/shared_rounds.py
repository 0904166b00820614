"""Whole-model statistics of a merge that several processes share: each counts some shards, and the parts add up exactly.

For round r, and for each of its passes p over the files, the processes share these units; whoever is first does one::

    bring-r-<shard>      tensor-scope statistics that come before the round, of the tensors of a shard
    open-r               a sample of the model, which fixes the windows that all count in
    count-r-p-<shard>    the part of the tensors of a shard
    narrow-r-p-<i>       the part of the few elements that one statistic still needs
    sum-r-p              all parts of the pass, added in the order of the shards

Everyone then adds the sum to its own reducers, which thereby go through the same states in every process. Values are not
told: each process has them. One that comes late reads the sums, and no file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from streammerge.algebra.extent import Extent
from streammerge.engine.answers import follow, plain, reducer_of, restored
from streammerge.engine.sharing import Sharing
from streammerge.engine.streaming import Streamer
from streammerge.engine.worker import Answers, Worker
from streammerge.errors import BudgetError, InputError, OutputError, printable
from streammerge.output.volume import Gone
from streammerge.planning.job import Job
from streammerge.planning.layout import Shard
from streammerge.planning.plan import MergePlan
from streammerge.statistics.base import Reducer, Statistic
from streammerge.statistics.parts import decoded, encoded
from streammerge.units import format_size


class SharedRounds:
    """The rounds of whole-model statistics of one process among several.

    Parameters
    ----------
    worker
        The running worker of this process.
    sharing
        Hands out units that nobody does.
    """

    def __init__(self, worker: Worker, sharing: Sharing) -> None:
        self._worker, self._plan, self._sharing = worker, worker.plan, sharing
        self._merged = [job for job in self._plan.jobs if job.kind == "merge"]
        self._shards = {
            number: own
            for number, shard in enumerate(self._plan.layout.shards)
            if (own := _merged_in(self._plan, shard))
        }
        self._shard_of = {job.ordinal: number for number, jobs in self._shards.items() for job in jobs}
        self._values: list[list[Any]] = []
        """The values of each finished round."""
        self._brought: list[int] = []
        """The rounds before which tensors were brought to their request."""

    def run(self, streamer: Streamer) -> None:
        """Compute every whole-model statistic, round by round, together with the other processes."""
        for number in range(self._plan.model_rounds()) if self._merged else ():
            _Round(self, streamer, number).run()

    def give(self, jobs: Sequence[Job]) -> None:
        """Give the worker the known values of some jobs, all of the same shard."""
        for job in jobs:
            if job.kind == "merge" and (self._values or self._brought):
                self._worker.answers[job.ordinal] = self._known(job)

    def _known(self, job: Job) -> Answers:
        if not self._brought:
            return list(self._values)
        last = self._brought[-1]
        record = self._sharing.value(f"bring-{last}-{self._shard_of[job.ordinal]:05d}")
        told = record.get("answers", {}).get(str(job.ordinal), [])
        return [*restored(self._worker, job, told), *self._values[last:]]


def _merged_in(plan: MergePlan, shard: Shard) -> list[Job]:
    """Return the jobs of a shard that are merged, in file order."""
    ordinals = sorted({job for job, _ in shard.parts})
    return [plan.jobs[ordinal] for ordinal in ordinals if plan.jobs[ordinal].kind == "merge"]


def _taken(part: object) -> Any:
    """Return a part that a process has told.

    Raises
    ------
    OutputError
        If it is none.
    """
    try:
        return decoded(part)
    except ValueError as error:
        raise OutputError(
            f"the records of the shared merge are damaged ({error}): start over with --overwrite"
        ) from None


class _Round:
    """One round."""

    def __init__(self, rounds: SharedRounds, streamer: Streamer, number: int) -> None:
        self._rounds, self._streamer, self._number = rounds, streamer, number
        self._worker, self._plan = rounds._worker, rounds._plan
        self._sharing, self._merged, self._shards = rounds._sharing, rounds._merged, rounds._shards
        self._bins = 0
        self._history: list[tuple[str, list[object]]] = []
        """What the reducers have absorbed so far, in order: a sample, or the sum of a pass; one part for each."""

    def run(self) -> None:
        """Compute its values."""
        if self._needs_tensors():
            self._sharing.share({f"bring-{self._number}-{n:05d}": self._bringer(n) for n in self._shards})
            self._rounds._brought.append(self._number)
        lead = self._merged[0]
        self._rounds.give([lead])
        wanted = self._wanted(lead)
        self._open(wanted)
        reducers = self._replayed(wanted, {lead.ordinal: wanted})
        pending = [i for i, reducer in enumerate(reducers) if not reducer.known]
        passes = 0
        while pending:
            self._pass(passes, wanted, reducers, pending)
            pending = [i for i in pending if not reducers[i].end()]
            passes += 1
        self._rounds._values.append([reducer.value for reducer in reducers])

    def _needs_tensors(self) -> bool:
        """Return whether a tensor has statistics of its own to answer before this round."""
        for job in self._merged:
            extents = [statistics[0].extent for statistics in self._plan.rounds_of(job)]
            places = [i for i, extent in enumerate(extents) if extent == Extent.MODEL]
            if self._number >= len(places):
                continue
            first = places[self._number - 1] + 1 if self._number else 0
            if any(extent == Extent.TENSOR for extent in extents[first : places[self._number]]):
                return True
        return False

    def _wanted(self, job: Job) -> list[Statistic[Any]]:
        wanted = follow(self._worker, job)
        if not isinstance(wanted, list) or wanted[0].extent != Extent.MODEL:
            raise Gone(f"bring-{self._number}")  # its record has been removed: the merge has ended
        return wanted

    # --- units

    def _bringer(self, shard: int) -> Callable[[], Mapping[str, Any]]:
        def bring() -> dict[str, Any]:
            jobs = self._shards[shard]
            self._rounds.give(jobs)
            for job in jobs:
                self._worker.answers.setdefault(job.ordinal, [])
                self._streamer.prepare(job)
            self._streamer.tensor_rounds(jobs, self._worker.outputs)
            told = {str(job.ordinal): plain(self._worker, job) for job in jobs}
            for job in jobs:
                if len(self._worker.answers.get(job.ordinal, [])) != len(told[str(job.ordinal)]):
                    raise InputError(
                        f"method {self._plan.method.name!r}: tensor {printable(job.name)} has statistics before those of the whole "
                        "model that no record holds: leave --join out"
                    )
                self._worker.answers.pop(job.ordinal, None)
            return {"answers": told}

        return bring

    def _open(self, wanted: list[Statistic[Any]]) -> None:
        """Agree on the windows, as the process that was first sampled them."""
        unit, own = f"open-{self._number}", self._plan.statistics_memory.bins

        def sample() -> dict[str, Any]:
            self._bins = own
            versions = {self._merged[0].ordinal: wanted}
            if self._number not in self._rounds._brought:
                self._rounds.give(self._merged)
                versions = {job.ordinal: self._wanted(job) for job in self._merged}
            reducers = self._fresh(wanted, versions)
            sampled = [reducer for reducer in reducers if reducer.samples and not reducer.known]
            # Tensors that have been brought to their request are not at hand here: the first pass finds the window.
            if sampled and self._number not in self._rounds._brought:
                for job in self._merged:
                    self._streamer.prepare(job)
                self._streamer.sample(self._merged, sampled)
                return {"bins": own, "parts": [encoded(r.part()) if r in sampled else None for r in reducers]}
            return {"bins": own, "parts": None}

        self._sharing.share({unit: sample})
        told = self._sharing.value(unit)
        self._bins = int(told["bins"])
        if self._bins > own:
            raise BudgetError(
                f"the process that began this shared merge counts with {self._bins} bins, and --memory "
                f"{format_size(self._plan.budget.total)} has room for {own}: give as much --memory as it had"
            )
        if told["parts"] is not None:
            self._history.append(("sample", told["parts"]))

    def _pass(
        self, number: int, wanted: list[Statistic[Any]], reducers: list[Reducer[Any]], pending: list[int]
    ) -> None:
        """Take one pass together, and add its sum to the reducers."""
        parts: list[object] = [None] * len(reducers)
        counted = [i for i in pending if reducers[i].wants is None]
        name = f"{self._number}-{number}"
        if counted:
            units = {f"count-{name}-{shard:05d}": self._counter(shard, counted) for shard in self._shards}
            self._sharing.share(units)
            self._sharing.share({f"sum-{name}": lambda: self._sum(list(units), wanted, counted)})
            parts = list(self._sharing.value(f"sum-{name}")["parts"])
        for i in pending:
            if reducers[i].wants is not None:
                self._sharing.share({f"narrow-{name}-{i}": self._narrower(i, wanted)})
                parts[i] = self._sharing.value(f"narrow-{name}-{i}")["part"]
        for i in pending:
            reducers[i].absorb(_taken(parts[i]))
        self._history.append(("pass", parts))

    def _told(self, reducers: Sequence[Reducer[Any]], some: Sequence[int]) -> dict[str, Any]:
        return {"parts": [encoded(one.part()) if i in some else None for i, one in enumerate(reducers)]}

    def _counter(self, shard: int, counted: Sequence[int]) -> Callable[[], Mapping[str, Any]]:
        def count() -> dict[str, Any]:
            jobs = self._shards[shard]
            self._rounds.give(jobs)
            for job in jobs:
                self._streamer.prepare(job)
            versions = {job.ordinal: self._wanted(job) for job in jobs}
            reducers = self._replayed(versions[jobs[0].ordinal], versions)
            self._streamer.count(jobs, [reducers[i] for i in counted])
            for job in jobs:
                self._worker.answers.pop(job.ordinal, None)
            return self._told(reducers, counted)

        return count

    def _sum(
        self, units: Sequence[str], wanted: list[Statistic[Any]], counted: Sequence[int]
    ) -> Mapping[str, Any]:
        reducers = self._replayed(wanted, {self._merged[0].ordinal: wanted})
        for unit in units:
            parts = self._sharing.value(unit)["parts"]
            for i in counted:
                reducers[i].absorb(_taken(parts[i]))
        return self._told(reducers, counted)

    def _narrower(self, i: int, wanted: list[Statistic[Any]]) -> Callable[[], Mapping[str, Any]]:
        def count() -> dict[str, Any]:
            probe = self._replayed(wanted, {self._merged[0].ordinal: wanted})[i]
            assert probe.wants is not None
            job = self._plan.jobs[probe.wants[0]]
            self._rounds.give([job])
            self._streamer.prepare(job)
            versions = {job.ordinal: self._wanted(job)}
            reducer = self._replayed(versions[job.ordinal], versions)[i]
            self._streamer.count([job], [reducer], reducer.wants)
            return {"part": encoded(reducer.part())}

        return count

    # --- reducers

    def _fresh(
        self, wanted: list[Statistic[Any]], versions: Mapping[int, list[Statistic[Any]]]
    ) -> list[Reducer[Any]]:
        return [
            reducer_of(
                self._worker,
                statistic,
                self._merged,
                {ordinal: own[i] for ordinal, own in versions.items()},
                bins=self._bins,
            )
            for i, statistic in enumerate(wanted)
        ]

    def _replayed(
        self, wanted: list[Statistic[Any]], versions: Mapping[int, list[Statistic[Any]]]
    ) -> list[Reducer[Any]]:
        """Return new reducers in the state before the current pass."""
        reducers = self._fresh(wanted, versions)
        for kind, parts in self._history:
            for reducer, part in zip(reducers, parts, strict=True):
                if part is None:
                    continue
                reducer.absorb(_taken(part))
                if kind == "sample":
                    reducer.narrow_by_sample()
                else:
                    reducer.end()
        return reducers
