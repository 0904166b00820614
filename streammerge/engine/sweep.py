"""Merge several points of a sweep from one read of their inputs."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from streammerge.engine.executors.base import make_executor
from streammerge.engine.merge import make_hasher, run_sessions
from streammerge.engine.opening import open_reader, with_stages
from streammerge.engine.session import Options, Session
from streammerge.errors import BudgetError, InputError
from streammerge.events import Control
from streammerge.io.reader import Reader
from streammerge.machine import share_out
from streammerge.output.directory import check_contents, locked
from streammerge.output.finished import find_finished
from streammerge.output.identity import Digests, Identity, identify
from streammerge.output.place import place_of
from streammerge.planning.joint import joined, like
from streammerge.planning.plan import MergePlan
from streammerge.records import dataclass
from streammerge.timing import Stages


@dataclass(frozen=True)
class Merged:
    """What merging a batch took."""

    seconds: float
    bytes_read: int
    bytes_written: int
    stages: Stages


def identify_alone(plan: MergePlan, known: Digests) -> Identity:
    """Return the identity of a plan; digests of inputs that are `known` are not read again."""
    reader = with_stages(Reader(), plan)
    try:
        return identify(plan, reader, known)
    finally:
        reader.close()


def is_finished(plan: MergePlan, out: Path, identity: Identity, control: Control) -> bool:
    """Return whether a directory holds the finished output of a plan; end an interrupted commit.

    Raises
    ------
    OutputError
        If it holds anything else.
    """
    if not out.exists():
        return False
    place = place_of(out)
    with locked(place):
        check_contents(place)
        return find_finished(place, plan, identity, None, control) is not None


def together(plans: Mapping[str, MergePlan], most: int) -> dict[str, MergePlan]:
    """Return the first of some plans with as many others as can be merged from the same reads in its memory.

    Parameters
    ----------
    plans
        The plans by the names of their points.
    most
        The most plans, at least one.
    """
    names = list(plans)
    first = plans[names[0]]
    if first.grams:
        most = 1  # the operators of every point would have to be held at a time
    shared = {name: first if name == names[0] else like(first, plan) for name, plan in plans.items()}
    chosen = [(name, plan) for name, plan in shared.items() if plan is not None][:most]
    low, high = 1, len(chosen)
    while low < high:  # the largest number that fits
        middle = (low + high + 1) // 2
        low, high = (middle, high) if _fit([plan for _, plan in chosen[:middle]]) else (low, middle - 1)
    fitting = joined([plan for _, plan in chosen[:low]])
    return dict(zip((name for name, _ in chosen), fitting, strict=False))


def _fit(plans: Sequence[MergePlan]) -> bool:
    """Return whether some plans fit the memory, and the files that a process may open, at a time."""
    try:
        first = joined(plans)[0]
        share_out(len(plans) * (len(first.layout.shards) + 1), first.budget.workers)
    except (BudgetError, InputError):
        return False
    return True


def merge_together(
    plans: Mapping[Path, MergePlan],
    known: Digests,
    options: Options,
    control: Control,
    card: Callable[[MergePlan], str],
) -> Merged:
    """Merge plans that `together` returned into their directories; or resume there.

    Raises
    ------
    StreammergeError
        See `streammerge.errors`; finished work stays durable for the next run.
    """
    began = time.monotonic()
    first = next(iter(plans.values()))
    reader = open_reader(first, options.io, tolerant=options.nonfinite == "warn", outputs=len(plans))
    hasher = make_hasher(first, control)
    sessions = []
    try:
        with ExitStack() as held:
            for out, plan in plans.items():
                place = place_of(out)
                identity = identify(plan, reader, known)
                held.enter_context(locked(place))
                check_contents(place)
                session = Session(plan, place, identity, reader, options, control, hasher)
                session.worker.label = out.name
                sessions.append(session)
            run_sessions(sessions, reader, make_executor("threads"), options, control, card, began)
    finally:
        reader.close()
    worker = sessions[0].worker
    written = sum(session.worker.writer.bytes_written for session in sessions)
    return Merged(time.monotonic() - began, reader.bytes_read, written, worker.stages)
