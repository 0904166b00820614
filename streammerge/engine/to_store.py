"""Execute a plan: check, resume, run and commit a merge into an object store."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from streammerge.engine.executors.base import make_executor
from streammerge.engine.joined import take_part
from streammerge.engine.merge import Options, Summary, begin, complete, make_hasher
from streammerge.engine.object_session import ObjectSession, check_streamable
from streammerge.events import Control
from streammerge.output.identity import identify
from streammerge.output.object_place import (
    check_object_target,
    clear_objects,
    find_finished_objects,
    present_in,
)
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
    make_executor(options.executor)
    place = place_of(out)
    check_object_target(place, [stamp.path for stamps in plan.stamped.values() for stamp in stamps])
    check_streamable(plan, options)
    present = present_in(place)
    begun = begin(plan, out, options, control)
    with closing(begun.reader) as reader:
        identity = identify(plan, reader)
        if not options.overwrite and (finished := find_finished_objects(place, identity, present)):
            return replace(complete(out, plan, finished), compile_seconds=begun.compiling)
        before(plan, control)
        if options.overwrite:
            clear_objects(place, present)
        hasher = make_hasher(plan, control)
        session = ObjectSession(plan, place, identity, reader, options, control, hasher)
        return take_part(session, begun, options, control, card)
