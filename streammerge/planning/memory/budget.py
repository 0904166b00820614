"""The memory budget of a merge, and the part of it that buffers may use.

`--memory` bounds the resident memory of the whole process. The interpreter and its libraries are subtracted first
(the reserve); the rest is the capacity, which all buffers share.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from streammerge.errors import BudgetError
from streammerge.machine import available_memory
from streammerge.records import dataclass
from streammerge.units import format_at_least, format_size

MIB = 1 << 20

_IN_FLIGHT = 432 * MIB
"""Bytes of all elementwise chunks together; more keeps no disk busier."""
_SMALL_CHUNK = 12 * MIB
"""Chunks of this size take no more of the interpreter's time for each byte than larger ones."""
SMALLEST_CAPACITY = 24 * MIB


@dataclass(frozen=True)
class Budget:
    """The memory of a merge, in bytes."""

    total: int
    """Bound of the process's peak resident memory."""
    reserve: int
    """Bytes that the process needs in addition to the buffers."""
    threads: int
    """Number of CPUs to keep busy."""

    @property
    def capacity(self) -> int:
        """Bytes that all buffers may hold together."""
        return self.total - self.reserve

    @property
    def workers(self) -> int:
        """Number of chunks in flight: more than CPUs, so that some read and write while others compute."""
        return self.threads + 3

    @property
    def resident_limit(self) -> int:
        """Bytes of the largest chunk that is held whole; two fit at a time, so that reading overlaps with computing."""
        return self.capacity // 2

    @property
    def chunk_target(self) -> int:
        """Target size of an elementwise chunk in bytes: reads are large, and all workers are busy.

        Many workers get smaller chunks, since the first touch of each page of a buffer costs as much as half of a sum.
        """
        return min(
            48 * MIB, max(_SMALL_CHUNK, _IN_FLIGHT // (self.workers + 1)), self.capacity // (self.workers + 1)
        )

    def less(self, nbytes: int) -> Budget:
        """Return the budget with `nbytes` more in the reserve."""
        return replace(self, reserve=self.reserve + nbytes)


def make_budget(memory: int | None, threads: int | None, reserve: int) -> Budget:
    """Return the budget for `memory` bytes (default: half of what is available) and `threads` CPUs.

    It may be too little: what a merge needs is known when its memory is divided.
    """
    total = available_memory() // 2 if memory is None else memory
    return Budget(total, reserve, threads or available_cpus())


def enough_budget(memory: int | None, threads: int | None, reserve: int) -> Budget:
    """Return the budget as `make_budget` does, of a command that needs no more than its reserve and some buffers.

    Raises
    ------
    BudgetError
        If `memory` does not suffice for the smallest buffers.
    """
    budget = make_budget(memory, threads, reserve)
    if budget.capacity < SMALLEST_CAPACITY:
        raise BudgetError(
            f"--memory {format_size(budget.total)} is too little: the process itself needs {format_size(reserve)}, "
            f"buffers {format_size(SMALLEST_CAPACITY)}; give at least {format_at_least(reserve + SMALLEST_CAPACITY)}",
            reserve + SMALLEST_CAPACITY,
        )
    return budget


def available_cpus() -> int:
    """Return the number of CPUs this process may use: its affinity, or its cgroup's quota if that is smaller."""
    cpus = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            cpus = min(cpus, max(1, int(quota) // int(period)))
    except (OSError, ValueError):
        pass
    return cpus
