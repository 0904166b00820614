"""An append-only journal. Each record is one checksummed line; a torn last line is ignored.

The first line records what the output depends on, and which files are read; a merge is resumed only if they are the
same. A line is appended after the bytes that it records are durable.
"""

from __future__ import annotations

import errno
import json
import os
import threading
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import Any

from streammerge.checkpoint.sidecar_names import is_sound_path
from streammerge.errors import OutputError, printable
from streammerge.io.durable import fsync_directory, world_errors, write_file, write_fully
from streammerge.io.lock import try_lock
from streammerge.io.private import finished_name, is_private
from streammerge.output.place import WORKERS, Place, is_run
from streammerge.output.volume import remove_small
from streammerge.records import dataclass


@dataclass(frozen=True, slots=True)
class Receipt:
    """Elements of one tensor that are written: their checksums and counts."""

    job: int
    start: int
    stop: int
    crcs: tuple[int, ...]
    """The checksum of the bytes of each part of the job."""
    kept: tuple[int, ...] = ()
    """Number of surviving entries of each model's task vector."""
    floored: int = 0
    """Number of elements that a Fisher floor decided."""
    not_finite: int = 0
    """Number of NaN and infinite elements."""
    differs: bool = False
    """Whether the models disagree on a copied tensor. The journal does not record it."""
    output: int = 0
    """The number of the output, where several are made from each read. The journal does not record it."""


@dataclass(frozen=True)
class Known:
    """The stamp and content hash of an input file; see `streammerge.output.inputs`."""

    stamp: str
    content: str = ""
    """The content hash; empty if it was not hashed."""


@dataclass
class Progress:
    """The records of a journal."""

    identity: Mapping[str, str]
    receipts: list[Receipt] = field(default_factory=list)
    answers: dict[str, Any] = field(default_factory=dict)
    """Values of streamed statistics so far, by job."""
    files: dict[str, Known] = field(default_factory=dict)
    """The input files, by their keys."""
    beside: list[str] = field(default_factory=list)
    """Paths of sidecar files that the output may already hold."""


