"""What processes that shared a merge have left to one that goes on with it alone."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress

from streammerge.io.durable import fsync_directory, world_errors
from streammerge.output.identity import Identity
from streammerge.output.joining import (
    ShardDone,
    discard_runs,
    known_of,
    runs_in,
    shard_done,
    shard_unit,
)
from streammerge.output.journal import Known, Receipt, compare
from streammerge.output.place import Place
from streammerge.output.shared_ledger import SharedLedger, run_of
from streammerge.output.volume import Folder
from streammerge.planning.layout import Layout
from streammerge.records import dataclass


@dataclass(frozen=True)
class LeftByRun:
    """The finished shards of a shared merge whose processes have ended."""

    files: Mapping[str, Known]
    """The input files."""
    shards: Mapping[int, ShardDone]

    @property
    def receipts(self) -> list[Receipt]:
        """The receipts of all finished shards."""
        return [receipt for shard in self.shards.values() for receipt in shard.receipts]

    def take(self, place: Place, layout: Layout) -> None:
        """Give the shards the names that they have in a merge which works alone, and remove the run."""
        for number, shard in self.shards.items():
            name = layout.shards[number].name
            source, target = place.path(shard.written.name), place.partial(name)
            with world_errors(target), suppress(FileNotFoundError):
                if source not in (target, place.path(name)):
                    os.replace(source, target)
                    fsync_directory(target.parent)
        discard_runs(place)


def left_by_run(place: Place, identity: Identity, layout: Layout) -> LeftByRun | None:
    """Return what a shared merge with the same identity has left; None if there was none.

    Raises
    ------
    OutputError
        If there was one with a different identity.
    """
    run = run_of(identity.public)
    for _, named in runs_in(place, but=run):
        compare(identity.named, named, place.out)
    ledger = SharedLedger(Folder(place.state), run, "")
    told = ledger.about()
    if told is None:
        return None
    units, found = ledger.done(), {}
    for number, shard in enumerate(layout.shards):
        done = shard_done(ledger.value(shard_unit(number))) if shard_unit(number) in units else None
        if done is not None and done.written.lies_in(place.folder, shard.name):
            found[number] = done
    return LeftByRun(known_of(told, place), found)
