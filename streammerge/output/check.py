"""Verify a finished output: compare every byte of every file with the manifest.

It takes one pass over the disk, past the page cache. In addition to checksums it checks what loaders rely on: each shard's
header, the index, and that values are finite except where the manifest says otherwise.
"""

from __future__ import annotations

import re
import stat
from collections.abc import Callable, Mapping, Sequence
from dataclasses import field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from streammerge.checkpoint.sidecar_names import is_loaded
from streammerge.checkpoint.weight_names import INDEXES, STEMS, index_file
from streammerge.errors import ModelError, printable
from streammerge.formats.refs import TensorRef
from streammerge.formats.safetensors import SUFFIX, read_header
from streammerge.formats.torch_file import PICKLES
from streammerge.io import volumes
from streammerge.io.durable import PARTIAL, world_errors
from streammerge.io.strict_json import read_object
from streammerge.numerics.crc32 import combine_all
from streammerge.output.edits import find_edits
from streammerge.output.manifest import load_manifest
from streammerge.output.place import STATE, VERIFYING, Place, place_of
from streammerge.output.readback import Found, Part, read_back
from streammerge.planning.layout import folder_of, is_shard
from streammerge.records import dataclass

Read = Callable[[Mapping[str, Sequence[Part]], Callable[[int], None]], Mapping[str, list[Found]]]
_LOADABLE = (SUFFIX, *PICKLES, ".h5", ".msgpack", ".py", PARTIAL)
"""Endings of file names that a loader may take for the model, or that a merge leaves unfinished."""


@dataclass(frozen=True)
class Recomputed:
    """The result of a recomputation."""

    pieces: int
    of_pieces: int
    elements: int
    """Number of elements compared; more than those of the pieces if a method needs whole tensors."""
    of_elements: int
    problems: tuple[str, ...]
    """One line for each tensor that differs, in file order."""


@dataclass(frozen=True)
class Verdict:
    """The result of `verify`."""

    files: int
    """Number of files checked."""
    nbytes: int
    """Number of bytes read."""
    problems: tuple[str, ...]
    """One line per problem; empty if the output is as it was written."""
    others: tuple[str, ...] = ()
    """Additional files that loaders ignore."""
    edits: Mapping[str, str] = field(default_factory=dict)
    """Files that people may edit and that have changed, by name, with the kind of change. They are not problems."""
    recomputed: Recomputed | None = None
    """The recomputation from the inputs; None if it was not requested, or if no header could be read."""


def verify(out: Path, on_tick: Callable[[int], None] = lambda nbytes: None) -> Verdict:
    """Re-read a finished output: sizes, checksums, headers, the index, and that its values are finite.

    Parameters
    ----------
    on_tick
        Called now and then with the bytes read so far.

    Raises
    ------
    ModelError
        If `out` holds no finished merge, or its manifest is invalid.
    WorldError
        If the machine cannot read it.
    """
    return check_files(place_of(out), manifest_of(out), on_tick)


def check_files(
    place: Place,
    manifest: Mapping[str, Any],
    on_tick: Callable[[int], None] = lambda nbytes: None,
    read: Read | None = None,
) -> Verdict:
    """Do the same as `verify` with a manifest that was checked; `read` reads the files in place of `read_back`."""
    out = place.folder
    edits = find_edits(out, manifest["files"])
    examined = [
        _examine(out, name, entry["nbytes"], manifest.get("folders", ()))
        for name, entry in manifest["files"].items()
        if name not in edits
    ]
    readable = {str(out / one.name): one.parts for one in examined if one.parts}
    found = (read or read_back)(readable, on_tick)
    problems = {
        one.name: [*one.problems] or _compare(one, found.get(str(out / one.name), []), manifest, place)
        for one in examined
    }
    for folder in ("", *(f"{one}/" for one in manifest.get("folders", ()))):
        if not any(problems.get(folder + name) for name in INDEXES):
            problems[f"index of {folder}"] = _index_problems(place, folder, examined, manifest)
    extra, others = _beside(place, manifest)
    nbytes = sum(part.nbytes for parts in found.values() for part in parts)
    lines = [line for some in problems.values() for line in some]
    return Verdict(
        len(examined), nbytes, (*lines, *_misplaced(examined, manifest, place), *extra), others, edits
    )


