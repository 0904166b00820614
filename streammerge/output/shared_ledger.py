"""What is claimed and done of work that several processes share: small files, of which the records are the truth.

::

    .streammerge/workers/<worker>.json     signs of life
    .streammerge/<run>/run.json            what is shared: written once by whoever comes first
    .streammerge/<run>/<unit>.claim        a hint that a process is at it, to save double work
    .streammerge/<run>/<unit>.done         the truth: written whole, after what it tells of was synced

Nothing is right because of a claim or a lock: two processes at one unit do the same thing twice, and one of the two records
is the one that counts. `<run>` is a digest of all that the work depends on, so processes with a different config, version,
seed or input meet in a different directory.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from streammerge.output.heartbeat import Heard, signs_of, stale_seconds
from streammerge.output.journal import line_of, parse_line
from streammerge.output.place import RUN, WORKERS
from streammerge.output.volume import Volume

CLAIM, DONE = ".claim", ".done"
_FAILED = "failed.json"


def run_of(identity: Mapping[str, str]) -> str:
    """Return the name of the run that has an identity: 16 hexadecimal digits."""
    text = json.dumps(dict(identity), sort_keys=True).encode("utf-8", "surrogatepass")
    return hashlib.blake2b(text, digest_size=8).hexdigest()


class SharedLedger:
    """The claims and records of one run, as one of its processes sees them; may be used from many threads.

    Parameters
    ----------
    volume
        That of the working files; the folder of the run must exist.
    run
        See `run_of`.
    worker
        The token of this process.
    """

    def __init__(self, volume: Volume, run: str, worker: str) -> None:
        self._volume, self.run, self.worker = volume, run, worker
        self._held: set[str] = set()
        self._heard, self._owners = Heard(volume), dict[str, str]()
        """The token of the process that was seen to claim a unit, as long as lists name the claim."""
        self.taken_over: list[tuple[str, str]] = []
        """Units taken over from processes that gave no sign of life, each with the process's token."""

    def found(self, about: Mapping[str, Any]) -> dict[str, Any]:
        """Return what the run is about: `about`, unless a different process came first."""
        name = f"{self.run}/{RUN}"
        self._volume.create(name, line_of(about))
        known = self.about()
        if known is None:  # a different process is writing it, or died in the middle
            self._volume.put(name, line_of(about))
            known = self.about()
        return dict(about) if known is None else known

    def about(self) -> dict[str, Any] | None:
        """Return what the run is about; None if nobody has said so yet, or if the run has ended."""
        return self._read(f"{self.run}/{RUN}")

    def claim(self, unit: str) -> bool:
        """Claim a unit; return False if a process that is alive is at it, so far as can be told.

        Raises
        ------
        Gone
            If the run has ended.
        """
        if (known := self._owners.get(unit)) and self._heard.of(known):
            return False
        name = f"{self.run}/{unit}{CLAIM}"
        if not self._volume.create(name, self.worker.encode()):
            owner = (self._volume.read(name) or b"").decode("ascii", "replace")
            if owner != self.worker:
                self._owners[unit] = owner
                if self._is_at_it(owner, name):
                    return False
                self._volume.put(name, self.worker.encode(), durable=False)
                self.taken_over.append((unit, owner))
        self._held.add(unit)
        return True

    def seize(self, unit: str) -> None:
        """Claim a unit whoever is at it, for a process that is told to do it by what knows better.

        Raises
        ------
        Gone
            If the run has ended.
        """
        self._volume.put(f"{self.run}/{unit}{CLAIM}", self.worker.encode(), durable=False)
        self._held.add(unit)

    def _is_at_it(self, owner: str, claim: str) -> bool:
        """Return whether the owner of a claim gave a sign of life lately; a claim without an owner counts by its own age."""
        if owner:
            return self._heard.of(owner)
        age = self._volume.age(claim)
        return age is not None and age <= stale_seconds()

    def record(self, unit: str, value: Mapping[str, Any]) -> None:
        """Record a unit as done, for good; what it tells of must be durable already.

        Raises
        ------
        Gone
            If the run has ended.
        """
        self._volume.put(f"{self.run}/{unit}{DONE}", line_of(value))
        self._held.discard(unit)

    def value(self, unit: str) -> dict[str, Any] | None:
        """Return the record of a unit; None if there is none, or none that is whole."""
        return self._read(f"{self.run}/{unit}{DONE}")

    def done(self) -> set[str]:
        """Return the units that are recorded."""
        names = self._volume.names(self.run)
        claimed = self._of(names, CLAIM)
        self._owners = {unit: owner for unit, owner in self._owners.items() if unit in claimed}
        return self._of(names, DONE)

    def workers(self) -> int:
        """Return the number of processes that have begun and not taken leave; some may have died."""
        return len(self._volume.names(WORKERS))

    def claimed(self) -> dict[str, str]:
        """Return the token of the process that claims each unit which is not done."""
        names = self._volume.names(self.run)
        units = self._of(names, CLAIM) - self._of(names, DONE)
        owners = {unit: self._volume.read(f"{self.run}/{unit}{CLAIM}") for unit in sorted(units)}
        return {unit: raw.decode("ascii", "replace") for unit, raw in owners.items() if raw}

    def forget(self, unit: str) -> None:
        """Remove the record and the claim of a unit, so that it is done again."""
        for ending in (DONE, CLAIM):
            self._volume.remove(f"{self.run}/{unit}{ending}")

    def release(self) -> None:
        """Give up the claims of units that are not done: others need not wait for this process to go stale."""
        for unit in sorted(self._held):
            self._volume.remove(f"{self.run}/{unit}{CLAIM}")
        self._held.clear()

    @property
    def in_hand(self) -> frozenset[str]:
        """The units that this process has claimed and not recorded."""
        return frozenset(self._held)

    # --- failures of the work itself, which no other process would escape

    def fail(self, kind: str, message: str) -> None:
        """Tell all processes that the work cannot be done."""
        value = {"kind": kind, "message": message, "worker": self.worker}
        self._volume.put(f"{self.run}/{_FAILED}", line_of(value))

    def failure(self) -> tuple[str, str] | None:
        """Return kind and message of a failure that a process met; None without one."""
        value = self._read(f"{self.run}/{_FAILED}")
        return None if value is None else (str(value.get("kind")), str(value.get("message")))

    def forget_failure(self) -> None:
        """Remove a failure that stopped all processes of an earlier attempt; while one is alive it stays."""
        signs = signs_of(self._volume)
        if not any(sign.is_fresh and sign.run == self.run and sign.worker != self.worker for sign in signs):
            self._volume.remove(f"{self.run}/{_FAILED}")

    def _of(self, names: Sequence[str], ending: str) -> set[str]:
        return {name[len(self.run) + 1 : -len(ending)] for name in names if name.endswith(ending)}

    def _read(self, name: str) -> dict[str, Any] | None:
        raw = self._volume.read(name)
        return None if raw is None else parse_line(raw)


def in_turn(units: Sequence[str], sizes: Sequence[int], worker: str) -> list[str]:
    """Return units in the order in which one process tries them.

    Large ones come first, so that the end is short; among those of about the same size each process starts at a different
    place, so that few want the same one at once.
    """
    start = int(worker, 16) % max(1, len(units))
    turned = [*range(start, len(units)), *range(start)]
    return [units[i] for i in sorted(turned, key=lambda i: -sizes[i].bit_length())]
