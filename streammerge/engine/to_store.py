"""Execute a plan: check, resume, run and commit a merge into an object store."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from streammerge.engine.executors.base import make_executor
from streammerge.engine.merge import Options, Summary, begin, complete, make_hasher, run_sessions, summary_of
from streammerge.engine.object_session import ObjectSession, check_streamable
from streammerge.events import Control
from streammerge.output.identity import identify
from streammerge.output.object_place import check_object_target, find_finished_objects, present_in
from streammerge.output.place import place_of
from streammerge.planning.plan import MergePlan


def merge_to_store(
    plan: MergePlan,
    out: Path,
    options: Options,
    control: Control,
    card: Callable[[MergePlan], str],
    before: Callable[[MergePlan, Control], None] = lambda plan, control: None,
) -> Summary:
    """Merge into a folder of an object store, or resume there; parameters and errors are those of `execute`."""
    place = place_of(out)
    check_object_target(place, [stamp.path for stamps in plan.stamped.values() for stamp in stamps])
    check_streamable(plan, options)
    present = present_in(place)
    reader, compiling, began = begin(plan, out, options, control)
    with closing(reader):
        identity = identify(plan, reader)
        if not options.overwrite and (finished := find_finished_objects(place, identity, present)):
            return replace(complete(out, plan, finished), compile_seconds=compiling)
        before(plan, control)
        hasher = make_hasher(plan, control)
        session = ObjectSession(plan, place, identity, reader, options, control, hasher, present)
        executor = make_executor(options.executor)
        outcome = run_sessions([session], reader, executor, options, control, card, began)
        return summary_of(session, reader, outcome, began, compiling)
