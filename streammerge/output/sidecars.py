"""Sidecar files, the small files next to the weights, copied as they were when the merge began."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from streammerge.errors import ModelError, WorldError, printable
from streammerge.io.durable import make_folders, world_errors, write_fully
from streammerge.io.files import pread, read_exactly, reading
from streammerge.io.private import private
from streammerge.io.stamp import FileStamp, changed, check_unchanged
from streammerge.numerics.crc32 import crc32

_STEP = 1 << 20
"""Bytes copied at a time."""


def read_sidecar(stamp: FileStamp, content: str) -> bytes:
    """Return a small file.

    Parameters
    ----------
    content
        SHA-256 of the file when the merge began.

    Raises
    ------
    WorldError
        If it cannot be read or has changed.
    """
    try:
        with reading(stamp.path) as (source, status):
            data = read_exactly(source, status.st_size, 0, stamp.path)
    except ModelError as error:
        check_unchanged(stamp)
        raise WorldError(f"{error}; run the same command again") from error
    if hashlib.sha256(data).hexdigest() != content:
        raise changed(stamp.path)
    return data


def copy_sidecar(stamp: FileStamp, content: str, out: Path, name: str) -> tuple[int, int]:
    """Copy a file into an output piece by piece; return its size in bytes and its CRC-32.

    As with `write_file`, the name appears only when the file is complete, and is not yet durable.

    Parameters
    ----------
    content
        SHA-256 of the file when the merge began.
    name
        Path in the output; folders are created.

    Raises
    ------
    WorldError
        If the file cannot be read or written, or has changed.
    """
    target = out / name
    make_folders(out, name)
    partial = private(target)
    digest, crc, nbytes = hashlib.sha256(), 0, 0
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        with reading(stamp.path) as (source, _):
            with world_errors(target):
                descriptor = os.open(partial, flags, 0o666)
            try:
                while data := pread(source, _STEP, nbytes):
                    with world_errors(target):
                        write_fully(descriptor, data)
                    digest.update(data)
                    crc, nbytes = crc32(data, crc), nbytes + len(data)
                with world_errors(target):
                    os.fsync(descriptor)
            finally:
                os.close(descriptor)
    except ModelError as error:
        check_unchanged(stamp)
        raise WorldError(f"{error}; run the same command again") from error
    if digest.hexdigest() != content:
        with world_errors(target):
            partial.unlink()
        raise changed(stamp.path)
    with world_errors(target):
        os.replace(partial, target)
    return nbytes, crc


def _unreadable(stamp: FileStamp, why: object) -> WorldError:
    return WorldError(
        f"{printable(stamp.path)}: cannot be read: {why}; make it readable, or remove it, and run the same command again"
    )
