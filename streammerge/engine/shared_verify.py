"""`verify --join`: several processes read a finished output, each some files, and all give the same verdict."""

from __future__ import annotations

import hashlib
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from streammerge.engine.sharing import Sharing
from streammerge.engine.taking import Claiming
from streammerge.errors import InputError, OutputError, WorldError, printable
from streammerge.io.files import read_exactly, reading
from streammerge.numerics.finite import Tally
from streammerge.output.check import Verdict, check_files, manifest_of
from streammerge.output.heartbeat import Heartbeat, signs_of
from streammerge.output.place import VERIFYING, place_of
from streammerge.output.readback import Found, Part, read_back
from streammerge.output.shared_ledger import SharedLedger
from streammerge.output.volume import Gone
from streammerge.output.working_files import working_files

_ATTEMPTS = 10
"""Times that a process begins anew after its working files were removed."""


def verify_together(out: Path, on_tick: Callable[[int], None] = lambda nbytes: None) -> Verdict:
    """Re-read a finished output together with all processes that make the same call; each returns the whole verdict.

    Raises
    ------
    StreammergeError
        As `verify` does; or if OUT cannot hold the working files.
    """
    place, manifest = place_of(out), manifest_of(out)
    if place.file is not None:
        raise InputError(
            f"{printable(out)}: --join shares out the files of a directory, and this is one file: leave it out"
        )
    with reading(str(place.manifest)) as (file, status):
        raw = read_exactly(file, status.st_size, 0, str(place.manifest))
    run = hashlib.blake2b(raw, digest_size=8).hexdigest()
    state = place.folder / VERIFYING
    moved = [0]

    def tick(nbytes: int) -> None:
        moved[0] = nbytes
        on_tick(nbytes)

    for attempt in range(_ATTEMPTS):
        time.sleep(attempt * random.random() / 10)
        # A process that begins while the last one leaves, or another begins, may have its directory removed.
        with (
            suppress(Gone),
            _ledger(state, run, lambda: {"moved": moved[0], "bytes_read": moved[0]}) as ledger,
        ):
            sharing = Sharing(ledger, ledger.worker, threading.Event(), Claiming(), lambda: None)
            return check_files(place, manifest, tick, partial(_read_shared, sharing))
    raise WorldError(f"{printable(state)}: was removed again and again; run the same command again")


@contextmanager
def _ledger(state: Path, run: str, progress: Callable[[], Mapping[str, Any]]) -> Iterator[SharedLedger]:
    """Lend the ledger of a verification; the last process to leave removes it.

    What processes have left that were killed is worth nothing: the files may have changed since.
    """
    volume = working_files(state, run)
    if not any(sign.is_fresh for sign in signs_of(volume)):
        with suppress(WorldError):  # another process does the same
            volume.clear()
    volume.prepare(run)
    heartbeat = Heartbeat(volume, volume.domain, run, progress)
    ledger = SharedLedger(volume, run, heartbeat.worker)
    ledger.found({})
    heartbeat.start()
    try:
        yield ledger
    finally:
        ledger.release()
        heartbeat.stop()
        if not any(sign.is_fresh for sign in signs_of(volume)):
            with suppress(WorldError):
                volume.clear()


def _read_shared(
    sharing: Sharing, files: Mapping[str, Sequence[Part]], on_tick: Callable[[int], None]
) -> dict[str, list[Found]]:
    """Do what `read_back` does, each file by whichever process is first."""
    names = {f"read-{i:05d}": path for i, path in enumerate(sorted(files))}

    def work(path: str) -> Mapping[str, Any]:
        found = read_back({path: files[path]}, on_tick)[path]
        return {"found": [[one.crc, one.nbytes, one.bad.count, one.bad.first] for one in found]}

    sharing.share({unit: partial(work, path) for unit, path in names.items()})
    return {path: _found(sharing.value(unit), len(files[path])) for unit, path in names.items()}


def _found(value: Mapping[str, Any], count: int) -> list[Found]:
    try:
        found = [
            Found(int(crc), int(n), Tally(int(bad), int(first))) for crc, n, bad, first in value["found"]
        ]
    except (KeyError, TypeError, ValueError):
        found = []
    if len(found) != count:
        raise OutputError(
            f"the records of the shared verification are damaged: remove {VERIFYING} and run again"
        )
    return found
