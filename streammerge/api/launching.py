"""`merge --on`: a merge shared by processes that a launcher starts."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from streammerge.api.deciding import plan
from streammerge.engine.joined import check_joinable
from streammerge.engine.merge import Summary, complete
from streammerge.engine.session import Options
from streammerge.errors import StreammergeError
from streammerge.events import Control, Event
from streammerge.io.object_waiting import listening
from streammerge.io.volumes import as_path
from streammerge.launch.base import Needs, make_launcher, parse_place
from streammerge.launch.drive import drive
from streammerge.output.finished import Finished
from streammerge.output.manifest import load_manifest
from streammerge.output.place import place_of
from streammerge.output.status import status_of
from streammerge.planning.description import describe
from streammerge.units import nbytes_of


def merge_on(
    where: str,
    config: str | os.PathLike[str],
    out: str | os.PathLike[str],
    command: Sequence[str],
    planned: Mapping[str, Any],
    options: Options,
    control: Control,
    told: Mapping[str, Any] | None = None,
) -> Summary:
    """Merge by processes that a launcher starts and keeps; return when the merge is finished.

    Parameters
    ----------
    where
        ``NAME[:N]``: a launcher, and the number of processes.
    command
        The arguments of ``streammerge`` for one process.
    planned
        The options of `plan`.
    options
        Those of the merge, to refuse what cannot be shared.
    told
        Values of the event ``plan`` in place of the plan's own.

    Raises
    ------
    StreammergeError
        As `merge` does; what is bad is refused before a process is started.
    """
    name, count = parse_place(where)
    needs = Needs(
        count, nbytes_of(planned.get("memory")), planned.get("threads"), planned.get("device", "auto")
    )
    launcher = make_launcher(name, needs)
    here = {"device": "cpu"} if launcher.elsewhere else {}  # this machine may have no GPU, and needs none
    with listening(control.warn, control.check):
        decided = plan(config, out=out, **{**planned, **here})
    place = place_of(as_path(out))
    check_joinable(decided, place, options)
    values = {**describe(decided), "out": str(out), **(told or {})}
    control.emit(Event("plan", values))
    for line in decided.warnings:
        control.warn(line)
    before = _is_finished(place.out)
    driven = drive(launcher, command, place.out, values, control)
    summary = complete(place.out, decided, Finished(load_manifest(place.out)))
    return replace(
        summary,
        already_complete=before,
        bytes_read=driven.bytes_read,
        bytes_written=driven.bytes_written,
        bytes_resumed=summary.bytes_resumed if before else 0,
        seconds=driven.seconds,
    )


def _is_finished(out: Path) -> bool:
    try:
        return status_of(out).finished
    except StreammergeError:
        return False
