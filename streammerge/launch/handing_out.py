"""Which worker does which unit, when a scheduler hands them out: pure bookkeeping.

Workers offer to do some units (`streammerge.engine.taking.HandedOut`). Each unit is given to one of them, and again to a
different one if that worker is lost, or gives no sign of life. Two that do the same unit do no harm.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence


class HandingOut:
    """The offers of workers, which are known by numbers, and the units that they have in hand."""

    def __init__(self) -> None:
        self._offers: dict[int, Sequence[str]] = {}
        self._in_hand: dict[int, set[str]] = {}
        self._silent: frozenset[int] = frozenset()
        self._recorded: set[str] = set()

    def offer(self, worker: int, units: Sequence[str]) -> None:
        """Take note that a worker will do one of some units; this replaces an earlier offer."""
        self._offers[worker] = units

    def recorded(self, worker: int, unit: str) -> None:
        """Take note that a unit is done."""
        self._recorded.add(unit)
        self.given_back(worker, unit)

    def given_back(self, worker: int, unit: str) -> None:
        """Take note that a worker does not do a unit."""
        self._in_hand.get(worker, set()).discard(unit)

    def lost(self, worker: int) -> None:
        """Take back all that a worker has in hand, and its offer."""
        self._offers.pop(worker, None)
        self._in_hand.pop(worker, None)

    def silent(self, workers: Collection[int]) -> None:
        """Take note of the workers that give no sign of life; what they have in hand is given to others as well."""
        self._silent = frozenset(workers)

    def next(self) -> Iterator[tuple[int, str]]:
        """Yield workers and the unit that each is to do; an empty one if nothing of its offer is left."""
        for worker, units in list(self._offers.items()):
            left = [unit for unit in units if unit not in self._recorded]
            taken = self._in_hand.get(worker, set()).union(
                *(held for other, held in self._in_hand.items() if other not in self._silent)
            )
            unit = next((unit for unit in left if unit not in taken), None)
            if unit is None and left:
                continue
            del self._offers[worker]
            if unit is not None:
                self._in_hand.setdefault(worker, set()).add(unit)
            yield worker, unit or ""