def manifest_of(out: Path) -> dict[str, Any]:
    """Return the manifest of a finished output; raise as `verify` does."""
    place = place_of(out)
    place.look_anew()
    if place.file is None and not volumes.isdir(out):
        raise ModelError(f"{printable(out)}: no such directory")
    if place.is_unfinished:
        raise ModelError(
            f"{printable(out)}: the merge is not finished; run the same `streammerge merge` again"
        )
    if place.file is not None and not volumes.lexists(out):
        raise ModelError(f"{printable(out)}: no such file")
    if not volumes.lexists(place.manifest):
        where = "in it" if place.file is None else "next to it"
        raise ModelError(
            f"{printable(out)}: no {printable(place.manifest.name)} {where}; not the output of a finished merge"
        )
    return load_manifest(out)


@dataclass(frozen=True)
class _Examined:
    """A file of the manifest before its bytes are read."""

    name: str
    problems: tuple[str, ...] = ()
    """Reasons why the file is not read."""
    parts: tuple[Part, ...] = ()
    """Parts to read: a shard's header and its tensors, or the whole file."""
    tensors: Mapping[str, TensorRef] | None = None
    """The tensors of a shard, if its header is valid."""
    header_problem: str = ""


def _examine(out: Path, name: str, nbytes: int, folders: Sequence[str]) -> _Examined:
    path, shown = out / name, printable(name)
    try:
        status = volumes.lstat(path)
    except FileNotFoundError:
        return _Examined(name, (f"{shown}: missing",))
    except OSError as error:
        return _Examined(name, (f"{shown}: cannot be accessed: {error.strerror}",))
    if not stat.S_ISREG(status.st_mode):
        return _Examined(name, (f"{shown}: not a regular file",))
    if status.st_size != nbytes:
        return _Examined(name, (f"{shown}: has {status.st_size} bytes, {nbytes} were written",))
    whole = Part("", 0, nbytes)
    if not is_shard(name, folders):
        return _Examined(name, parts=(whole,))
    try:
        tensors, _, _ = read_header(path)
    except ModelError as error:
        return _Examined(name, parts=(whole,), header_problem=str(error).removeprefix(f"{path}: "))
    tensors = {f"{folder_of(name)}{tensor}": ref for tensor, ref in tensors.items()}
    tensors = {tensor: replace(ref, name=tensor) for tensor, ref in tensors.items()}
    refs = sorted(tensors.values(), key=lambda ref: (ref.offset, ref.nbytes))
    header = Part("", 0, refs[0].offset)
    parts = (header, *(Part(ref.name, ref.offset, ref.nbytes, ref.dtype) for ref in refs))
    return _Examined(name, parts=parts, tensors=tensors)


def _compare(one: _Examined, found: Sequence[Found], manifest: Mapping[str, Any], place: Place) -> list[str]:
    """Return the problems with the bytes of a file."""
    name, recorded = printable(one.name), manifest["tensors"]
    crc = combine_all((part.crc, part.nbytes) for part in found)
    by_tensor = {part.name: what for part, what in zip(one.parts, found, strict=True) if part.name}
    damaged = [
        tensor
        for tensor, what in by_tensor.items()
        if tensor in recorded and f"{what.crc:08x}" != recorded[tensor]["crc32"]
    ]
    expected = manifest["files"][one.name]["crc32"]
    if f"{crc:08x}" != expected or damaged:
        more = f" and {len(damaged) - 1} more tensors are" if len(damaged) > 1 else " is"
        what = f"tensor {printable(damaged[0])}{more} damaged" if damaged else "its bytes have changed"
        if one.tensors is not None and not damaged:
            what = "its header has changed"
        if one.header_problem:
            what = f"its header is damaged: {printable(one.header_problem)}"
        return [f"{name}: {what} (checksum {crc:08x}, expected {expected})"]
    if one.header_problem:
        return [f"{name}: {printable(one.header_problem)}"]
    return [
        problem
        for tensor, ref in (one.tensors or {}).items()
        for problem in _tensor_problems(name, ref, by_tensor[tensor], manifest, place)
    ]


def _tensor_problems(
    file: str, ref: TensorRef, found: Found, manifest: Mapping[str, Any], place: Place
) -> list[str]:
    """Return the differences between a tensor's description in the header and in the manifest."""
    where = f"{file}: tensor {printable(ref.name)}"
    recorded = manifest["tensors"].get(ref.name)
    if recorded is None:
        return [f"{where}: not in {printable(place.manifest.name)}"]
    if (ref.dtype, list(ref.shape)) != (recorded["dtype"], recorded["shape"]):
        wanted = f"{recorded['dtype']} {recorded['shape']}"
        return [f"{where}: {ref.dtype} {list(ref.shape)} in the header, {printable(wanted)} was written"]
    known = manifest.get("not_finite", {}).get(ref.name, 0)
    if found.bad.count != known:
        first = f" (the first is {found.bad.first})" if found.bad.count else ""
        return [f"{where}: {found.bad.count} elements are NaN or infinite{first}, {known} were written so"]
    return []


