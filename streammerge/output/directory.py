"""The output directory: one writer at a time, nothing of others touched, resumed or refused."""

from __future__ import annotations

import errno
import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath

from streammerge.checkpoint.index import CONFIG_NAME, TensorIndex
from streammerge.checkpoint.weight_names import INDEXES, LOADED, is_weight_file
from streammerge.errors import OutputError, WorldError, printable
from streammerge.io.durable import PARTIAL, cure_of, fsync_directory, make_directory, world_errors
from streammerge.io.lock import locked_directory
from streammerge.output.journal import STATE
from streammerge.output.manifest import MANIFEST, read_manifest

CONFIG_COPY = "streammerge_config.yml"


def check_target(out: Path, inputs: Sequence[TensorIndex], others: Sequence[str] = ()) -> None:
    """Refuse an output that is a file or is where an input lies; `others` are paths that are read too.

    Raises
    ------
    OutputError
        Before anything is created.
    """
    if "\0" in str(out):
        raise OutputError("the output path holds a NUL character")
    if os.path.lexists(out) and not out.is_dir():
        raise OutputError(f"{printable(out)}: exists and is not a directory; choose another OUT")
    _check_place(out)
    if not out.exists():
        return
    target = out.resolve()
    for other in others:
        if target == Path(other).resolve():
            raise OutputError(f"{printable(out)}: is the input {printable(other)}; choose another OUT")
    for index in inputs:
        places = {index.directory.resolve(), *(Path(stamp.path).resolve().parent for stamp in index.stamps)}
        if target in places:
            raise OutputError(
                f"{printable(out)}: holds the input {printable(index.reference)}; choose another OUT"
            )


def _check_place(out: Path) -> None:
    """Refuse a place where nothing can be created, by what exists of its path.

    A file system that is read-only is a failure of the machine: written to again, it lets the same command go on.
    """
    place = out.absolute()
    while not os.path.lexists(place) and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise OutputError(f"{printable(out)}: {printable(place)} is not a directory; choose another OUT")
    with world_errors(out):
        if os.statvfs(place).f_flag & os.ST_RDONLY:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
    if not os.access(place, os.W_OK | os.X_OK):
        raise OutputError(f"{printable(out)}: {printable(place)} cannot be written to; choose another OUT")


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Create the directory if needed and hold its lock; the lock goes with the process.

    Raises
    ------
    OutputError
        If another merge runs there.
    """
    _create(out)
    with locked_directory(out, f"{printable(out)}: another merge is writing there"):
        yield


def _create(out: Path) -> None:
    """Make the directory, for good.

    Raises
    ------
    WorldError
        If it cannot be made: nothing is kept then, for nothing is there.
    """
    if out.is_dir():
        with world_errors(out):
            make_directory(out)
        return
    try:
        make_directory(out)
    except OSError as error:
        cure = cure_of(error, "choose another OUT")
        raise WorldError(f"cannot create {printable(out)}: {error.strerror or error}; {cure}") from error


def check_contents(out: Path) -> None:
    """Refuse a directory that holds files no merge of ours made.

    Raises
    ------
    OutputError
        If there is neither a journal nor a manifest, but something else.
    """
    if (out / STATE).exists() or read_manifest(out) is not None:
        return
    with world_errors(out):
        foreign = sorted(entry.name for entry in out.iterdir())
    if foreign:
        raise OutputError(
            f"{printable(out)}: holds files that streammerge did not make ({printable(foreign[0])}); "
            "choose an empty or new directory"
        )


_FIXED = {CONFIG_NAME, "README.md", CONFIG_COPY, *INDEXES}


def withdraw(out: Path) -> None:
    """Take an index away, so that nothing loads while the files it speaks of are worked on."""
    _remove(out, set(INDEXES))


def clear(out: Path, announced: Collection[str] = ()) -> None:
    """Remove what a merge of ours left, but for its journal; files of others stay.

    What loads goes first, for good, and the manifest, which names the rest, last: in between the rest may go in any
    order, and be there again after a loss of power.

    Parameters
    ----------
    announced
        Paths of files beside the weights that an unfinished merge may have written.
    """
    _remove(out, set(LOADED))
    manifest = read_manifest(out)
    ours = {*_FIXED, *announced, *(manifest["files"] if manifest else ())}
    with world_errors(out):
        names = {entry.name for entry in out.iterdir() if entry.is_file() or entry.is_symlink()}
    ours |= {name for name in names if is_weight_file(name.removesuffix(PARTIAL))}
    _remove(out, ours | {name + PARTIAL for name in ours})
    for folder in sorted({parent for name in ours for parent in PurePosixPath(name).parents}, reverse=True)[
        :-1
    ]:
        with suppress(OSError):  # it holds something of others, or was never made
            (out / folder).rmdir()
    _remove(out, {MANIFEST, MANIFEST + PARTIAL})


def _remove(out: Path, names: set[str]) -> None:
    """Remove those of some files that are there, for good."""
    with world_errors(out):
        there = [name for name in sorted(names) if _is_removable(out, name)]
        for name in there:
            (out / name).unlink()
        for folder in {(out / name).parent for name in there}:
            fsync_directory(folder)


def _is_removable(out: Path, name: str) -> bool:
    """Return whether there is a file, or a link, of this name inside of a directory, no link on the way to it."""
    path = out / name
    return os.path.lexists(path) and not any(
        (out / above).is_symlink() for above in PurePosixPath(name).parents
    )
