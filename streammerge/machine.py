"""Limits of the machine for this process: memory, of the machine or of a control group, and open files."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from pathlib import Path

from streammerge.errors import InputError
from streammerge.units import format_at_least, format_size

_STATUS = Path("/proc/self/status")
_MEMBERSHIP = Path("/proc/self/cgroup")
_MOUNT = Path("/sys/fs/cgroup")
_UNLIMITED = 1 << 60


def available_memory() -> int:
    """Return the bytes this process could still take: of the machine, or of its control groups if that is less."""
    import psutil

    return max(0, min([int(psutil.virtual_memory().available), *left_in_groups(_MEMBERSHIP, _MOUNT)]))


def own_memory() -> int:
    """Return the resident bytes of this process."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def peak_memory() -> int:
    """Return the most bytes that this process has had resident since its program began, by the system's own account.

    What `getrusage` says includes the process that started this one: Linux hands its peak on.
    """
    try:
        lines = _STATUS.read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:"))
    except (OSError, ValueError, StopIteration, IndexError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def left_in_groups(membership: Path, mount: Path) -> Iterator[int]:
    """Yield what each control group of a process that has a limit leaves, innermost first; of both versions.

    The page cache counts as used there, but is given up on demand.

    Parameters
    ----------
    membership
        The process's file that names its groups.
    mount
        Where the groups are to be seen. In a container the outer ones are not.
    """
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            root, names = mount, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            root = mount / "memory"
        else:
            continue
        inner = root / path.lstrip("/")
        for group in (inner, *inner.parents):
            limit = _number(group / names[0])
            if limit is not None and limit < _UNLIMITED:
                yield limit - (_number(group / names[1]) or 0) + _statistic(group / "memory.stat", names[2])
            if group == root:
                break


def shortage(asked: int, free: int, own: int) -> str | None:
    """Return a warning where a process that has `own` bytes is to grow to more than `free` ones allow; else None.

    >>> shortage(8 << 30, 3 << 30, 100 << 20)
    '--memory 8.0 GiB is more than there is: 3.1 GiB are free, what this process has included; it may be killed, or the machine may swap: give at most 3172 MiB'
    """
    if asked <= free + own:
        return None
    return (
        f"--memory {format_size(asked)} is more than there is: {format_size(free + own)} are free, what this process has "
        f"included; it may be killed, or the machine may swap: give at most {format_at_least(free + own)}"
    )


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _statistic(path: Path, field: str) -> int:
    try:
        lines = path.read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.split()[0] == field)
    except (OSError, ValueError, StopIteration, IndexError):
        return 0


_OTHERS = 48
"""Standard streams, libraries, sockets of whoever called, the journal, the lock, directories, and a few to spare."""
_MOST_INPUTS = 128
"""Input files open at a time; more gain nothing."""
_EACH = 2
"""A file is opened through the page cache and past it."""


def share_out(n_shards: int, n_threads: int) -> int:
    """Return how many input files may be open at a time, beside `n_shards` of the output.

    Parameters
    ----------
    n_threads
        That read; each has an input open, and a file of a store.

    Raises
    ------
    InputError
        If the system allows too few; the message says how many it takes.
    """
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    least = _OTHERS + _EACH * (n_shards + 2 * n_threads)
    if allowed == resource.RLIM_INFINITY:
        return _MOST_INPUTS
    if allowed < least:
        raise InputError(
            f"writing {n_shards} shards takes {least} open files, the limit is {allowed}: raise it with "
            f"`ulimit -n {least}`, or write fewer shards with a larger --shard-size"
        )
    return min(_MOST_INPUTS, n_threads + (allowed - least) // _EACH)