def _misplaced(examined: Sequence[_Examined], manifest: Mapping[str, Any], place: Place) -> list[str]:
    """Return the tensors that are in two shards or in none, as far as headers are readable."""
    places: dict[str, str] = {}
    problems = []
    for one in examined:
        for tensor in one.tensors or {}:
            if tensor in places:
                problems.append(
                    f"{printable(one.name)}: tensor {printable(tensor)} is in {printable(places[tensor])} too"
                )
            places[tensor] = one.name
    folders = manifest.get("folders", ())
    if all(one.tensors is not None for one in examined if is_shard(one.name, folders)):
        lost = [tensor for tensor in manifest["tensors"] if tensor not in places]
        more = f" and {len(lost) - 1} more tensors are" if len(lost) > 1 else " is"
        problems += (
            [f"tensor {printable(lost[0])}{more} in no file, though in {printable(place.manifest.name)}"]
            if lost
            else []
        )
    return problems


def _index_problems(
    place: Place, folder: str, examined: Sequence[_Examined], manifest: Mapping[str, Any]
) -> list[str]:
    """Return the errors in the index of a folder (``unet/``, or empty): it must list exactly the tensors there."""
    shards = [
        one
        for one in examined
        if folder_of(one.name) == folder and is_shard(one.name, manifest.get("folders", ()))
    ]
    name = next((folder + name for name in INDEXES if folder + name in manifest["files"]), None)
    if name is None:
        if len(shards) < 2:
            return []
        expected = index_file(re.sub(r"-\d+-of-\d+$", "", shards[0].name.removesuffix(SUFFIX)))
        listed = printable(place.manifest.name)
        return [f"{printable(expected)}: not in {listed}, though there are {len(shards)} shards"]
    try:
        index = read_object(str(place.path(name)), "finite")
    except ModelError as error:
        return [f"{name}: {printable(str(error).removeprefix(f'{place.path(name)}: '))}"]
    weight_map, metadata = index.get("weight_map"), index.get("metadata")
    cut = len(folder)
    places = {tensor[cut:]: one.name[cut:] for one in shards for tensor in one.tensors or {}}
    if not isinstance(weight_map, dict) or not isinstance(metadata, dict):
        return [f"{name}: no weight_map or no metadata"]
    if any(one.tensors is None for one in shards):
        return []
    wrong = sorted(t for t in {*weight_map, *places} if weight_map.get(t) != places.get(t))
    if wrong:
        told, there = (printable(x.get(wrong[0], "nowhere"), 120) for x in (weight_map, places))
        return [f"{name}: leads for tensor {printable(wrong[0])} to {told}, it is in {there}"]
    total = sum(ref.nbytes for one in shards for ref in (one.tensors or {}).values())
    if metadata.get("total_size") != total:
        told = printable(metadata.get("total_size"), 40)
        return [f"{name}: total_size is {told}, but the tensors have {total} bytes"]
    return []


def _beside(place: Place, manifest: Mapping[str, Any]) -> tuple[list[str], tuple[str, ...]]:
    """Return problems with additional files that a loader may take for part of the model, and the names of all others."""
    if place.file is not None:
        return [], ()  # its folder is not the merge's
    out = place.folder
    known = {*manifest["files"], place.manifest.name}
    folders = {str(folder) for name in known for folder in PurePosixPath(name).parents}
    with world_errors(out):
        found = [
            entry
            for folder in sorted(folders)
            if volumes.isdir(out / folder)
            for entry in _names(out, folder)
        ]
    names = sorted(
        name for name in found if name not in known and name not in folders and name not in (STATE, VERIFYING)
    )
    loadable = [
        name
        for name in names
        if name.endswith(_LOADABLE) or name.rpartition("/")[2].startswith(STEMS) or is_loaded(name)
    ]
    problems = [
        f"{printable(name)}: not in {place.manifest.name}; no merge wrote it here" for name in loadable
    ]
    return problems, tuple(name for name in names if name not in loadable)


def _names(out: Path, folder: str) -> list[str]:
    """Return the paths of all files in a folder of an output."""
    prefix = "" if folder == "." else f"{folder}/"
    return [prefix + name for name in volumes.listdir(out / folder)]
