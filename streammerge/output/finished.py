"""Outputs that already hold a finished merge: this same merge, a different one, or a damaged one."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import field
from typing import Any

from streammerge.checkpoint.weight_names import LISTS, LOADED
from streammerge.errors import OutputError, printable
from streammerge.events import Control
from streammerge.io.durable import fsync_directory, world_errors
from streammerge.output.check import check_files
from streammerge.output.edits import find_edits
from streammerge.output.identity import Identity
from streammerge.output.inputs import ContentHasher, changed_contents, recorded_contents
from streammerge.output.journal import remove_state
from streammerge.output.manifest import read_manifest
from streammerge.output.place import Place
from streammerge.planning.plan import MergePlan
from streammerge.records import dataclass


@dataclass(frozen=True)
class Finished:
    """A finished merge."""

    manifest: Mapping[str, Any]
    edits: Mapping[str, str] = field(default_factory=dict)
    """Edited files by name, with the kind of change."""


def find_finished(
    place: Place,
    plan: MergePlan,
    identity: Identity,
    hasher: ContentHasher | None,
    control: Control,
) -> Finished | None:
    """Return the finished merge that an output holds if it is this same one; None if it is unfinished, or nothing.

    With a `hasher`, inputs also need the content that the manifest records, if it does.

    Raises
    ------
    OutputError
        If it holds a different merge, or lacks files of this one.
    """
    out = place.out
    manifest = read_manifest(out)
    interrupted = place.is_unfinished
    if manifest is None or (interrupted and not _is_sound(place, manifest)):
        return None
    if changed := identity.changed(manifest["identity"]):
        raise OutputError(
            f"{printable(out)}: holds a finished merge with a different {printable(', '.join(changed[:3]))}: choose "
            "a different OUT, or replace it with --overwrite"
        )
    edits = find_edits(place.folder, manifest["files"])
    if (lost := _lost(place, manifest, edits)) is not None:
        raise OutputError(
            f"{printable(out)}: holds this merge, finished, but {printable(lost)} is missing or has a different size: restore it, or start "
            "over with --overwrite"
        )
    if hasher is not None:
        _compare_contents(place, plan, manifest, hasher, control)
    with world_errors(out):
        if interrupted:
            _name_again(place, manifest)
        fsync_directory(place.folder)
    remove_state(place)
    return Finished(manifest, edits)


def _lost(place: Place, manifest: Mapping[str, Any], edits: Mapping[str, str]) -> str | None:
    """Return the first file of the manifest that is missing or has a different size, except edited files."""
    for name, entry in manifest["files"].items():
        try:
            if name not in edits and place.path(name).stat().st_size != entry["nbytes"]:
                return str(name)
        except OSError:
            return str(name)
    return None


def _is_sound(place: Place, manifest: Mapping[str, Any]) -> bool:
    """Return whether an interrupted commit is complete except for removing the journal.

    Every byte is read, since a damaged byte cannot be written again once the journal is gone.
    """
    if _lost(place, manifest, {}) is not None:
        return False
    verdict = check_files(place, manifest)
    return not verdict.problems and not verdict.edits


def _name_again(place: Place, manifest: Mapping[str, Any]) -> None:
    """Give the last name of an interrupted commit again.

    The earlier process may have been killed before the name was durable, or its sync of the directory may have failed;
    the system has then dropped the write, and a second sync would wrongly report success.
    """
    for name in LOADED if place.file is None else (place.file,):
        if name in manifest["files"]:
            # A shard is found again under the name that it has while it is written.
            partial = place.private(name) if name in LISTS else place.partial(name)
            os.replace(place.path(name), partial)
            for folder in {partial.parent, place.folder}:
                fsync_directory(folder)
            os.replace(partial, place.path(name))


def _compare_contents(
    place: Place,
    plan: MergePlan,
    manifest: Mapping[str, Any],
    hasher: ContentHasher,
    control: Control,
) -> None:
    """Refuse a merge whose inputs have changed, as far as content hashes are recorded."""
    if other := changed_contents(plan, manifest, hasher):
        raise OutputError(
            f"{printable(place.out)}: holds a finished merge, but the content {printable(other[0], 300)} has changed since: choose "
            "a different OUT, or replace it with --overwrite"
        )
    if not recorded_contents(plan, manifest):
        control.warn(
            f"{printable(place.out)}: was finished without --hash-inputs, so there are no content hashes to compare the "
            "inputs with"
        )
