"""Locks an output's directory, and refuses one that holds foreign files. One process writes at a time."""

from __future__ import annotations

import errno
import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath

from streammerge.checkpoint.index import CONFIG_NAME, TensorIndex
from streammerge.checkpoint.weight_names import INDEXES, LISTS, LOADED, is_weight_file
from streammerge.errors import OutputError, WorldError, printable
from streammerge.io.durable import PARTIAL, cure_of, fsync_directory, make_directory, world_errors
from streammerge.io.lock import locked_directory
from streammerge.io.private import finished_name, is_private
from streammerge.output.manifest import read_manifest
from streammerge.output.place import CONFIG_COPY, WORKERS, Place


def check_target(place: Place, inputs: Sequence[TensorIndex], others: Sequence[str] = ()) -> None:
    """Refuse an output that cannot be written, or that contains an input; `others` are further paths that are read.

    A single file may lie in the same folder as inputs, but must not be one of them.

    Raises
    ------
    OutputError
        Before anything is created.
    """
    out = place.out
    if "\0" in str(out):
        raise OutputError("the output path holds a NUL character")
    if place.file is not None:
        _check_file(place)
    elif os.path.lexists(out) and not out.is_dir():
        raise OutputError(f"{printable(out)}: exists and is not a directory: choose a different OUT")
    _check_place(place)
    if not out.exists():
        return
    target = out.resolve()
    for other in others:
        if target == Path(other).resolve():
            raise OutputError(f"{printable(out)}: is the input {printable(other)}: choose a different OUT")
    for index in inputs:
        files = [Path(stamp.path).resolve() for stamp in index.stamps]
        places = {index.directory.resolve(), *(path.parent for path in files)}
        if target in (places if place.file is None else files):
            holds = "holds" if place.file is None else "is a file of"
            raise OutputError(
                f"{printable(out)}: {holds} the input {printable(index.reference)}: choose a different OUT"
            )


def _check_file(place: Place) -> None:
    """Refuse a single file if something that no merge made has its path."""
    if place.out.is_symlink() or (place.out.exists() and not place.out.is_file()):
        raise OutputError(f"{printable(place.out)}: exists and is not a regular file: choose a different OUT")
    if os.path.lexists(place.state) and (place.state.is_symlink() or not place.state.is_dir()):
        raise OutputError(
            f"{printable(place.state)}: exists, but must be a directory for the journal: choose a different OUT"
        )


def _check_state(place: Place) -> None:
    """Refuse a directory of a single file's journal that holds anything else."""
    with world_errors(place.state):
        names = os.listdir(place.state) if place.state.is_dir() else []
    ours = {WORKERS, *(path.name for path in place.in_state)}
    if foreign := sorted(name for name in names if finished_name(name) not in ours and not is_private(name)):
        raise OutputError(
            f"{printable(place.state)}: holds files that streammerge did not make ({printable(foreign[0])}); move them away, "
            "or choose a different OUT"
        )


def _check_place(target: Place) -> None:
    """Refuse a path where nothing can be created, judging by its existing part.

    A read-only file system counts as a failure of the machine: once it is writable again, the same command resumes.
    """
    out, place = target.out, target.folder.absolute()
    while not os.path.lexists(place) and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise OutputError(f"{printable(out)}: {printable(place)} is not a directory: choose a different OUT")
    with world_errors(out):
        if os.statvfs(place).f_flag & os.ST_RDONLY:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
    if not os.access(place, os.W_OK | os.X_OK):
        raise OutputError(f"{printable(out)}: {printable(place)} is not writable: choose a different OUT")


@contextmanager
def joined(place: Place) -> Iterator[None]:
    """Create the directory if needed and share its lock with other processes that write shards of their own there.

    Raises
    ------
    OutputError
        If a merge that works alone is running there.
    """
    _create(place.folder)
    with locked_directory(
        place.out,
        f"{printable(place.out)}: a merge that works alone is writing there: wait for it or, if it was meant to be shared, stop "
        "it and start it again with --join: what it has finished counts",
        shared=True,
    ):
        yield


@contextmanager
def locked(place: Place) -> Iterator[None]:
    """Create the directory if needed and hold its lock; the lock ends with the process.

    For a single file the journal's directory is locked; it is removed again if no merge begins.

    Raises
    ------
    OutputError
        If a different merge is running there.
    """
    taken = (
        f"{printable(place.out)}: a different merge is writing there: wait for it, or choose a different OUT"
    )
    _create(place.folder)
    if place.file is None:
        with locked_directory(place.out, taken):
            yield
        return
    with world_errors(place.state):
        place.state.mkdir(exist_ok=True)
    with locked_directory(place.state, taken):
        try:
            yield
        finally:
            with suppress(OSError):  # it holds a journal
                place.state.rmdir()


def _create(out: Path) -> None:
    """Create the directory durably.

    Raises
    ------
    WorldError
        If it cannot be created; nothing exists then.
    """
    if out.is_dir():
        with world_errors(out):
            make_directory(out)
        return
    try:
        make_directory(out)
    except OSError as error:
        cure = cure_of(error, "choose a different OUT")
        raise WorldError(f"cannot create {printable(out)}: {error.strerror or error}; {cure}") from error


