"""Execute a plan: check, resume, run and commit a merge into an object store.

When an upload breaks off, its parts are gone, and nothing of its shard is kept elsewhere. The attempt ends, and the next one
goes on from the shards that are whole, as the same command would, but in the same process.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from streammerge.engine.executors.base import make_executor
from streammerge.engine.joined import take_part
from streammerge.engine.merge import Begun, Options, Summary, begin, complete, make_hasher
from streammerge.engine.object_session import ObjectSession, check_streamable
from streammerge.engine.opening import open_reader
from streammerge.errors import StreammergeError
from streammerge.events import Control
from streammerge.io.object_errors import AGAIN
from streammerge.io.object_upload import UploadLostError
from streammerge.io.reader import Reader
from streammerge.output.identity import identify
from streammerge.output.object_place import (
    check_object_target,
    clear_objects,
    find_finished_objects,
    present_in,
)
from streammerge.output.place import place_of
from streammerge.planning.plan import MergePlan

_MOST_LOSSES = 10
"""Uploads that may break off in a row, while this process finishes no shard."""


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

        def session_of(reader: Reader, control: Control) -> ObjectSession:
            return ObjectSession(plan, place, identity, reader, options, control, hasher)

        return _until_whole(session_of, begun, options, control, card)


def _until_whole(
    session_of: Callable[[Reader, Control], ObjectSession],
    begun: Begun,
    options: Options,
    control: Control,
    card: Callable[[MergePlan], str],
) -> Summary:
    """Do the part of this process; once more whenever an upload has broken off."""
    reader, began = begun.reader, begun.began
    session: ObjectSession | None = None
    losses, resumed = 0, None
    while True:
        part = control.part(control.emit)  # a failure stops the threads of its attempt, and no others
        reader.stop = part.stop
        with closing(reader):
            following = session_of(reader, part)
            if session is not None:
                following.go_on_from(session)
            session = following
            try:
                done = take_part(session, Begun(reader, begun.compiling, began), options, part, card)
                return replace(
                    done,
                    bytes_resumed=done.bytes_resumed if resumed is None else resumed,
                    seconds=time.monotonic() - begun.began,
                )
            except UploadLostError as error:
                losses = 0 if session.has_finished_some else losses + 1
                session.look()
                control.check()
                if losses == _MOST_LOSSES:
                    raise
                why = str(error).removesuffix(AGAIN).rstrip("; :")
                control.warn(f"{why}; its upload broke off, and it is merged again")
            except StreammergeError:
                control.check()  # who stops the command while it waits for the store has not met a failure
                raise
        resumed = session.resumed if resumed is None else resumed
        reader, began = _reader_like(reader, session, options), time.monotonic()


def _reader_like(before: Reader, session: ObjectSession, options: Options) -> Reader:
    """Return a new reader for the next attempt, whose stages have the identities that are known."""
    reader = open_reader(session.plan, options.io, tolerant=options.nonfinite == "warn")
    reader.bytes_read = before.bytes_read
    if reader.computes is not None:
        reader.computes.adopt(session.worker.spec.stages)
    return reader
