"""The files that a merge reads, and how they are recognised when it resumes.

A *stamp* is the file system's metadata: size, dates, inode, and for a model the digest of its header. It costs nothing,
and differs whenever the content may differ, also for a file that was only touched or copied. A *content hash* is the
SHA-256 of all bytes: it costs a read of the file, and distinguishes these cases. Sidecar files are always hashed, weights
on request (`merge --hash-inputs`).
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import suppress
from typing import Any

from streammerge.checkpoint.companions import CompanionIndex
from streammerge.checkpoint.index import TensorIndex
from streammerge.errors import ModelError, OutputError, WorldError, printable
from streammerge.io import volumes
from streammerge.io.files import pread, reading
from streammerge.io.stamp import FileStamp, check_unchanged
from streammerge.output.journal import Known
from streammerge.planning.plan import MergePlan
from streammerge.records import dataclass
from streammerge.tensors.fingerprint import files_digest

CHUNKS = "chunks"
"""The name that stands for all chunk files of a store."""
_STEP = 1 << 20
"""Bytes read and hashed at a time."""
_TICK_SECONDS = 0.25
_AHEAD = 1 << 25
"""Bytes that the kernel is asked to read ahead."""


@dataclass(frozen=True)
class InputFile:
    """One file that a merge reads, or all chunk files of a Fisher store, which count as one."""

    group: str
    """``of base`` for a model's files, or ``beside base`` for its sidecar files."""
    name: str
    nbytes: int
    stamp: str
    """A digest of the file's metadata when the merge was planned."""
    paths: Callable[[], Iterable[str]]
    check: Callable[[], None]
    """Function that raises WorldError if the metadata have changed."""

    @property
    def key(self) -> str:
        """The file's name in a journal."""
        return f"{self.group}/{self.name}"


def find_inputs(plan: MergePlan, sidecars: Mapping[str, FileStamp]) -> list[InputFile]:
    """Return every file that a merge reads: of the models, of their stores, and sidecar files."""
    found = {
        (reference, stamp.path): _plain(f"of {reference}", stamp)
        for reference, stamps in plan.stamped.items()
        for stamp in stamps
    }
    stores = {index.reference: index for index in plan.stores if index.has_chunks}
    return [
        *found.values(),
        *(_chunks_of(index) for index in stores.values()),
        *(_plain(beside(plan), stamp, name) for name, stamp in sorted(sidecars.items())),
    ]


def beside(plan: MergePlan) -> str:
    """Return the group of the sidecar files that are copied to the output."""
    return f"beside {plan.template.reference}"


def _plain(group: str, stamp: FileStamp, name: str = "") -> InputFile:
    return InputFile(
        group,
        name or os.path.basename(stamp.path),
        stamp.nbytes,
        files_digest([stamp]),
        lambda: (stamp.path,),
        lambda: check_unchanged(stamp),
    )


def _chunks_of(index: CompanionIndex) -> InputFile:
    """Return the chunk files of a store as one input; there may be 100,000, so only a digest of their stamps is kept."""

    def paths() -> Iterator[str]:
        for ref in index.values():
            yield from ref.files(0, ref.n_elements)

    stamp, nbytes = _stamp_of(paths())

    def check() -> None:
        if _stamp_of(paths())[0] != stamp:
            raise WorldError(
                f"{printable(index.reference)}: the store changed during the merge: start over with --overwrite"
            )

    return InputFile(f"of {index.reference}", CHUNKS, nbytes, stamp, paths, check)


def _stamp_of(paths: Iterable[str]) -> tuple[str, int]:
    """Return a digest of some files' metadata, and their size; a missing file is reported when it is read."""
    digest, total = hashlib.blake2b(digest_size=16), 0
    for path in paths:
        try:
            s = volumes.stat(path)
        except OSError as error:
            digest.update(repr(error.errno).encode())
            continue
        digest.update(repr((s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino)).encode())
        total += s.st_size
    return digest.hexdigest(), total


