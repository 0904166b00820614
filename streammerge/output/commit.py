"""The end of a merge: write sidecar files and the manifest, give final names, and write the index last."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from streammerge.checkpoint.index import TensorIndex
from streammerge.checkpoint.weight_names import PIPELINE
from streammerge.io.durable import fsync_directory, make_folders, world_errors, write_file
from streammerge.numerics.crc32 import combine_all, crc32
from streammerge.output.identity import Identity
from streammerge.output.inputs import content_of
from streammerge.output.journal import Receipt
from streammerge.output.manifest import FORMAT, indented, seal
from streammerge.output.place import CONFIG_COPY, Place
from streammerge.output.sidecars import copy_sidecar, read_sidecar
from streammerge.planning.files.config_json import spelled
from streammerge.planning.files.origins import origins_of
from streammerge.planning.layout import folder_of
from streammerge.planning.plan import MergePlan
from streammerge.tensors.encoders.base import Stored
from streammerge.version import __version__


class Publishes(Protocol):
    """Gives finished shards their final names."""

    def publish(self, shard: int) -> None:
        """Make a shard durable and give it its final name."""


def commit(
    plan: MergePlan,
    place: Place,
    writer: Publishes,
    receipts: Sequence[Receipt],
    identity: Identity,
    card: str,
    hashes: Mapping[str, str],
    contents: Mapping[str, str],
) -> dict[str, Any]:
    """Publish a finished merge. The index, single shard or component list gets its name when all else is durable.

    Parameters
    ----------
    hashes
        SHA-256 of every sidecar file when the merge began, by its path in the output.
    contents
        The content hashes of those input files that were hashed.

    Returns the manifest. After an interruption at any point, running it again gives the same bytes.
    """
    chosen = cover(plan, receipts)
    made = made_files(plan, card, hashes)
    lists = listing_files(plan, hashes)
    written = {
        name: copy_sidecar(stamp, hashes[name], place.folder, name)
        for name, stamp in plan.beside.files.items()
        if name not in made and name not in lists
    }
    for name, data in made.items():
        make_folders(place.folder, name)
        write_file(place.path(name), data, place.private(name))
    for folder in {place.path(name).parent for name in (*written, *made)} - {place.folder}:
        with world_errors(folder):
            fsync_directory(folder)
    written |= {name: (len(data), crc32(data)) for name, data in {**made, **lists}.items()}
    manifest = whole_manifest(plan, chosen, identity, written, contents)
    for shard in (one for one in range(len(plan.layout.shards)) if one != plan.layout.last):
        writer.publish(shard)
    write_file(place.manifest, seal(manifest), place.private(place.manifest.name))
    with world_errors(place.out):
        fsync_directory(place.folder)
    for name, data in lists.items():
        write_file(place.path(name), data, place.private(name))
        with world_errors(place.out):
            fsync_directory(place.path(name).parent)
    if plan.layout.last is not None:
        writer.publish(plan.layout.last)
    with world_errors(place.out):
        fsync_directory(place.folder)
    return manifest


def whole_manifest(
    plan: MergePlan,
    chosen: Mapping[int, Sequence[Receipt]],
    identity: Identity,
    written: Mapping[str, tuple[int, int]],
    contents: Mapping[str, str],
) -> dict[str, Any]:
    """Return the manifest of a merge whose sidecar files have been `written`: size and checksum, by name."""
    tensors = {job.ordinal: tensor_crcs(plan, chosen[job.ordinal]) for job in plan.jobs}
    files = {**_shards(plan, tensors), **written}
    return manifest_of(plan, chosen, identity, files, _tensors(plan, tensors), contents)


def listing_files(plan: MergePlan, hashes: Mapping[str, str]) -> dict[str, bytes]:
    """Return the indexes and the list of components, which are written last."""
    return {name: _index(plan, name) for name in plan.layout.indexes} | _pipeline(plan, hashes)


def made_files(plan: MergePlan, card: str, hashes: Mapping[str, str]) -> dict[str, bytes]:
    """Return the sidecar files that are made, not copied."""
    made: dict[str, bytes] = {}
    if plan.layout.single_file:
        return made
    if plan.tokenizer is not None:
        made |= plan.tokenizer.changed
    for name in plan.settings.keys() & plan.beside.files.keys():
        made[name] = spelled(plan.settings[name], read_sidecar(plan.beside.files[name], hashes[name]))
    if "model card" not in plan.left_out:
        made["README.md"] = card.encode()
    return made | {CONFIG_COPY: plan.config.text.encode("utf-8", "surrogatepass")}


def cover(plan: MergePlan, receipts: Sequence[Receipt]) -> dict[int, list[Receipt]]:
    """Return, per job, receipts that cover all its elements in order."""
    longest: dict[tuple[int, int], Receipt] = {}
    for receipt in receipts:
        key = (receipt.job, receipt.start)
        if key not in longest or longest[key].stop < receipt.stop:
            longest[key] = receipt
    chosen = {}
    for job in plan.jobs:
        chain: list[Receipt] = []
        position = 0
        while position < job.n_elements or not chain:
            receipt = longest[job.ordinal, position]
            chain.append(receipt)
            if receipt.stop == position:
                break
            position = receipt.stop
        chosen[job.ordinal] = chain
    return chosen


def _shards(plan: MergePlan, tensors: Mapping[int, Sequence[int]]) -> dict[str, tuple[int, int]]:
    """Return size and checksum of every shard, from the checksums of the parts of each job."""
    written = {}
    for shard in plan.layout.shards:
        parts = [(crc32(shard.header), len(shard.header))]
        parts += [(tensors[job][i], plan.layout.slots[job][i].nbytes) for job, i in shard.parts]
        written[shard.name] = shard.nbytes, combine_all(parts)
    return written


def _tensors(plan: MergePlan, tensors: Mapping[int, Sequence[int]]) -> dict[str, tuple[Stored, int]]:
    """Return every tensor that is written, with its checksum, by its name."""
    pairs = (
        (part, crc) for job in plan.jobs for part, crc in zip(job.parts, tensors[job.ordinal], strict=True)
    )
    return {part.name: (part, crc) for part, crc in pairs}


def manifest_of(
    plan: MergePlan,
    chosen: Mapping[int, Sequence[Receipt]],
    identity: Identity,
    files: Mapping[str, tuple[int, int]],
    tensors: Mapping[str, tuple[Stored, int]],
    contents: Mapping[str, str],
) -> dict[str, Any]:
    """Return the manifest of a finished merge.

    Parameters
    ----------
    files
        Size and checksum of every file, by name; those of tensors come first.
    tensors
        Every tensor, with its checksum, by name.
    """
    written = {name: {"nbytes": nbytes, "crc32": f"{crc:08x}"} for name, (nbytes, crc) in files.items()}
    fishers = [index.stamps[0].header_digest for index in plan.fishers]
    diagonals = [content_of(index, contents) for index in plan.fishers]
    return {
        "format": FORMAT,
        "streammerge": __version__,
        "method": plan.method.name,
        "seed": plan.seed,
        "identity": identity.public,
        "inputs": [
            {
                "role": "base" if index is plan.base else "model",
                "name": _names(index),
                "fingerprint": digest,
                "tensors": len(index),
                "nbytes": index.nbytes,
                **({"sha256": hashes} if (hashes := content_of(index, contents)) else {}),
            }
            for index, digest in zip(plan.inputs, identity.fingerprints, strict=True)
        ],
        "densities": densities(plan, chosen),
        **({"fisher_sha256": diagonals} if any(diagonals) else {}),
        **({"fisher_tables": fishers, "floored": floored(plan, chosen)} if plan.fishers else {}),
        **({"not_finite": bad} if (bad := not_finite(plan, chosen)) else {}),
        **({"folders": list(plan.template.folders)} if plan.template.folders else {}),
        "files": dict(sorted(written.items())),
        "tensors": {
            name: {"dtype": part.dtype, "shape": list(part.shape), "crc32": f"{crc:08x}"}
            for name, (part, crc) in tensors.items()
        },
    }


def _names(index: TensorIndex) -> str:
    """Return an input's public name: its name and commit on the hub, or the name of the local folder, never a path."""
    return "+".join(
        f"{origin.name}@{origin.revision}" if origin.on_hub else origin.name for origin in origins_of(index)
    )


