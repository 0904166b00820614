"""An output in an object store: what may lie there, and how what an earlier merge left is removed."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from streammerge.checkpoint.index import CONFIG_NAME
from streammerge.checkpoint.sidecar_names import is_sound_path
from streammerge.checkpoint.weight_names import LISTS, LOADED, is_weight_file
from streammerge.errors import OutputError, printable
from streammerge.io import volumes
from streammerge.io.object_small import facts_of, list_objects, remove_object
from streammerge.output.finished import Finished
from streammerge.output.heartbeat import signs_of
from streammerge.output.identity import Identity
from streammerge.output.joining import left_by_runs
from streammerge.output.manifest import read_manifest
from streammerge.output.place import CONFIG_COPY, RUN, Place, is_run
from streammerge.output.presence import taken_by
from streammerge.output.working_files import working_files
from streammerge.planning.layout import Layout

MOST = 100_000
"""Most objects below an output; a prefix with more is no output."""
_FIXED = {CONFIG_NAME, "README.md", CONFIG_COPY, *LISTS}

Present = Mapping[str, tuple[int, str]]
"""Size and ETag of every object of an output, by name."""


def check_object_target(place: Place, inputs: Sequence[str]) -> None:
    """Refuse an output that is a single object, a bucket, or a folder of inputs; `inputs` are paths that are read.

    Raises
    ------
    StreammergeError
        If it is refused, or its bucket cannot be reached.
    """
    out = str(place.out)
    volumes.volume_of(out)
    if not out.partition("://")[2].partition("/")[2]:
        raise OutputError(f"{printable(out)}: is a whole bucket: name a folder in it as OUT")
    for path in inputs:
        if path == out or path.startswith(f"{out}/"):
            raise OutputError(f"{printable(out)}: holds the input {printable(path)}: choose a different OUT")


def present_in(place: Place) -> Present:
    """Return every object of an output; refuse a folder that no merge of ours made.

    Raises
    ------
    OutputError
        If it holds objects, but neither working files nor a manifest.
    """
    out = str(place.out)
    place.look_anew()
    found = objects_of(place)
    if not found or place.manifest.name in found:
        return found
    if place.file in found or not any(_is_working(place, name) for name in found):
        raise OutputError(
            f"{printable(out)}: contains files that streammerge did not write ({printable(min(found))}): "
            "choose an empty or new folder"
            if place.file is None
            else f"{printable(out)}: no merge wrote this file: choose a different name"
        )
    return found


def objects_of(place: Place) -> Present:
    """Return every object of an output as it is now; of a single file, only those that have its name."""
    if place.file is None:
        return list_objects(str(place.out), MOST)
    names = {place.file: place.out, place.manifest.name: place.manifest}
    facts = {name: facts_of(str(path)) for name, path in names.items()}
    found = {name: (one.nbytes, one.e_tag) for name, one in facts.items() if one is not None}
    below = list_objects(str(place.state), MOST)
    return found | {f"{place.state.name}/{name}": one for name, one in below.items()}


def _is_working(place: Place, name: str) -> bool:
    return name.startswith(f"{place.state.name}/")


def _has_run(place: Place, present: Present) -> bool:
    """Return whether a merge has begun here that has not ended."""
    parts = [name.split("/") for name in present if _is_working(place, name)]
    return any(len(some) == 3 and is_run(some[1]) and some[2] == RUN for some in parts)


def find_finished_objects(place: Place, identity: Identity, present: Present) -> Finished | None:
    """Return the finished merge that an output holds if it is this same one; None if it is unfinished, or nothing.

    Working files that processes left which died at the very end are removed.

    Raises
    ------
    OutputError
        If it holds a different merge, or lacks files of this one.
    """
    manifest = read_manifest(place.out) if place.manifest.name in present else None
    if manifest is None or _has_run(place, present):
        return None
    if changed := identity.changed(manifest["identity"]):
        raise OutputError(
            f"{printable(place.out)}: holds a finished merge with a different {printable(', '.join(changed[:3]))}: choose "
            "a different OUT, or replace it with --overwrite"
        )
    for name, entry in manifest["files"].items():
        if present.get(name, (-1, ""))[0] != entry["nbytes"]:
            raise OutputError(
                f"{printable(place.out)}: holds this merge, finished, but {printable(name)} is missing or has a different "
                "size: restore it, or start over with --overwrite"
            )
    if any(_is_working(place, name) for name in present):
        working_files(place.state).clear()
    return Finished(manifest)


def object_of(place: Place, layout: Layout, run: str, number: int) -> str:
    """Return the name of a shard's object: a working file of the run if its tensors are copied from there in the end."""
    name = layout.shards[number].name
    return f"{place.state.name}/{run}/{name}" if layout.beside else name


def withdraw_objects(place: Place, present: Present) -> None:
    """Remove indexes and the list of components, so that nothing loads while shards are written again."""
    for name in present:
        if name.rpartition("/")[2] in LISTS or name.endswith(".index.json"):
            remove_object(str(place.path(name)))


def clear_objects(place: Place, present: Present) -> None:
    """Remove the files of an earlier merge; foreign ones stay. What loads goes first, what names the rest last.

    Raises
    ------
    OutputError
        If a process is at work there.
    """
    volume = working_files(place.state)
    for sign in signs_of(volume):
        if sign.is_fresh and not volume.has_ended(sign.domain, sign.pid):
            raise OutputError(taken_by(place, sign))
    announced: Collection[str] = {name for name in left_by_runs(place) if is_sound_path(name)}
    manifest = read_manifest(place.out) if place.manifest.name in present else None
    ours = {*_FIXED, *announced, *(manifest["files"] if manifest else ())}
    ours |= {name for name in present if "/" not in name and is_weight_file(name)}
    ours = {name for name in ours & present.keys() if not _is_working(place, name)} - {place.manifest.name}
    from streammerge.io.object_leftovers import abort_uploads  # it takes an HTTP client

    abort_uploads(str(place.folder), {*announced, *(manifest["files"] if manifest else ())})
    for name in sorted(ours, key=lambda name: (name not in LOADED, name)):
        remove_object(str(place.path(name)))
    if place.manifest.name in present:
        remove_object(str(place.manifest))
    volume.clear()
    place.look_anew()
