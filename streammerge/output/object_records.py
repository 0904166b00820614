"""What a merge into an object store has finished: one object with the receipts of each shard that is whole.

::

    OUT/.streammerge/run.json            what the output depends on, the files it reads, the names it may have written
    OUT/.streammerge/shard-00000.json    size, ETag and receipts of a shard; written once, after the shard itself

A record is believed if the shard still has its size and ETag.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from streammerge.checkpoint.sidecar_names import is_sound_path
from streammerge.errors import ModelError
from streammerge.io.object_upload import list_objects, put_object, read_object_bytes, remove_object
from streammerge.io.strict_json import parse_object
from streammerge.output.journal import (
    Known,
    Progress,
    Receipt,
    compare,
    known_files,
    receipt_of,
    record_of,
    texts_of,
)
from streammerge.output.object_shards import ObjectShards
from streammerge.output.place import STATE, Place
from streammerge.planning.plan import MergePlan

RUN = f"{STATE}/run.json"
_MOST_NBYTES = 1 << 28


class ObjectRecords:
    """The records of an output; see `engine.scheduler.Record`.

    Parameters
    ----------
    identity
        What the output depends on, by name.
    writer
        Tells the ETag of a shard that is whole.
    """

    def __init__(
        self, plan: MergePlan, place: Place, identity: Mapping[str, str], writer: ObjectShards
    ) -> None:
        self._plan, self._place, self._identity, self._writer = plan, place, dict(identity), writer
        self._lock = threading.Lock()
        self._unfinished: dict[int, list[Receipt]] = {}
        self.done: set[int] = set()
        """Numbers of the shards that an earlier run finished."""

    def read(self, present: Mapping[str, tuple[int, str]]) -> Progress | None:
        """Return what earlier runs have recorded, as far as the store still has it; None without a record.

        Parameters
        ----------
        present
            Size and ETag of every object of the output, by name.

        Raises
        ------
        OutputError
            If the records belong to a different merge.
        """
        run = self._parsed(RUN) if RUN in present else None
        if run is None:
            return None
        try:
            progress = Progress(texts_of(run["identity"]), files=known_files(run["files"]))
        except (KeyError, TypeError, ValueError):
            return None
        compare(self._identity, progress.identity, self._place.out)
        for number, shard in enumerate(self._plan.layout.shards):
            if _record_name(number) in present and shard.name in present:
                receipts = self._receipts_of(number, present[shard.name])
                if receipts is not None:
                    progress.receipts += receipts
                    self.done.add(number)
        return progress

    def announced(self) -> set[str]:
        """Return the names of the files that the last run may have written, whatever merge it was."""
        run = self._parsed(RUN) or {}
        names = run.get("beside")
        listed = names if isinstance(names, list) else []
        return {name for name in listed if isinstance(name, str) and is_sound_path(name)}

    def open(self, files: Mapping[str, Known], names: Collection[str]) -> None:
        """Record the beginning of a run, and the names of the files that it may write."""
        listed = {key: [known.stamp, known.content] for key, known in files.items()}
        value = {"identity": self._identity, "files": listed, "beside": sorted(names)}
        put_object(f"{self._place.out}/{RUN}", json.dumps(value).encode())

    def add(self, receipts: Sequence[Receipt]) -> None:
        """See `Record`: a shard is recorded when all its elements are written and the store has it whole."""
        slots = self._plan.layout.slots
        with self._lock:
            for receipt in receipts:
                self._unfinished.setdefault(slots[receipt.job][0].shard, []).append(receipt)
            whole = [
                number
                for number in self._unfinished
                if number in self._writer.e_tags and self._covers(number)
            ]
            for number in whole:
                shard = self._plan.layout.shards[number]
                done = [record_of(receipt) for receipt in self._unfinished.pop(number)]
                value = {"nbytes": shard.nbytes, "e_tag": self._writer.e_tags[number], "receipts": done}
                put_object(f"{self._place.out}/{_record_name(number)}", json.dumps(value).encode())

    def add_answers(self, answers: Mapping[str, Any]) -> None:
        """See `Record`: statistics are computed again by a run that resumes."""

    def remove(self) -> None:
        """Remove all records, since the merge is complete; the first to be written goes last."""
        remove_records(str(self._place.out))

    def _covers(self, number: int) -> bool:
        """Return whether the receipts at hand cover a shard."""
        jobs = {job for job, _ in self._plan.layout.shards[number].parts}
        elements = dict.fromkeys(jobs, 0)
        seen: set[tuple[int, int, int]] = set()
        for receipt in self._unfinished[number]:
            if (key := (receipt.job, receipt.start, receipt.stop)) not in seen:
                seen.add(key)
                elements[receipt.job] += receipt.stop - receipt.start
        met = {job for job, _, _ in seen}
        return met == jobs and all(n == self._plan.jobs[job].n_elements for job, n in elements.items())

    def _receipts_of(self, number: int, found: tuple[int, str]) -> list[Receipt] | None:
        """Return the receipts of a shard that the store has as it was recorded; None if it must be written again."""
        record = self._parsed(_record_name(number))
        try:
            if record is None or (record["nbytes"], record["e_tag"]) != found:
                return None
            receipts = [receipt_of(one) for one in record["receipts"]]
        except (KeyError, TypeError, ValueError):
            return None
        self._unfinished[number] = receipts
        try:
            return (
                receipts
                if found[0] == self._plan.layout.shards[number].nbytes and self._covers(number)
                else None
            )
        except KeyError:
            return None
        finally:
            del self._unfinished[number]

    def _parsed(self, name: str) -> dict[str, Any] | None:
        raw = read_object_bytes(f"{self._place.out}/{name}", _MOST_NBYTES)
        if raw is not None:
            with suppress(ModelError):
                return parse_object(raw, name, "the record", "finite")
        return None


def remove_records(out: str) -> None:
    """Remove all records of an output; that of its beginning goes last, so that it counts as unfinished until then."""
    names: Iterable[str] = list_objects(f"{out}/{STATE}", 100_000)
    run = RUN.rpartition("/")[2]
    for name in sorted(names, key=lambda name: (name == run, name)):
        remove_object(f"{out}/{STATE}/{name}")


def _record_name(number: int) -> str:
    return f"{STATE}/shard-{number:05}.json"
