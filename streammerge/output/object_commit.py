"""The end of a merge into an object store: sidecar files, the manifest, and the index or the only shard last."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from streammerge.errors import ModelError, WorldError
from streammerge.io.files import pread, reading
from streammerge.io.object_small import put_object
from streammerge.io.stamp import FileStamp, changed, check_unchanged
from streammerge.numerics.crc32 import crc32
from streammerge.output.commit import cover, listing_files, made_files, whole_manifest
from streammerge.output.identity import Identity
from streammerge.output.journal import Receipt
from streammerge.output.manifest import seal
from streammerge.output.object_shards import ObjectShards
from streammerge.output.place import Place
from streammerge.planning.plan import MergePlan

_STEP = 1 << 20


def commit_objects(
    plan: MergePlan,
    place: Place,
    writer: ObjectShards,
    receipts: Sequence[Receipt],
    identity: Identity,
    card: str,
    hashes: Mapping[str, str],
    contents: Mapping[str, str],
    check: Callable[[], None],
) -> dict[str, Any]:
    """Publish a finished merge; see `streammerge.output.commit.commit`. All shards but the one held back are there.

    Parameters
    ----------
    check
        Called before each object is written; an exception that it raises, because others have ended the merge, ends this.
    """
    chosen = cover(plan, receipts)
    made, lists = made_files(plan, card, hashes), listing_files(plan, hashes)
    written = {
        name: _copy(stamp, hashes[name], place, name, writer, check)
        for name, stamp in plan.beside.files.items()
        if name not in made and name not in lists
    }

    def put(path: Path, data: bytes) -> None:
        check()
        put_object(str(path), data)

    for name, data in made.items():
        put(place.path(name), data)
    written |= {name: (len(data), crc32(data)) for name, data in {**made, **lists}.items()}
    manifest = whole_manifest(plan, chosen, identity, written, contents)
    put(place.manifest, seal(manifest))
    for name, data in lists.items():
        put(place.path(name), data)
    if plan.layout.last is not None:
        writer.publish(plan.layout.last)
    return manifest


def _copy(
    stamp: FileStamp,
    content: str,
    place: Place,
    name: str,
    writer: ObjectShards,
    check: Callable[[], None],
) -> tuple[int, int]:
    """Copy a file into the store; return its size in bytes and its CRC-32.

    Raises
    ------
    WorldError
        If it cannot be read or written, or has changed; the object is not there then.
    """
    check()
    if not stamp.nbytes:  # an upload in parts has at least one
        put_object(str(place.path(name)), b"")
        return 0, 0
    digest, crc, position = hashlib.sha256(), 0, 0
    upload = writer.upload(name, stamp.nbytes)
    try:
        with reading(stamp.path) as (source, _):
            while data := pread(source, _STEP, position):
                digest.update(data)
                position, crc = position + len(data), crc32(data, crc)
                upload.write(data)
        if digest.hexdigest() != content:
            raise changed(stamp.path)
        upload.finish(writer.tell_remarks)
    except ModelError as error:
        check_unchanged(stamp)
        raise WorldError(f"{error}; run the same command again") from error
    finally:
        upload.give_up()
    return position, crc
