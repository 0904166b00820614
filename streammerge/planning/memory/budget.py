"""The memory budget of a merge: how much there is, and how much of it the buffers may take.

`--memory` bounds the resident memory of the whole process. What the interpreter and its libraries
take is subtracted first; the rest, the capacity, is all that buffers may ever hold together.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

from streammerge.errors import BudgetError
from streammerge.machine import available_memory
from streammerge.units import format_at_least, format_size

MIB = 1 << 20

SMALLEST_CAPACITY = 24 * MIB


@dataclass(frozen=True)
class Budget:
    """The memory of a merge, in bytes."""

    total: int
    """Bound of the process's peak resident memory."""
    reserve: int
    """Bytes that the process needs in addition to the buffers."""
    threads: int
    """CPUs that may be busy."""

    @property
    def capacity(self) -> int:
        """All buffers together may hold this much."""
        return self.total - self.reserve

    @property
    def workers(self) -> int:
        """Chunks in flight: more than CPUs, so that some read and write while others compute."""
        return self.threads + 3

    @property
    def resident_limit(self) -> int:
        """Largest chunk that is held whole; two fit at a time, so that reading overlaps."""
        return self.capacity // 2

    @property
    def chunk_target(self) -> int:
        """Bytes an elementwise chunk aims at: large reads, and all workers busy."""
        return min(48 * MIB, self.capacity // (self.workers + 1))

    def less(self, nbytes: int) -> Budget:
        """Return the budget that is left for buffers when `nbytes` more are needed for other things."""
        return replace(self, reserve=self.reserve + nbytes)


def make_budget(memory: int | None, threads: int | None, reserve: int) -> Budget:
    """Return the budget for `memory` bytes (default: half of what is available) and `threads` CPUs.

    Raises
    ------
    BudgetError
        If `memory` does not suffice for the smallest buffers.
    """
    total = available_memory() // 2 if memory is None else memory
    least = reserve + SMALLEST_CAPACITY
    if total < least:
        raise BudgetError(
            f"--memory {format_size(total)} is too little: the process itself needs {format_size(reserve)}, "
            f"buffers {format_size(SMALLEST_CAPACITY)}; give at least {format_at_least(least)}"
        )
    return Budget(total, reserve, threads or available_cpus())


def available_cpus() -> int:
    """Return the CPUs this process may keep busy: its affinity, or its cgroup's quota if that is less."""
    cpus = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            cpus = min(cpus, max(1, int(quota) // int(period)))
    except (OSError, ValueError):
        pass
    return cpus
