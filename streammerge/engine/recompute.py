"""Recompute an output, or a sample of it, from its inputs, and compare the bits.

It is a merge in which everything outside the sample counts as done, and whose writer compares. Statistics of whole tensors
and of the whole model are computed again from the inputs, within the plan's budget and by its backend.
"""

from __future__ import annotations

import math
import random
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from streammerge.algebra.extent import Extent
from streammerge.dtypes import BITS
from streammerge.engine.opening import with_stages
from streammerge.engine.scheduler import Scheduler, Unrecorded
from streammerge.engine.worker import RunSpec, Worker
from streammerge.errors import InputError, WorldError, printable
from streammerge.formats.safetensors import read_header
from streammerge.io import volumes
from streammerge.io.buffer_pool import Bytes
from streammerge.io.reader import Reader
from streammerge.output.check import Recomputed
from streammerge.output.commit import cover, densities, floored, not_finite
from streammerge.output.identity import LAYOUT, VERSION, identify
from streammerge.output.inputs import ContentHasher, changed_contents
from streammerge.output.journal import Progress, Receipt
from streammerge.output.place import Place, place_of
from streammerge.planning.layout import Layout, Places, Shard, Slot, folder_of, is_shard
from streammerge.planning.plan import MergePlan
from streammerge.planning.schedule import ALIGN, Piece, remaining
from streammerge.records import dataclass
from streammerge.tensors.encoders.base import Stored
from streammerge.version import __version__

_PIECE = 1 << 20
"""Number of elements in a piece of the sample, if a method may be cut anywhere."""
_STEP = 1 << 20
"""Bytes compared at a time."""


def check_made_from(plan: MergePlan, out: Path, manifest: Mapping[str, Any], config: str) -> None:
    """Refuse a plan that differs from the one that made an output.

    The program's version and the shard size may differ, since they do not change any bit of a tensor.

    Raises
    ------
    InputError
        If it differs; the message names the difference.
    """
    reader = with_stages(Reader(), plan)
    try:
        identity = identify(plan, reader)
    finally:
        reader.close()
    changed = [name for name in identity.changed(manifest["identity"]) if name not in (VERSION, LAYOUT)]
    names = {part.name for job in plan.jobs for part in job.parts}
    if not changed and plan.adapter is None and manifest["tensors"].keys() != names:
        changed = ["set of tensors"]
    if changed:
        raise InputError(
            f"{printable(out)}: was made with a different {printable(', '.join(changed[:3]))} than {printable(config)} gives "
            "now; the two cannot be compared"
        )


def check_contents(
    plan: MergePlan,
    out: Path,
    manifest: Mapping[str, Any],
    on_tick: Callable[[int], None] = lambda nbytes: None,
) -> None:
    """Refuse inputs whose content differs from the hashes in a manifest, if it has any.

    Raises
    ------
    InputError
        If the content of a file differs; the message names the first such file.
    """
    if other := changed_contents(plan, manifest, ContentHasher(plan.budget.workers, on_tick=on_tick)):
        raise InputError(
            f"{printable(out)}: the content {printable(other[0], 300)} has changed since this output was made; the two "
            "cannot be compared"
        )


