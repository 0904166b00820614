"""Simulates a loss of power: every change to the file system is recorded, and the log cut anywhere.

POSIX promises little. Of a file, what was written before its last good sync is on the disk; of a directory, the names
given before its last good sync. Of what came after, any part may be there and any part not, in any order: a rename
without the data of the file it renames, a file's length without its bytes, half a write. The data that a failed sync
did not write stay in the page cache, marked clean, and no later sync writes them. (Names do not: a file system keeps
them in a journal, and one whose journal cannot be written stops for good.)

`Recorder` stands between a merge and the functions of `os`; `states` yields the directories that may be found after a
cut. The idea is that of ALICE (OSDI 2014) and of LevelDB's FaultInjectionTestEnv.
"""

from __future__ import annotations

import hashlib
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tests.laws.resume.file_log import ROOT, Data, Link, Move, Name, Op, Resize, Sync, Tree, Write, changed

# --- what may be found afterwards


def pending(log: Sequence[Op]) -> list[int]:
    """Return the places in a log of the changes that no good sync has made durable."""
    waiting: dict[int, list[int]] = {}
    lost: list[int] = []
    for place, op in enumerate(log):
        if not isinstance(op, Sync):
            waiting.setdefault(changed(op), []).append(place)
        elif op.good:
            waiting.pop(op.target, None)
        elif waiting.get(op.target) and isinstance(log[waiting[op.target][0]], Resize | Write):
            lost += waiting.pop(op.target)
    return sorted(lost + [place for places in waiting.values() for place in places])


def build(log: Sequence[Op], dropped: set[int], torn: dict[int, list[Data]]) -> Tree:
    """Return what is found if some changes of a log are not on the disk and some only in part."""
    files: dict[int, bytearray] = {}
    names: dict[int, dict[str, int]] = {ROOT: {}}
    for place, op in enumerate(log):
        if place in dropped or isinstance(op, Sync):
            continue
        if isinstance(op, Resize | Write):
            for part in torn.get(place, [op]):
                _put(files.setdefault(part.file, bytearray()), part)
        else:
            _rename(names.setdefault(op.directory, {}), op)
            if isinstance(op, Link):
                if op.is_directory:
                    names.setdefault(op.target, {})
                else:
                    files.setdefault(op.target, bytearray())
            elif isinstance(op, Move):
                files.setdefault(op.target, bytearray())
    tree: Tree = {}

    def walk(directory: int, prefix: str) -> None:
        for name, target in names[directory].items():
            if target in files:
                tree[prefix + name] = bytes(files[target])
            elif target in names:
                tree[prefix + name] = None
                walk(target, f"{prefix}{name}/")

    walk(ROOT, "")
    return tree


def _put(content: bytearray, op: Data) -> None:
    end = op.nbytes if isinstance(op, Resize) else op.offset + len(op.data)
    if end > len(content):
        content.extend(bytes(end - len(content)))
    if isinstance(op, Write):
        content[op.offset : end] = op.data
    elif not op.grow_only:
        del content[op.nbytes :]


def _rename(names: dict[str, int], op: Name) -> None:
    if isinstance(op, Link):
        names[op.name] = op.target
        return
    if names.get(op.name) == op.target:
        del names[op.name]
    if isinstance(op, Move):
        names[op.new_name] = op.target


def slices(op: Write, *bounds: tuple[int, int]) -> list[Data]:
    """Return parts of a write."""
    return [replace(op, offset=op.offset + a, data=op.data[a:b]) for a, b in bounds if a < b]


def length_only(op: Write) -> list[Data]:
    """Return what lengthens a file as a write does, without its bytes."""
    return [Resize(op.file, op.offset + len(op.data), True)]


_SECTOR = 512


