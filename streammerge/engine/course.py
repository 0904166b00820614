"""What a run does, and in which order: everything alone, or what it claims of a merge that several processes share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

from streammerge.engine.streaming import Streamer
from streammerge.planning.plan import MergePlan
from streammerge.planning.schedule import Interval, Step


class Course(Protocol):
    """Decides what this process does."""

    def begin(self, streamer: Streamer) -> None:
        """Compute what must be known before the first chunk: statistics of the whole model."""

    def steps(self, done: Mapping[int, Sequence[Interval]]) -> Iterator[Step | None]:
        """Yield the steps to run; None, at most four times a second, if there is none at the moment.

        `done` has the finished elements of each job.
        """


class Alone:
    """All steps of a plan, in file order."""

    def __init__(self, plan: MergePlan) -> None:
        self._plan = plan

    def begin(self, streamer: Streamer) -> None:
        """See `Course`."""
        streamer.model_rounds()

    def steps(self, done: Mapping[int, Sequence[Interval]]) -> Iterator[Step | None]:
        """See `Course`."""
        return self._plan.steps(done)
