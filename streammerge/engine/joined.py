"""A merge that several processes share: `merge CONFIG OUT --join`, on any hosts that see OUT and the models.

::

    enter     the same merge as the others? else refused by name
    steps     claim a shard ──> read, merge, write into a file of its own ──> sync ──> record
    commit    all shards are recorded: one process gives the files their names, and writes the manifest and the index

Nothing relies on a lock or a claim: two processes that do the same write equal bytes into two files, and one of them is
named in the record. A process that dies loses its shard, which a different one takes over.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from streammerge.engine.executors.base import make_executor
from streammerge.engine.joined_session import JoinedSession, ended
from streammerge.engine.merge import Begun, Summary, begin, complete, make_hasher, run_sessions, summary_of
from streammerge.engine.session import Options
from streammerge.errors import InputError, OutputError, Stopped, StreammergeError, printable
from streammerge.events import Control
from streammerge.io.allocate import check_space
from streammerge.output.directory import check_contents, check_target, joined
from streammerge.output.finished import Finished, find_finished
from streammerge.output.identity import identify
from streammerge.output.joining import (
    is_remains,
)
from streammerge.output.place import Place, place_of
from streammerge.output.shared_ledger import run_of
from streammerge.output.volume import Gone
from streammerge.planning.plan import MergePlan

_END_SECONDS, _END_CHECKS = 0.1, 20
"""Seconds between looks, and their number, at a merge whose working files are being removed."""


def join(
    plan: MergePlan,
    out: Path,
    options: Options,
    control: Control,
    card: Callable[[MergePlan], str],
    before: Callable[[MergePlan, Control], None] = lambda plan, control: None,
) -> Summary:
    """Take part in a merge into `out`, or begin it; return when it is finished, by whomever.

    Parameters
    ----------
    card, before
        As in `execute`.

    Raises
    ------
    StreammergeError
        See `streammerge.errors`; what is finished stays, and the claims of this process are given up.
    CannotCompileError
        If the kernels cannot be compiled, before anything is created; plan without them.
    """
    place = place_of(out)
    check_joinable(plan, place, options)
    check_target(place, plan.inputs, [index.reference for index in plan.fishers])
    reader, compiling, began = begin(plan, out, options, control)
    with closing(reader):
        identity = identify(plan, reader)
        run = run_of(identity.public)
        if not out.exists():
            check_space(out, plan.layout.sizes, place.paths)
        with joined(place):
            _check_contents(place)
            hasher = make_hasher(plan, control)
            for _ in range(_END_CHECKS):  # the others may be at the very end
                if not (remains := place.is_unfinished and is_remains(place, identity, run)):
                    break
                time.sleep(_END_SECONDS)
            if (remains or not place.is_unfinished) and (
                finished := find_finished(
                    place, plan, identity, hasher if options.hash_inputs else None, control
                )
            ):
                return replace(complete(out, plan, finished), compile_seconds=compiling)
            before(plan, control)
            session = JoinedSession(plan, place, identity, reader, options, control, hasher)
            return take_part(session, Begun(reader, compiling, began), options, control, card)


def take_part(
    session: JoinedSession, begun: Begun, options: Options, control: Control, card: Callable[[MergePlan], str]
) -> Summary:
    """Do the part of one process; return when the merge is finished, by whomever.

    Raises
    ------
    StreammergeError
        As `join`.
    """
    plan, place, identity = session.plan, session.place, session.identity
    reader, compiling, began = begun
    try:
        outcome = run_sessions([session], reader, make_executor("threads"), options, control, card, began)
    except (Gone, StreammergeError) as error:
        manifest = None if isinstance(error, Stopped | InputError) else ended(place, identity)
        if manifest is None:
            raise _told(error, place, session) from error
        return replace(
            complete(place.out, plan, Finished(manifest)),
            already_complete=False,  # others have ended it while this process was at work
            bytes_read=reader.bytes_read,
            bytes_written=session.worker.writer.bytes_written,
            bytes_resumed=0,
            seconds=time.monotonic() - began,
            compile_seconds=compiling,
        )
    return summary_of(session, reader, outcome, began, compiling)


def _told(error: Exception, place: Place, session: JoinedSession) -> Exception:
    """Return the error for the user; tell the other processes of one that they would meet too."""
    if isinstance(error, Gone):
        return OutputError(
            f"{printable(place.out)}: the shared merge there was discarded meanwhile: this process is stopped"
        )
    if isinstance(error, InputError):
        session.fail(error)
    return error


class NotSharedError(InputError):
    """Several processes cannot share this merge; one can run it."""


def check_joinable(plan: MergePlan, place: Place, options: Options) -> None:
    """Refuse a merge that several processes cannot share.

    Raises
    ------
    NotSharedError
        The message names the reason and the cure.
    """
    if options.overwrite:
        raise NotSharedError(
            "--join with --overwrite: each process would discard what the others have done: discard it once, by "
            "`merge --overwrite` without --join or by removing OUT, then join"
        )
    if place.file is not None:
        raise NotSharedError(
            f"{printable(place.out)}: --join and --on share out the shards of a directory, and one file is one shard: "
            "leave the option out, or give a directory"
        )
    if plan.adapter is not None:
        raise NotSharedError(
            "output: lora: --join and --on share out shards, and an adapter is one file: leave the option out"
        )


def _check_contents(place: Place) -> None:
    try:
        check_contents(place)
    except OutputError:
        if not place.is_unfinished:  # else a different process has begun since
            raise
