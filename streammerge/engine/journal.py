"""What is finished, durably: one line per record, each with its own checksum, a torn tail ignored.

The first line says what the output depends on; a merge continues only if it says the same. A line is
appended after the bytes it speaks of are durable.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from streammerge.engine.writer import fsync_directory, world_errors
from streammerge.errors import OutputError, printable

STATE = ".streammerge"
NAME = "journal.jsonl"


@dataclass(frozen=True)
class Receipt:
    """Elements of one tensor that are written: their checksum and what there is to tell of them."""

    job: int
    start: int
    stop: int
    crc: int
    kept: tuple[int, ...] = ()
    """Surviving entries of each model's task vector."""
    floored: int = 0
    """Elements that a Fisher floor decided."""
    not_finite: int = 0
    """Elements that are NaN or infinite."""


@dataclass
class Progress:
    """What a journal records."""

    identity: Mapping[str, str]
    receipts: list[Receipt] = field(default_factory=list)
    answers: dict[str, Any] = field(default_factory=dict)
    """Answers of streamed statistics so far, by job."""


class Journal:
    """An open journal, appended to by one thread."""

    def __init__(self, directory: Path, identity: Mapping[str, str]) -> None:
        self._state = directory / STATE
        self._path = self._state / NAME
        self._identity = dict(identity)
        self._descriptor = -1

    def open(self) -> Progress:
        """Return what is recorded and make the journal ready; a new one if there is none.

        Raises
        ------
        OutputError
            If the recorded merge is another one; the message says what changed.
        """
        with world_errors(self._path):
            progress, length = _load(self._path)
            if progress is not None:
                compare(self._identity, progress.identity, self._state.parent)
            self._state.mkdir(exist_ok=True)
            flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            self._descriptor = os.open(self._path, flags, 0o666)
            os.ftruncate(self._descriptor, length)
            os.lseek(self._descriptor, length, os.SEEK_SET)
            if progress is None:
                progress = Progress(self._identity)
                self._append([{"identity": self._identity}])
            fsync_directory(self._state)
            fsync_directory(self._state.parent)
        return progress

    def add(self, receipts: Sequence[Receipt]) -> None:
        """Record finished elements."""
        self._append(
            [{"done": [r.job, r.start, r.stop, r.crc, r.floored, r.not_finite, *r.kept]} for r in receipts]
        )

    def add_answers(self, answers: Mapping[str, Any]) -> None:
        """Record the answers of streamed statistics, by job."""
        self._append([{"answer": [job, known]} for job, known in answers.items()])

    def _append(self, records: Sequence[Mapping[str, Any]]) -> None:
        data = b"".join(_line(record) for record in records)
        with world_errors(self._path):
            view = memoryview(data)
            while view:
                view = view[os.write(self._descriptor, view) :]
            os.fdatasync(self._descriptor)

    def close(self) -> None:
        """Close the file."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def remove(self) -> None:
        """Remove the journal: the merge is complete."""
        self.close()
        remove_state(self._state.parent)


def remove_state(directory: Path) -> None:
    """Remove the journal of an output directory, if there is one."""
    state = directory / STATE
    if state.is_dir() and not state.is_symlink():
        with world_errors(state):
            for path in (state / NAME,):
                path.unlink(missing_ok=True)
            state.rmdir()
            fsync_directory(directory)


def compare(now: Mapping[str, str], before: Mapping[str, str], directory: Path) -> None:
    """Refuse to continue a merge that is not this one, naming what changed."""
    changed = [key for key in now if before.get(key) != now[key]] or [key for key in before if key not in now]
    if changed:
        raise OutputError(
            f"{printable(directory)}: holds an unfinished merge with another {printable(', '.join(changed[:3]))}; "
            "run it with what it began with, or start over with --overwrite"
        )


def _line(record: Mapping[str, Any]) -> bytes:
    text = json.dumps(record, separators=(",", ":")).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def _load(path: Path) -> tuple[Progress | None, int]:
    """Return what the sound lines say and their length; the first unsound line ends them."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return None, 0
    progress: Progress | None = None
    length = 0
    for line in raw.splitlines(keepends=True):
        record = _parse(line)
        if record is None:
            break
        try:
            progress = _apply(progress, record)
        except (TypeError, ValueError, KeyError):
            break
        if progress is None:
            break
        length += len(line)
    return progress, length if progress is not None else 0


def _parse(line: bytes) -> dict[str, Any] | None:
    if not line.endswith(b"\n") or len(line) < 10 or line[8:9] != b" ":
        return None
    try:
        sound = int(line[:8], 16) == zlib.crc32(line[9:-1])
        record = json.loads(line[9:-1]) if sound else None
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def _apply(progress: Progress | None, record: dict[str, Any]) -> Progress | None:
    if "identity" in record:
        return Progress(_texts(record["identity"])) if progress is None else None
    if progress is None:
        return None
    if "done" in record:
        job, start, stop, crc, floored, not_finite, *kept = _naturals(record["done"])
        if stop < start or crc >> 32:
            raise ValueError
        progress.receipts.append(Receipt(job, start, stop, crc, tuple(kept), floored, not_finite))
    elif "answer" in record:
        job_key, answers = record["answer"]
        if not (isinstance(job_key, str) and job_key.isascii() and job_key.isdigit()):
            raise ValueError
        progress.answers[job_key] = [list(one) for one in answers]
    return progress


def _texts(value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise ValueError
    return value


def _naturals(value: Any) -> list[int]:
    """Return `value`, whole numbers from 0 on, as the checks of what they stand for take for granted."""
    if not isinstance(value, list) or not all(type(n) is int and n >= 0 for n in value):
        raise ValueError
    return value