class Journal:
    """The journal of an output; `add` and `add_answers` may be called from any thread."""

    def __init__(self, place: Place, identity: Mapping[str, str]) -> None:
        self._place, self._out = place, place.out
        self._state, self._path = place.state, place.journal
        self._identity = dict(identity)
        self._lock = threading.Lock()
        self._descriptor = -1
        self._claim = -1

    def claim(self, *, shared: bool = False) -> None:
        """Lock an existing journal until this one is open; `shared`: with others who only read it.

        On NFS and Lustre, the lock of a directory is local to the machine, but the lock of a file is the server's.

        Raises
        ------
        OutputError
            If a different merge holds it.
        """
        with world_errors(self._path):
            if self._state.is_symlink() or not self._path.is_file():
                return
            self._claim = os.open(self._path, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            self._lock_file(self._claim, shared)

    def _lock_file(self, descriptor: int, shared: bool = False) -> None:
        try:
            free = try_lock(descriptor, shared=shared)
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
            return  # the file system has no file locks: the directory's lock must do
        if not free:
            raise OutputError(
                f"{printable(self._out)}: a different merge is writing there, on this machine or a different one: wait for it, or choose a "
                "different OUT"
            )

    def read(self) -> Progress | None:
        """Return the records, or None. This changes nothing.

        Raises
        ------
        OutputError
            If they belong to a different merge; the message says what changed.
        """
        if self._state.is_symlink():
            raise OutputError(
                f"{printable(self._state)}: is a link, which streammerge did not make: remove it, or choose a different OUT"
            )
        with world_errors(self._path):
            progress, _ = _load(self._path)
        if progress is not None:
            compare(self._identity, progress.identity, self._out)
        return progress

    def start_over(self) -> None:
        """Discard all records. From now on the output is durably marked as begun, and as ours."""
        with world_errors(self._path):
            self._state.mkdir(exist_ok=True)
            fsync_directory(self._place.folder)
            write_file(self._path, b"", self._place.private_in_state(self._path.name))
            fsync_directory(self._state)

    def open(self, files: Mapping[str, Known]) -> None:
        """Open the journal for appending: a new one after `start_over`, else the valid lines of the old one.

        `files` are the current input files.

        The lines are rewritten as a new file: the end of the old one may be torn, and after a failed sync its lines may
        exist only in the page cache.
        """
        with world_errors(self._path):
            progress, sound = _load(self._path)
            listed = {key: [known.stamp, known.content] for key, known in files.items()}
            if progress is None:
                sound = line_of({"identity": self._identity, "files": listed})
            elif progress.files != files:
                sound += line_of({"files": listed})
            write_file(self._path, sound, self._place.private_in_state(self._path.name))
            flags = os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
            self._descriptor = os.open(self._path, flags)
            self._lock_file(self._descriptor)
            fsync_directory(self._state)
        self._give_up_claim()

    def _give_up_claim(self) -> None:
        if self._claim >= 0:
            os.close(self._claim)
            self._claim = -1

    def add(self, receipts: Sequence[Receipt]) -> None:
        """Record finished elements."""
        self._append([record_of(receipt) for receipt in receipts])

    def add_answers(self, answers: Mapping[str, Any]) -> None:
        """Record the values of streamed statistics, by job."""
        self._append([{"answer": [job, known]} for job, known in answers.items()])

    def announce(self, names: Iterable[str]) -> None:
        """Record the names of sidecar files before they are written, so that starting over can remove them."""
        self._append([{"beside": sorted(names)}])

    def announced(self) -> set[str]:
        """Return the names of sidecar files that this merge, or an earlier one, may have written."""
        progress, _ = _load(self._path)
        return set() if progress is None else set(progress.beside)

    def _append(self, records: Sequence[Mapping[str, Any]]) -> None:
        data = b"".join(line_of(record) for record in records)
        with self._lock, world_errors(self._path):
            self._check_ours()
            write_fully(self._descriptor, data)
            os.fdatasync(self._descriptor)

    def _check_ours(self) -> None:
        """Stop if a different machine has begun the same output at the same moment and replaced the journal."""
        if not os.path.samestat(os.stat(self._path), os.fstat(self._descriptor)):
            raise OutputError(
                f"{printable(self._out)}: a different merge has started there meanwhile: this one is stopped"
            )

    def close(self) -> None:
        """Close the file."""
        self._give_up_claim()
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def remove(self) -> None:
        """Remove the journal, since the merge is complete."""
        self.close()
        remove_state(self._place)


def remove_state(place: Place) -> None:
    """Remove the journal of an output durably, if there is one."""
    state = place.state
    with world_errors(state):
        if state.is_dir() and not state.is_symlink():
            for entry in os.listdir(state):
                if entry == WORKERS or is_run(entry):
                    remove_small(state / entry)
            names = {path.name for path in place.in_state}
            for entry in os.listdir(state):
                if entry in names or is_private(entry) or finished_name(entry) in names:
                    (state / entry).unlink(missing_ok=True)
            state.rmdir()
        fsync_directory(place.folder)


def compare(now: Mapping[str, str], before: Mapping[str, str], directory: Path) -> None:
    """Refuse to resume a different merge; the message says what changed."""
    changed = [key for key in now if before.get(key) != now[key]] or [key for key in before if key not in now]
    if changed:
        raise OutputError(
            f"{printable(directory)}: holds an unfinished merge with a different {printable(', '.join(changed[:3]))}: rerun "
            "it with the original settings, or discard it with --overwrite"
        )


def line_of(record: Mapping[str, Any]) -> bytes:
    """Return a record as one line with its checksum."""
    text = json.dumps(record, separators=(",", ":")).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def _load(path: Path) -> tuple[Progress | None, bytes]:
    """Return the records of the valid lines, and the lines; the first invalid line ends them."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return None, b""
    progress: Progress | None = None
    length = 0
    for line in raw.splitlines(keepends=True):
        record = parse_line(line)
        if record is None:
            break
        try:
            progress = _apply(progress, record)
        except (TypeError, ValueError, KeyError):
            break
        length += len(line)
    return progress, raw[:length]


def parse_line(line: bytes) -> dict[str, Any] | None:
    """Return the record of a line; None if the line is not whole or not valid."""
    if not line.endswith(b"\n") or len(line) < 10 or line[8:9] != b" ":
        return None
    try:
        sound = int(line[:8], 16) == zlib.crc32(line[9:-1])
        record = json.loads(line[9:-1]) if sound else None
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def _apply(progress: Progress | None, record: dict[str, Any]) -> Progress:
    if progress is None:
        return Progress(texts_of(record["identity"]), files=known_files(record["files"]))
    if "identity" in record:
        raise ValueError
    if "done" in record:
        progress.receipts.append(receipt_of(record))
    elif "answer" in record:
        job_key, answers = record["answer"]
        number = job_key.rpartition("/")[2] if isinstance(job_key, str) else ""  # after the name of a stage
        if not (number.isascii() and number.isdigit()):
            raise ValueError
        progress.answers[job_key] = [list(one) for one in answers]
    elif "beside" in record:
        progress.beside += [
            name for name in record["beside"] if isinstance(name, str) and is_sound_path(name)
        ]
    elif "files" in record:
        progress.files = known_files(record["files"])
    return progress


def record_of(receipt: Receipt) -> dict[str, Any]:
    """Return a receipt as JSON holds it."""
    first, *others = receipt.crcs
    numbers = [
        receipt.job,
        receipt.start,
        receipt.stop,
        first,
        receipt.floored,
        receipt.not_finite,
        *receipt.kept,
    ]
    return {"done": numbers, **({"parts": others} if others else {})}


def receipt_of(record: Mapping[str, Any]) -> Receipt:
    """Return the receipt of a record; raise ValueError, TypeError or KeyError if it is not one."""
    job, start, stop, crc, floored, not_finite, *kept = _naturals(record["done"])
    crcs = (crc, *_naturals(record.get("parts", [])))
    if stop < start or any(crc >> 32 for crc in crcs):
        raise ValueError
    return Receipt(job, start, stop, crcs, tuple(kept), floored, not_finite)


def texts_of(value: Any) -> dict[str, str]:
    """Return a mapping of texts; raise ValueError if it is not one."""
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise ValueError
    return value


def known_files(value: Any) -> dict[str, Known]:
    """Return the input files of a record; raise ValueError or TypeError if it has none."""
    if not isinstance(value, dict):
        raise ValueError
    files = {}
    for key, (stamp, content) in value.items():
        if not isinstance(stamp, str) or not isinstance(content, str):
            raise ValueError
        files[key] = Known(stamp, content)
    return files


def _naturals(value: Any) -> list[int]:
    """Return `value` if it is a list of natural numbers; later checks rely on that."""
    if not isinstance(value, list) or not all(type(n) is int and n >= 0 for n in value):
        raise ValueError
    return value
