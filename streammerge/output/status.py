"""How far a merge into an output is, and who works on it, from its working files alone."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from streammerge.errors import OutputError, printable
from streammerge.io import volumes
from streammerge.output.heartbeat import Sign, signs_of
from streammerge.output.joining import COMMIT, SHARD, runs_in
from streammerge.output.manifest import read_manifest
from streammerge.output.place import place_of
from streammerge.output.working_files import working_files
from streammerge.records import dataclass


@dataclass(frozen=True)
class AtWork:
    """One process that has worked on an output and has not taken leave."""

    sign: Sign
    units: tuple[str, ...]
    """What it has in hand."""

    @property
    def is_alive(self) -> bool:
        """Whether it counts as alive: it gave a sign of life lately, and has not ended since so far as can be told."""
        return self.sign.is_fresh and not self.sign.has_ended


@dataclass(frozen=True)
class Status:
    """How far a merge is."""

    out: str
    finished: bool
    """Whether the output holds a finished merge, and no unfinished one."""
    shared: bool
    """Whether several processes share the merge."""
    shards: int
    """Number of shards; 0 if it is not known, as for a merge that works alone."""
    shards_done: int
    nbytes: int
    nbytes_done: int
    """Bytes of all shards, and of those that are done."""
    stage: str
    """``statistics``, ``shards`` or ``commit``."""
    failure: str
    """The message of a failure that has stopped all processes."""
    workers: tuple[AtWork, ...]


def status_of(out: Path) -> Status:
    """Return how far a merge is; this changes nothing and disturbs nobody.

    Raises
    ------
    OutputError
        If the output holds no merge.
    """
    place = place_of(out)
    place.look_anew()
    runs = runs_in(place)
    unfinished = bool(runs) if volumes.is_url(out) else place.is_unfinished
    finished = read_manifest(out) is not None and not unfinished
    if not finished and not unfinished:
        raise OutputError(f"{printable(out)}: no merge has begun here")
    signs = signs_of(working_files(place.state))
    if not runs:
        nobody = tuple(AtWork(sign, ()) for sign in signs)
        return Status(os.fspath(out), finished, False, 0, 0, 0, 0, "", "", nobody)
    ledger = runs[-1][0]
    sizes = _sizes((ledger.about() or {}).get("shards"))
    done, claimed = ledger.done(), ledger.claimed()
    ready = [i for i in range(len(sizes)) if f"{SHARD}{i:05d}" in done]
    counting = any(not unit.startswith((SHARD, COMMIT)) for unit in claimed)
    failure = ledger.failure()
    return Status(
        os.fspath(out),
        finished,
        True,
        len(sizes),
        len(ready),
        sum(sizes),
        sum(sizes[i] for i in ready),
        "statistics" if counting else "commit" if len(ready) == len(sizes) else "shards",
        "" if failure is None else failure[1],
        tuple(AtWork(sign, _units_of(sign, claimed)) for sign in signs),
    )


def _sizes(told: Any) -> list[int]:
    if not isinstance(told, Sequence):
        return []
    return [int(one[1]) for one in told if isinstance(one, list) and len(one) == 2 and type(one[1]) is int]


def _units_of(sign: Sign, claimed: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(unit for unit, owner in claimed.items() if owner == sign.worker)