def tensor_crcs(plan: MergePlan, receipts: Sequence[Receipt]) -> list[int]:
    """Return the CRC-32 of the bytes of each part of a job from the receipts of its pieces."""
    job = plan.jobs[receipts[0].job]
    spans = [job.spans(receipt.start, receipt.stop) for receipt in receipts]
    return [
        combine_all((r.crcs[i], own[i][1] - own[i][0]) for r, own in zip(receipts, spans, strict=True))
        for i in range(len(job.parts))
    ]


def densities(plan: MergePlan, chosen: Mapping[int, Sequence[Receipt]]) -> list[dict[str, Any]]:
    """Return, for each model whose task vector lost entries, the number of survivors and of all entries."""
    n = len(plan.models)
    kept, total = [0] * n, [0] * n
    for ordinal, counts in kept_by_job(chosen).items():
        members = plan.jobs[ordinal].members or range(n)
        for i in members:
            total[i] += plan.jobs[ordinal].n_elements
        for i, count in zip(members, counts, strict=False):
            kept[i] += count
    if not any(total):
        return []
    return [
        {"model": i, "kept": k, "of": of, "density": round(k / max(1, of), 9)}
        for i, (k, of) in enumerate(zip(kept, total, strict=True))
    ]


def kept_by_job(chosen: Mapping[int, Sequence[Receipt]]) -> dict[int, tuple[int, ...]]:
    """Return the number of surviving entries of each task vector, for each job in which task vectors lose entries."""
    return {
        ordinal: tuple(map(sum, zip(*(receipt.kept for receipt in receipts if receipt.kept), strict=True)))
        for ordinal, receipts in chosen.items()
        if any(receipt.kept for receipt in receipts)
    }