TEARS: dict[str, Callable[[Write], list[Data]]] = {
    "prefix": lambda op: slices(op, (0, len(op.data) // 2)),
    "suffix": lambda op: slices(op, (len(op.data) // 2, len(op.data))),
    "zeros": length_only,
    "prefix, then zeros": lambda op: [*length_only(op), *slices(op, (0, len(op.data) // 3))],
    "every other sector": lambda op: [
        *length_only(op),
        *slices(op, *((i, i + _SECTOR) for i in range(0, len(op.data), 2 * _SECTOR))),
    ],
}


def choices(
    log: Sequence[Op], chance: random.Random, n_random: int
) -> Iterator[tuple[set[int], dict[int, list[Data]]]]:
    """Yield which changes of a log are not on the disk, and which in part: systematic ones, then random ones."""
    open_ = pending(log)
    data = {place for place in open_ if isinstance(log[place], Resize | Write)}
    names = set(open_) - data
    writes = {place: op for place in data if isinstance(op := log[place], Write)}
    for gone in (set(), names):
        yield gone, {}
        yield gone | data, {}
        for tear in TEARS.values():
            yield gone, {place: tear(op) for place, op in writes.items()}
    for place in sorted(names):
        for lost_data in (set(), data):
            yield lost_data | {place}, {}
            yield lost_data | (names - {place}), {}
    for place in sorted(data):
        yield {place}, {}
        yield data - {place}, {}
        if place in writes:
            for tear in TEARS.values():
                yield set(), {place: tear(writes[place])}
    for _ in range(n_random if open_ else 0):
        share = chance.random()
        gone = {place for place in open_ if chance.random() < share}
        torn = {}
        for place, op in writes.items():
            if chance.random() < 0.3:
                cuts = sorted(chance.randint(0, len(op.data)) for _ in range(4))
                kept = slices(op, (cuts[0], cuts[1]), (cuts[2], cuts[3]))
                torn[place] = [*(length_only(op) if chance.random() < 0.5 else []), *kept]
        yield gone, torn


def digest(tree: Tree) -> bytes:
    """Return what two equal trees have in common."""
    state = hashlib.blake2b(digest_size=16)
    for path, content in sorted(tree.items()):
        state.update(repr((path, None if content is None else hashlib.blake2b(content).hexdigest())).encode())
    return state.digest()


@dataclass(frozen=True)
class Blackout:
    """One loss of power: where the log is cut, what is gone and what is there in part."""

    cut: int
    dropped: frozenset[int]
    torn: dict[int, list[Data]]

    def tree(self, log: Sequence[Op]) -> Tree:
        """Return what is found."""
        return build(log[: self.cut], set(self.dropped), self.torn)


def blackouts(
    log: Sequence[Op], begin: int, chance: random.Random, n_random: int, limit: int | None = None
) -> list[Blackout]:
    """Return a loss of power for every different directory that may be found after a cut at or after `begin`.

    With a limit only that many, spread over the cuts.
    """
    cuts = list(range(begin, len(log) + 1))
    chance.shuffle(cuts)
    seen: set[bytes] = set()
    found: list[Blackout] = []
    while limit is None or len(found) < limit:
        before = len(found)
        for cut in cuts:
            some = list(choices(log[:cut], chance, n_random))
            if limit is not None:
                some = chance.sample(some, min(len(some), 2))
            for dropped, torn in some:
                one = Blackout(cut, frozenset(dropped), torn)
                key = digest(one.tree(log))
                if key not in seen:
                    seen.add(key)
                    found.append(one)
            if limit is not None and len(found) >= limit:
                return found[:limit]
        if limit is None or len(found) == before:
            break
    return found


def lay_out(tree: Tree, root: Path) -> None:
    """Make a directory that holds a tree and nothing else."""
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    for path, content in sorted(tree.items()):
        if content is None:
            (root / path).mkdir()
        else:
            (root / path).write_bytes(content)


def tree_of(root: Path) -> Tree:
    """Return what a directory holds."""
    return {
        str(path.relative_to(root)): None if path.is_dir() else path.read_bytes() for path in root.rglob("*")
    }