def pieces_of(plan: MergePlan) -> list[Piece]:
    """Return all tensors in pieces that do not depend on the budget; samples are drawn from them."""
    pieces = []
    for job, how in zip(plan.jobs, plan.work, strict=True):
        row = math.lcm(ALIGN, job.unit) if how.extent == Extent.ELEMENT else how.row
        whole = how.extent == Extent.TENSOR and how.mode == "resident"
        size = job.n_elements if whole else max(row, _PIECE // row * row)
        for start in range(0, job.n_elements, max(1, size)):
            pieces.append(Piece(job.ordinal, start, min(job.n_elements, start + size)))
    return pieces


def recompute(
    plan: MergePlan,
    out: Path,
    manifest: Mapping[str, Any],
    *,
    sample: int | None,
    seed: int,
    on_tick: Callable[[int], None] = lambda nbytes: None,
) -> Recomputed:
    """Recompute a sample of an output, or all of it, and compare. The seed determines the sample.

    Parameters
    ----------
    plan
        The plan that made the output; see `check_made_from`.
    sample
        Number of pieces; None: all.
    on_tick
        Called now and then with the bytes read so far.

    Raises
    ------
    ModelError
        If the headers of the output cannot be read.
    WorldError
        If the machine cannot read it, or an input changes during the run.
    """
    place = place_of(out)
    placed = _placed(plan, place, list(manifest["files"]))
    every = pieces_of(placed)
    chosen = every if sample is None else random.Random(seed).sample(every, min(sample, len(every)))
    reader = with_stages(Reader(), placed, tolerant=True)
    comparer = _Comparer(placed, place, reader)
    worker = Worker(RunSpec(placed, None, identify(placed, reader), tolerant=True), reader, comparer)
    try:
        scheduler = Scheduler(worker, [Unrecorded()], lambda tick: on_tick(tick.bytes_read))
        scheduler.run([Progress({}, all_but(placed, chosen))])
    finally:
        reader.close()
    check_inputs(placed)
    problems = [comparer.describe(key, manifest) for key in sorted(comparer.differences)]
    if sample is None and not problems:
        problems = _told_wrongly(placed, scheduler.receipts, manifest, place)
    n = sum(job.n_elements for job in placed.jobs)
    return Recomputed(len(chosen), len(every), comparer.elements, n, tuple(problems))


def _placed(plan: MergePlan, place: Place, names: Sequence[str]) -> MergePlan:
    """Return the plan with the output's own layout, which may have a different shard size."""
    parts = {part.name: (job.ordinal, i) for job in plan.jobs for i, part in enumerate(job.parts)}
    slots: dict[tuple[int, int], Slot] = {}
    shards = []
    for number, name in enumerate(sorted(name for name in names if is_shard(name, plan.template.folders))):
        refs, _, stamp = read_header(place.path(name))
        refs = {f"{folder_of(name)}{tensor}": ref for tensor, ref in refs.items()}
        for tensor, ref in refs.items():
            key = parts.get(tensor)
            if key is None or plan.jobs[key[0]].parts[key[1]] != Stored(tensor, ref.dtype, ref.shape):
                raise InputError(
                    f"{printable(place.path(name))}: tensor {printable(tensor)} is not one of the merge"
                )
            slots[key] = Slot(number, ref.offset, ref.nbytes)
        shards.append(Shard(name, b"", stamp.nbytes, tuple(parts[tensor] for tensor in refs)))
    lost = [tensor for tensor, key in parts.items() if key not in slots]
    if lost:
        raise InputError(f"{printable(place.out)}: tensor {printable(lost[0])} is in none of its files")
    placed = tuple(tuple(slots[job.ordinal, i] for i in range(len(job.parts))) for job in plan.jobs)
    return replace(plan, layout=Layout(tuple(shards), placed))


def all_but(plan: MergePlan, chosen: Sequence[Piece]) -> list[Receipt]:
    """Return receipts for everything outside the sample."""
    wanted: dict[int, list[tuple[int, int]]] = {}
    for piece in chosen:
        wanted.setdefault(piece.job, []).append((piece.start, piece.stop))
    return [
        Receipt(job.ordinal, start, stop, (0,) * len(job.parts))
        for job in plan.jobs
        for start, stop in remaining(job.n_elements, wanted.get(job.ordinal, ()))
    ]


def check_inputs(plan: MergePlan) -> None:
    """Raise WorldError if an input has changed since the plan was made."""
    for stamps in plan.stamped.values():
        for stamp in stamps:
            try:
                same = stamp.describes(volumes.stat(stamp.path, anew=True))
            except OSError:
                same = False
            if not same:
                raise WorldError(f"{printable(stamp.path)}: an input changed while it was read; run again")


def _told_wrongly(
    plan: MergePlan, receipts: Sequence[Receipt], manifest: Mapping[str, Any], place: Place
) -> list[str]:
    """Return the manifest's other fields that differ from the merge's results."""
    chosen = cover(plan, receipts)
    told: dict[str, Any] = {"densities": densities(plan, chosen), "not_finite": not_finite(plan, chosen)}
    if plan.fishers:
        told["floored"] = floored(plan, chosen)
    return [
        f"{printable(place.manifest.name)}: `{field}` is not what the merge gives"
        for field, value in told.items()
        if (manifest.get(field) or None) != (value or None)
    ]


@dataclass(frozen=True)
class _Difference:
    """The first difference between a tensor and its recomputed values, and their number."""

    first: int
    """Element."""
    count: int
    found: str
    recomputed: str
    """The first differing element, both as hexadecimal digits of its bytes."""


class _Comparer:
    """Receives merged bytes and compares them with those of an output."""

    def __init__(self, plan: MergePlan, place: Place, reader: Reader) -> None:
        self._plan, self._place, self._reader = plan, place, reader
        self._lock = threading.Lock()
        self._places = Places(plan.layout)
        self.differences: dict[tuple[int, int], _Difference] = {}
        """By job and part."""
        self.elements = 0
        """Compared."""
        self.bytes_written = 0

    def write(self, shard: int, offset: int, data: Bytes) -> None:
        """Compare data with the bytes at an absolute offset of a shard."""
        if not data.size:
            return
        begins, key = self._places.find(shard, offset)
        bits = BITS[self._part(key).dtype]
        path = str(self._place.path(self._plan.layout.shards[shard].name))
        for position in range(0, data.size, _STEP):
            ours = data[position : position + _STEP]
            theirs = np.empty(ours.size, np.uint8)
            self._reader.read_into(path, offset + position, theirs)
            if not np.array_equal(ours, theirs):
                self._note(key, (offset + position - begins) * 8 // bits, ours, theirs)
        job = self._plan.jobs[key[0]]
        with self._lock:
            if not key[1]:  # the parts that decode an element are not elements of their own
                self.elements += data.size * job.n_elements // job.parts[0].nbytes

    def _part(self, key: tuple[int, int]) -> Stored:
        return self._plan.jobs[key[0]].parts[key[1]]

    def _note(self, key: tuple[int, int], start: int, ours: Bytes, theirs: Bytes) -> None:
        width = max(1, BITS[self._part(key).dtype] // 8)
        differ = np.flatnonzero((ours != theirs).reshape(-1, width).any(axis=1))
        at = slice(differ[0] * width, (differ[0] + 1) * width)
        found, recomputed = (
            f"0x{int.from_bytes(side[at].tobytes(), 'little'):0{2 * width}x}" for side in (theirs, ours)
        )
        new = _Difference(start + int(differ[0]), differ.size, found, recomputed)
        with self._lock:
            old = self.differences.get(key)
            earlier = new if old is None or new.first < old.first else old
            self.differences[key] = replace(earlier, count=new.count + (old.count if old else 0))

    def early(self) -> _Comparer:
        """See `Sink`: bytes are taken in any order."""
        return self

    def sync(self, shards: set[int]) -> None:
        """See `Sink`; nothing is written."""

    def describe(self, key: tuple[int, int], manifest: Mapping[str, Any]) -> str:
        """Return one line on how a tensor differs."""
        part, what = self._part(key), self.differences[key]
        file = self._plan.layout.shards[self._plan.layout.slots[key[0]][key[1]].shard].name
        more = f", and {what.count - 1} more elements differ" if what.count > 1 else ""
        version = manifest["streammerge"]
        other = (
            f" (made by version {printable(version, 40)}, this is {__version__})"
            if version != __version__
            else ""
        )
        return (
            f"{file}: tensor {printable(part.name)}: element {what.first} is {what.found}, recomputed from the inputs "
            f"{what.recomputed}{more}{other}"
        )