class ContentHasher:
    """Hashes input files, several at a time.

    Parameters
    ----------
    threads
        Number of files hashed at once.
    check_stop
        Called often, from any thread; an exception that it raises ends the hashing.
    on_tick
        Called periodically, from the thread that calls `hash`, with the bytes hashed so far.
    """

    def __init__(
        self,
        threads: int,
        check_stop: Callable[[], None] = lambda: None,
        on_tick: Callable[[int], None] = lambda nbytes: None,
    ) -> None:
        self._threads, self._check_stop, self._on_tick = threads, check_stop, on_tick
        self._lock = threading.Lock()
        self._nbytes = 0
        self._known: dict[tuple[str, str], str] = {}

    def hash_once(self, files: Sequence[InputFile]) -> dict[str, str]:
        """Return the content hashes of files as `hash` does; a file of several outputs is hashed for the first only."""
        new = [file for file in files if (file.key, file.stamp) not in self._known]
        found = self.hash(new)
        self._known |= {(file.key, file.stamp): found[file.key] for file in new}
        return {file.key: self._known[file.key, file.stamp] for file in files}

    def hash(self, files: Sequence[InputFile]) -> dict[str, str]:
        """Return the content hashes of files by their keys.

        A single file has the SHA-256 that ``sha256sum`` prints; a group has the SHA-256 of its files' concatenated SHA-256.

        Raises
        ------
        ModelError
            If one is missing.
        WorldError
            If the machine cannot read it.
        """
        with ThreadPoolExecutor(self._threads, thread_name_prefix="hash") as threads:
            futures = {file.key: threads.submit(self._hash_one, file) for file in files}
            try:
                while wait(futures.values(), _TICK_SECONDS, FIRST_EXCEPTION).not_done:
                    if any(future.done() and future.exception() for future in futures.values()):
                        break
                    self._on_tick(self._nbytes)
                return {key: future.result() for key, future in futures.items()}
            finally:
                threads.shutdown(cancel_futures=True)

    def _hash_one(self, file: InputFile) -> str:
        digests = [self._hash_path(path) for path in file.paths()]
        return (digests[0] if len(digests) == 1 else hashlib.sha256(b"".join(digests)).digest()).hex()

    def _hash_path(self, path: str) -> bytes:
        digest, position = hashlib.sha256(), 0
        with reading(path) as (descriptor, _):
            while True:
                self._check_stop()
                if isinstance(descriptor, int) and position % _AHEAD == 0:
                    os.posix_fadvise(descriptor, position, 2 * _AHEAD, os.POSIX_FADV_WILLNEED)
                data = pread(descriptor, _STEP, position)
                if not data:
                    return digest.digest()
                digest.update(data)
                position += len(data)
                with self._lock:
                    self._nbytes += len(data)


def recognize(
    files: Sequence[InputFile], before: Mapping[str, Known], hasher: ContentHasher, what: str
) -> dict[str, Known]:
    """Return the stamps and hashes of input files, after checking that they match the journal.

    A file whose stamp differs is hashed if the journal has its content hash; other files cost nothing.

    Parameters
    ----------
    what
        The beginning of the error message: the directory and its content.

    Raises
    ------
    OutputError
        If a file differs; the message names the first.
    """
    now = {file.key: file for file in files}
    for key in sorted({*now, *before}):
        if key not in now or key not in before:
            raise _another(what, key, "has come" if key in now else "is gone")
    moved = [file for key, file in now.items() if file.stamp != before[key].stamp]
    for file in moved:
        if not before[file.key].content:
            raise _another(
                what,
                file.key,
                "has a different date, inode or size, and there is no content hash to compare",
            )
    for key, content in hasher.hash(moved).items():
        if content != before[key].content:
            raise _another(what, key, "has a different content")
    return {key: Known(file.stamp, before[key].content) for key, file in now.items()}


def confirm(file: InputFile, known: Known, hasher: ContentHasher) -> None:
    """Raise WorldError if an input file changed during the merge; with a content hash, touching it is not a change.

    As for `recognize`, that takes a content hash.
    """
    try:
        file.check()
    except WorldError:
        with suppress(ModelError):  # it no longer exists
            if known.content and hasher.hash([file])[file.key] == known.content:
                return
        raise


def content_of(index: TensorIndex | CompanionIndex, contents: Mapping[str, str]) -> dict[str, str]:
    """Return the content hashes of an input's files by name, for a manifest; empty unless all are known."""
    group = f"of {index.reference}/"
    names = [os.path.basename(stamp.path) for stamp in index.stamps]
    names += [CHUNKS] if index.has_chunks else []
    hashed = {name: contents.get(group + name, "") for name in names}
    return hashed if all(hashed.values()) else {}


def recorded_contents(plan: MergePlan, manifest: Mapping[str, Any]) -> dict[str, str]:
    """Return the content hashes that a manifest records, by the files' keys."""
    inputs = zip(plan.inputs, [entry.get("sha256", {}) for entry in manifest["inputs"]], strict=False)
    fishers = zip(plan.fishers, manifest.get("fisher_sha256", []), strict=False)
    named = [(index.reference, hashes) for index, hashes in inputs]
    named += [(index.reference, hashes) for index, hashes in fishers]
    return {
        f"of {reference}/{name}": content for reference, hashes in named for name, content in hashes.items()
    }


def changed_contents(plan: MergePlan, manifest: Mapping[str, Any], hasher: ContentHasher) -> list[str]:
    """Return the input files whose content differs from a manifest's record; all recorded files are read."""
    recorded = recorded_contents(plan, manifest)
    hashed = hasher.hash([file for file in find_inputs(plan, {}) if file.key in recorded])
    return [key for key, content in recorded.items() if hashed.get(key) != content]


def _another(what: str, key: str, why: str) -> OutputError:
    group, _, name = key.rpartition("/")
    return OutputError(
        f"{what} with a different version of the files {printable(group, 200)}: {printable(name)} {why}: rerun it with the "
        "original files, or discard it with --overwrite"
    )