def check_contents(place: Place) -> None:
    """Refuse a directory that holds files no merge of ours made, or a file that none made.

    Raises
    ------
    OutputError
        If it holds files, but neither a journal nor a manifest.
    """
    out = place.out
    if place.file is not None:
        _check_single(place)
        return
    if place.is_unfinished or read_manifest(out) is not None:
        return
    with world_errors(out):
        foreign = sorted(entry.name for entry in out.iterdir())
    if foreign:
        raise OutputError(
            f"{printable(out)}: contains files that streammerge did not write ({printable(foreign[0])}): "
            "choose an empty or new directory"
        )


def _check_single(place: Place) -> None:
    """Refuse a file, or a file in place of its manifest, that no merge of ours made; a journal proves neither."""
    _check_state(place)
    if read_manifest(place.out) is not None:
        return
    for path in (place.manifest, place.out):
        if os.path.lexists(path):
            raise OutputError(
                f"{printable(path)}: exists, and streammerge did not make it: move it away, or choose a different OUT"
            )


_FIXED = {CONFIG_NAME, "README.md", CONFIG_COPY, *LISTS}


def withdraw(place: Place) -> None:
    """Remove indexes and the list of components, so that nothing loads while the files that they list are changed."""
    if place.file is None:
        manifest = read_manifest(place.out)
        written = manifest["files"] if manifest else ()
        _remove(place.folder, {*LISTS, *(name for name in written if name.rpartition("/")[2] in INDEXES)})


def clear(place: Place, announced: Collection[str] = ()) -> None:
    """Remove the files of an earlier merge, except its journal; foreign files stay.

    Loadable files are removed durably first, and the manifest, which names the rest, last. In between, files may be
    removed in any order, and may reappear after a loss of power.

    Parameters
    ----------
    announced
        Paths of sidecar files that an unfinished merge may have written.
    """
    out = place.folder
    if place.file is not None:
        _clear_single(place)
        return
    _remove(out, set(LOADED))
    manifest = read_manifest(place.out)
    ours = {*_FIXED, *announced, *(manifest["files"] if manifest else ())}
    with world_errors(out):
        names = {entry.name for entry in out.iterdir() if entry.is_file() or entry.is_symlink()}
    ours |= {name for name in names if is_weight_file(finished_name(name))}
    _remove(out, ours | {name + PARTIAL for name in ours} | _unfinished(out, {*ours, place.manifest.name}))
    for folder in sorted({parent for name in ours for parent in PurePosixPath(name).parents}, reverse=True)[
        :-1
    ]:
        with suppress(OSError):  # it holds foreign files, or was never created
            (out / folder).rmdir()
    _remove(out, {place.manifest.name, place.manifest.name + PARTIAL})


def _clear_single(place: Place) -> None:
    """Remove a single file, the remains of an unfinished one, and then the manifest."""
    names = (place.out.name, place.manifest.name)
    _remove(place.folder, {place.out.name})
    _remove(place.state, {place.partial(name).name for name in names} | _unfinished(place.state, {*names}))
    _remove(place.folder, {place.manifest.name})


def sweep(place: Place, names: Collection[str]) -> None:
    """Remove what dead processes left of some files that they had not finished; shards that a merge resumes stay.

    Parameters
    ----------
    names
        Paths of the files in the output.
    """
    if place.file is None:
        _remove(place.folder, _unfinished(place.folder, names))
    else:
        _remove(place.state, _unfinished(place.state, names))


def sweep_shards(place: Place, names: Collection[str], run: str) -> None:
    """Remove the unfinished files of some shards that the processes of a run, or one that worked alone, left behind."""
    found = {name for name in _unfinished(place.folder, names) if f".{run}." in name}
    _remove(place.folder, found | {name + PARTIAL for name in names})


def _unfinished(out: Path, names: Collection[str]) -> set[str]:
    """Return the paths of the private temporary files of some files."""
    found = set()
    for prefix in {name[: name.rfind("/") + 1] for name in names}:
        if not (out / prefix).is_symlink() and (out / prefix).is_dir():
            with world_errors(out / prefix):
                found |= {prefix + name for name in os.listdir(out / prefix) if is_private(name)}
    return {path for path in found if finished_name(path) in names}


def _remove(out: Path, names: set[str]) -> None:
    """Remove those of the named files that exist, durably."""
    with world_errors(out):
        there = [name for name in sorted(names) if _is_removable(out, name)]
        for name in there:
            (out / name).unlink(missing_ok=True)  # processes that share a merge may end it at once
        for folder in {(out / name).parent for name in there}:
            fsync_directory(folder)


def _is_removable(out: Path, name: str) -> bool:
    """Return whether a file or link of this name exists inside a directory, without a link on the way to it."""
    path = out / name
    return os.path.lexists(path) and not any(
        (out / above).is_symlink() for above in PurePosixPath(name).parents
    )
