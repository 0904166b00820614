"""Read a shard of an unfinished output back from its store, and compare it with what was recorded of it."""

from __future__ import annotations

from collections.abc import Sequence

from streammerge.errors import StreammergeError
from streammerge.io import volumes
from streammerge.numerics.crc32 import crc32
from streammerge.output.commit import tensor_crcs
from streammerge.output.journal import Receipt
from streammerge.output.readback import Part, read_back
from streammerge.planning.plan import MergePlan


def is_as_received(plan: MergePlan, url: str, number: int, receipts: Sequence[Receipt]) -> bool:
    """Return whether every tensor of the shard at a URL has the checksum of its receipts; the whole shard is read."""
    shard, own = plan.layout.shards[number], dict[int, list[Receipt]]()
    for receipt in sorted(receipts, key=lambda one: one.start):
        own.setdefault(receipt.job, []).append(receipt)
    parts, expected = [Part("header", 0, len(shard.header))], [crc32(shard.header)]
    for job, i in shard.parts:
        slot = plan.layout.slots[job][i]
        parts.append(Part(plan.jobs[job].name, slot.offset, slot.nbytes))
        expected.append(tensor_crcs(plan, own[job])[i])
    volumes.forget(url)
    try:
        found = read_back({url: parts})[url]
    except StreammergeError:
        return False
    return [one.crc for one in found] == expected
