"""How much memory this process has, and could still take: of the machine, or of a control group that it runs in."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from pathlib import Path

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
