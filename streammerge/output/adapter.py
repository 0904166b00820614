"""The end of a merge into an adapter: what it takes of the file of factors is copied, and published.

Both are files of the output's folder: the file of factors under a temporary name, which is removed in the end.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from streammerge.checkpoint.weight_names import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from streammerge.io.durable import fsync_directory, world_errors, write_file, write_fully
from streammerge.io.reader import Reader
from streammerge.output.adapter_cut import Cut
from streammerge.output.identity import Identity
from streammerge.output.journal import Receipt
from streammerge.output.manifest import seal
from streammerge.output.place import Place
from streammerge.output.shards import ShardWriter
from streammerge.planning.plan import MergePlan


def commit_adapter(
    plan: MergePlan,
    place: Place,
    writer: ShardWriter,
    reader: Reader,
    receipts: Sequence[Receipt],
    identity: Identity,
    card: str,
    contents: Mapping[str, str],
) -> dict[str, Any]:
    """Publish a finished adapter; its config.json gets its name when all else is durable.

    Parameters
    ----------
    reader
        Reads the base, with which whole tensors are compared.
    contents
        The content hashes of those input files that were hashed.

    Returns the manifest. After an interruption at any point, running it again gives the same bytes.

    Raises
    ------
    EmptyAdapterError
        If no matrix differs from the base's; nothing of it is kept then.
    """
    cut = Cut(plan, partial(writer.read, 0), reader, place)
    _write(cut, place)
    made = cut.made(card)
    for name in made.keys() - {ADAPTER_CONFIG}:
        write_file(place.path(name), made[name], place.private(name))
    manifest = cut.manifest(made, receipts, identity, contents)
    write_file(place.manifest, seal(manifest), place.private(place.manifest.name))
    with world_errors(place.path(ADAPTER_WEIGHTS)):
        os.replace(place.private(ADAPTER_WEIGHTS), place.path(ADAPTER_WEIGHTS))
        fsync_directory(place.folder)
    write_file(place.path(ADAPTER_CONFIG), made[ADAPTER_CONFIG], place.private(ADAPTER_CONFIG))
    with world_errors(place.out):
        fsync_directory(place.folder)
        for shard in plan.layout.shards:
            place.partial(shard.name).unlink()
        fsync_directory(place.folder)
    return manifest


def _write(cut: Cut, place: Place) -> None:
    """Write the adapter's file of weights, under its temporary name."""
    path = place.private(ADAPTER_WEIGHTS)
    with world_errors(place.path(ADAPTER_WEIGHTS)):
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
        descriptor = os.open(path, flags, 0o666)
        try:
            for data in cut.data():
                write_fully(descriptor, data)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