def floored(plan: MergePlan, chosen: Mapping[int, Sequence[Receipt]]) -> dict[str, Any]:
    """Return the number of merged elements that a Fisher floor mostly decided, and of all elements."""
    count = sum(receipt.floored for receipts in chosen.values() for receipt in receipts)
    total = sum(job.n_elements for job in plan.jobs if job.fishers)
    return {"elements": count, "of": total, "fraction": round(count / max(1, total), 9)}


def not_finite(plan: MergePlan, chosen: Mapping[int, Sequence[Receipt]]) -> dict[str, int]:
    """Return the number of NaN and infinite elements of each tensor that has any."""
    counts = {job: sum(receipt.not_finite for receipt in receipts) for job, receipts in chosen.items()}
    return {plan.jobs[job].name: count for job, count in sorted(counts.items()) if count}


def _pipeline(plan: MergePlan, hashes: Mapping[str, str]) -> dict[str, bytes]:
    """Return the list of a pipeline's components, by its file name. Without it no library recognises a pipeline."""
    stamp = plan.beside.files.get(PIPELINE)
    return {} if stamp is None else {PIPELINE: read_sidecar(stamp, hashes[PIPELINE])}


def _index(plan: MergePlan, name: str) -> bytes:
    """Return the index of a folder's shards, with the names that tensors and shards have in that folder."""
    cut = len(folder_of(name))
    weight_map: dict[str, str] = {}
    total = 0
    for shard in plan.layout.shards_beside(name):
        for job, part in shard.parts:
            weight_map[plan.jobs[job].parts[part].name[cut:]] = shard.name[cut:]
            total += plan.layout.slots[job][part].nbytes
    value = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return bytes(indented(value, 2) + b"\n")
