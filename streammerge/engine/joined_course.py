"""The course of a process that shares a merge with others: it takes shards that nobody has taken, until all are done."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence, Set

from streammerge.engine.shared_rounds import SharedRounds
from streammerge.engine.sharing import Sharing, check_failure
from streammerge.engine.streaming import Streamer
from streammerge.engine.taking import Taking, poll_seconds
from streammerge.engine.worker import Worker
from streammerge.output.joining import shard_unit
from streammerge.output.own_shards import OwnShards
from streammerge.output.shared_ledger import SharedLedger, in_turn
from streammerge.output.volume import Gone
from streammerge.planning.schedule import Interval, Step
from streammerge.planning.streamed import SHARDS_AT_ONCE, held_nbytes

_WAIT_SECONDS = 0.25
_OWN_SECONDS = 0.05
"""Seconds between two looks at whether a shard of this process is recorded."""
_LOOKS = round(_WAIT_SECONDS / _OWN_SECONDS)
"""Looks for each wish that what is written be synced and recorded, which asks the output's file system or store."""
_LAST = 2
"""Shards that nobody has taken, for each process, at which a process takes one only if it has nothing in hand."""


class JoinedCourse:
    """The course of one of several processes.

    Parameters
    ----------
    worker
        The running worker of this process.
    token
        The token of this process.
    taking
        Decides which units this process does.
    finished
        The numbers of the shards that this process has finished.
    on_done
        Called with the numbers of the shards that are recorded so far, by anyone.
    on_wait
        Called four times a second while others work; an exception that it raises ends the wait.
    counts_alone
        Whether this process computes statistics of the whole model by itself.
    """

    def __init__(
        self,
        worker: Worker,
        ledger: SharedLedger,
        writer: OwnShards,
        token: str,
        taking: Taking,
        finished: Set[int],
        on_done: Callable[[set[int]], None],
        on_wait: Callable[[], None],
        counts_alone: bool = False,
    ) -> None:
        self._plan, self._ledger, self._writer, self._stop = worker.plan, ledger, writer, worker.stop
        self._taking, self._counts_alone = taking, counts_alone
        self._finished, self._due = finished, worker.due
        self._taken: set[int] = set()
        self._chunks = 0
        """Number of chunks of the shards that this process has taken."""
        self._rounds = SharedRounds(worker, Sharing(ledger, token, worker.stop, taking, on_wait))
        shards = self._plan.layout.shards
        self._numbers = {shard_unit(number): number for number in range(len(shards))}
        self._order = in_turn(list(self._numbers), [shard.nbytes for shard in shards], token)
        self._on_done = on_done
        self._holds_sides = self._plan.streamed and held_nbytes(self._plan.layout) > 0

    def begin(self, streamer: Streamer) -> None:
        """See `Course`."""
        if self._counts_alone:
            streamer.model_rounds()
        else:
            self._rounds.run(streamer)

    def steps(self, done: Mapping[int, Sequence[Interval]]) -> Iterator[Step | None]:
        """See `Course`. A shard is claimed when the last chunk of the one before has been taken, while that one drains."""
        for number in self._claimed():
            if number is None:
                yield None
                continue
            self._rounds.give([self._plan.jobs[job] for job in self._plan.order_in(number)])
            for step in self._plan.steps_in(number, {}):
                self._chunks += 1
                yield step

    def _claimed(self) -> Iterator[int | None]:
        """Yield the shards that this process has claimed; None if all are done or claimed by others."""
        while not self._stop.is_set():
            check_failure(self._ledger)
            done = self._ledger.done()
            self._on_done({self._numbers[unit] for unit in done & self._numbers.keys()})
            left = [
                unit for unit in self._order if unit not in done and self._numbers[unit] not in self._taken
            ]
            if not left:
                return  # what is still in hand here is recorded when its last chunk has been written
            most = self._most(len(left))
            if self._in_hand > most:
                yield from self._drain(most)
                continue
            unit = self._taking.take(self._ledger, left)
            if unit is None:
                if self._ledger.about() is None:
                    raise Gone("all")  # a different process has ended the merge
                yield from self._wait()
                continue
            self._taken.add(self._numbers[unit])
            self._writer.begin(self._numbers[unit])
            if (
                self._ledger.about() is None
            ):  # it ended while this process slept: leave nothing in a finished output
                raise Gone(unit)
            yield self._numbers[unit]

    def _drain(self, most: int) -> Iterator[None]:
        """Wait until this process has no more than so many shards in hand; what is written is recorded four times a second."""
        looks = 0
        while self._in_hand > most and not self._stop.wait(_OWN_SECONDS):
            if looks % _LOOKS == 0:
                self._due.set()
            looks += 1
            yield None

    @property
    def _in_hand(self) -> int:
        """Number of shards that this process has taken and not finished."""
        return len(self._taken - self._finished)

    def _most(self, left: int) -> int:
        """Return the most shards that this process may have in hand when it takes one more of those that are left.

        They keep its threads busy while the last one drains, and no more: what it has taken, nobody else can do. The last
        shards are for those that have nothing to do.
        """
        if self._holds_sides:
            return SHARDS_AT_ONCE - 1
        processes = self._ledger.workers()
        if processes > 1 and left <= _LAST * processes:
            return 0
        each = max(1, self._chunks // max(1, len(self._taken)))
        return -(-(self._plan.budget.threads + 1) // each)

    def _wait(self) -> Iterator[None]:
        left = poll_seconds()
        while left > 0 and not self._taking.pause(min(left, _WAIT_SECONDS), self._stop):
            left -= _WAIT_SECONDS
            yield None
