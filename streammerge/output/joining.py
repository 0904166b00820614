"""Several processes enter one output to share a merge, and the last one leaves it finished.

A process that enters finds out whether the others do the same merge. It refuses a different one, and one that works alone
elsewhere; what such a merge has finished and left counts as done.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from typing import Any

from streammerge.errors import OutputError, StreammergeError, printable
from streammerge.output.directory import sweep, sweep_shards
from streammerge.output.heartbeat import Heartbeat, signs_of
from streammerge.output.identity import Identity
from streammerge.output.inputs import ContentHasher, InputFile, recognize
from streammerge.output.journal import (
    Known,
    Receipt,
    compare,
    known_files,
    receipt_of,
    record_of,
    remove_state,
    texts_of,
)
from streammerge.output.manifest import read_manifest
from streammerge.output.own_shards import Written
from streammerge.output.place import JOURNAL, RUN, Place
from streammerge.output.presence import taken_by
from streammerge.output.shared_ledger import SharedLedger, run_of
from streammerge.output.volume import Gone
from streammerge.output.working_files import working_files
from streammerge.records import dataclass

_ATTEMPTS = 50
"""Times that a directory is emptied while others still put signs of life into it."""


SHARD = "merge-"
"""The beginning of the names of the units that are shards."""


def shard_unit(number: int) -> str:
    """Return the name of the unit that is one shard."""
    return f"{SHARD}{number:05d}"


COMMIT = "commit"
"""The name of the unit that ends a shared merge."""


@dataclass(frozen=True)
class Entered:
    """A shared merge that this process takes part in."""

    ledger: SharedLedger
    heartbeat: Heartbeat
    known: dict[str, Known]
    """Stamps and content hashes of the input files, as the first process told them."""


def enter(
    place: Place,
    identity: Identity,
    about: Callable[[], Mapping[str, Any]],
    files: Sequence[InputFile],
    hasher: ContentHasher,
    progress: Callable[[], Mapping[str, Any]],
) -> Entered:
    """Take part in a shared merge, or begin it.

    Parameters
    ----------
    about
        Returns what a first process tells the others: at least ``files``.
    progress
        See `Heartbeat`.

    Raises
    ------
    OutputError
        If the output holds or others write a different merge, or the inputs are different ones.
    """
    run = run_of(identity.public)
    check_others(place, identity, run)
    volume = working_files(place.state, run)
    volume.prepare(run)
    heartbeat = Heartbeat(volume, volume.domain, run, progress)
    ledger = SharedLedger(volume, run, heartbeat.worker)
    told = ledger.about()
    is_new = told is None
    try:
        if told is None:
            if is_remains(place, identity, run):  # the others have ended the merge since this process began
                raise Gone(run)
            told = ledger.found({"identity": identity.named, **about()})
        heartbeat.start()
        check_others(place, identity, run)  # who began at the same moment is seen by one of both
        what = f"{printable(place.out)}: holds an unfinished merge"
        known = recognize(files, known_of(told, place), hasher, what)
    except BaseException:
        heartbeat.stop()
        if is_new and not any(sign.run == run for sign in signs_of(volume)):
            with suppress(StreammergeError):
                volume.remove(f"{run}/{RUN}")
        volume.leave(run)
        raise
    ledger.forget_failure()
    return Entered(ledger, heartbeat, known)


def is_remains(place: Place, identity: Identity, run: str) -> bool:
    """Return whether a merge is finished, and only the removal of its working files is not."""
    volume = working_files(place.state)
    if volume.exists(JOURNAL) or volume.exists(f"{run}/{RUN}"):
        return False
    place.look_anew()
    manifest = read_manifest(place.out)
    return manifest is not None and not identity.changed(manifest["identity"])


def known_of(told: Mapping[str, Any], place: Place) -> dict[str, Known]:
    """Return the input files of a shared merge.

    Raises
    ------
    OutputError
        If they cannot be read.
    """
    try:
        return known_files(told["files"])
    except (KeyError, ValueError, TypeError):
        raise OutputError(
            f"{printable(place.state)}: is damaged: start over with --overwrite, without --join"
        ) from None


def check_others(place: Place, identity: Identity, run: str) -> None:
    """Refuse an output with a different merge, finished or not, or one that works alone on a different host.

    Raises
    ------
    OutputError
        If there is one; the message names what differs, or the host.
    """
    place.look_anew()
    manifest = read_manifest(place.out)
    if manifest is not None and (changed := identity.changed(manifest["identity"])):
        raise OutputError(
            f"{printable(place.out)}: holds a finished merge with a different {printable(', '.join(changed[:3]))}: choose "
            "a different OUT, or replace it with --overwrite, without --join"
        )
    for _, named in runs_in(place, but=run):
        compare(identity.named, named, place.out)
    volume = working_files(place.state)
    if volume.exists(""):
        for sign in signs_of(volume, outside=volume.domain):
            if sign.is_fresh and not sign.run:
                raise OutputError(taken_by(place, sign))


def runs_in(place: Place, but: str = "") -> list[tuple[SharedLedger, dict[str, str]]]:
    """Return the shared merges that an output holds, each with its identity; runs that tell nothing are left out."""
    volume, found = working_files(place.state), []
    for name in (run for run in volume.runs() if run != but):
        ledger = SharedLedger(volume, name, "")
        with suppress(KeyError, ValueError):
            found.append((ledger, texts_of((ledger.about() or {})["identity"])))
    return found


# --- records of shards


def shard_record(written: Written, receipts: Sequence[Receipt], lines: Sequence[str]) -> dict[str, Any]:
    """Return the record of a finished shard.

    Parameters
    ----------
    lines
        What the user should know of it.
    """
    file = [written.name, written.nbytes, written.mtime, *([written.e_tag] if written.e_tag else [])]
    return {"file": file, "receipts": [record_of(receipt) for receipt in receipts], "lines": list(lines)}


@dataclass(frozen=True)
class ShardDone:
    """The record of a finished shard."""

    written: Written
    receipts: tuple[Receipt, ...]
    lines: tuple[str, ...]


def shard_done(value: Mapping[str, Any] | None) -> ShardDone | None:
    """Return a record of a finished shard; None if it is not one."""
    try:
        assert value is not None
        name, nbytes, mtime, *e_tag = value["file"]
        receipts = tuple(receipt_of(record) for record in value["receipts"])
        written = Written(str(name), int(nbytes), float(mtime), *map(str, e_tag))
        return ShardDone(written, receipts, tuple(map(str, value["lines"])))
    except (AssertionError, KeyError, TypeError, ValueError):
        return None


# --- the end


def close_down(place: Place, run: str, written: Collection[str], shards: Collection[str]) -> None:
    """Remove what the processes of a committed merge left, and then its ledger. Doing it twice does no harm.

    Parameters
    ----------
    written, shards
        Names of all files of the output, and of its shards.
    """
    sweep_shards(place, shards, run)
    sweep(place, written)
    for _ in range(_ATTEMPTS):
        try:
            remove_state(place)
            return
        except Exception:
            if not place.state.exists():
                return
            time.sleep(0.02)
    remove_state(place)


def left_by_runs(place: Place) -> set[str]:
    """Return the paths of files, other than shards, that shared merges may have written to an output."""
    found: set[str] = set()
    for ledger, _ in runs_in(place):
        beside = (ledger.about() or {}).get("beside", [])
        found |= {name for name in beside if isinstance(name, str)} if isinstance(beside, list) else set()
    return found


def discard_runs(place: Place) -> None:
    """Remove the ledgers of all shared merges of an output."""
    volume = working_files(place.state)
    for run in volume.runs():
        volume.discard(run)
