"""Facts on the machine: memory, of the machine or of a control group; open files; cores and GPUs; kinds of disks."""

from __future__ import annotations

import os
import re
import resource
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path

from streammerge.errors import InputError
from streammerge.units import format_at_least, format_size

_STATUS = Path("/proc/self/status")
_MEMBERSHIP = Path("/proc/self/cgroup")
_MOUNT = Path("/sys/fs/cgroup")
_UNLIMITED = 1 << 60


def available_memory() -> int:
    """Return the bytes this process could still use: the machine's, or those of its control groups if fewer."""
    import psutil

    return max(0, min([int(psutil.virtual_memory().available), *left_in_groups(_MEMBERSHIP, _MOUNT)]))


def own_memory() -> int:
    """Return the resident bytes of this process."""
    return _statistic(_STATUS, "VmRSS:") << 10


def peak_memory() -> int:
    """Return the peak resident bytes of this process since its program began.

    `getrusage` would include the process that started this one, since Linux passes its peak on.
    """
    return (_statistic(_STATUS, "VmHWM:") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) << 10


def left_in_groups(membership: Path, mount: Path) -> Iterator[int]:
    """Yield the bytes that each control group with a limit leaves, innermost first, for both versions of control groups.

    The page cache counts as used there, but is freed on demand.

    Parameters
    ----------
    membership
        The process's file that lists its groups.
    mount
        Where the groups are mounted. In a container the outer groups are not visible.
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
    """Return a warning if a process with `own` bytes is to grow beyond what `free` bytes allow, else None.

    >>> shortage(8 << 30, 3 << 30, 100 << 20)
    '--memory 8.0 GiB exceeds the 3.1 GiB available (including what this process already holds): it may be killed, or the machine may swap; give at most 3172 MiB'
    """
    if asked <= free + own:
        return None
    return (
        f"--memory {format_size(asked)} exceeds the {format_size(free + own)} available (including what this process already "
        f"holds): it may be killed, or the machine may swap; give at most {format_at_least(free + own)}"
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
"""Files reserved for standard streams, libraries, the caller's sockets, the journal, the lock, directories, and a margin."""
_MOST_INPUTS = 128
"""Most input files open at a time; more gain nothing."""
_EACH = 2
"""Descriptors per file, which is opened both through the page cache and past it."""


def share_out(n_shards: int, n_threads: int) -> int:
    """Return the number of input files that may be open at a time in addition to `n_shards` output shards.

    Parameters
    ----------
    n_threads
        Number of reading threads; each has an input and a file of a store open.

    Raises
    ------
    InputError
        If the system allows too few; the message says how many are needed.
    """
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    least = _OTHERS + _EACH * (n_shards + 2 * n_threads)
    if allowed == resource.RLIM_INFINITY:
        return _MOST_INPUTS
    if allowed < least:
        raise InputError(
            f"writing {n_shards} shards needs {least} open files, but the limit is {allowed}: raise it with "
            f"`ulimit -n {least}`, or write fewer shards with a larger --shard-size"
        )
    return min(_MOST_INPUTS, n_threads + (allowed - least) // _EACH)


# --- processors

_CPUS = Path("/sys/devices/system/cpu")
_GPUS, _NODES = Path("/proc/driver/nvidia/gpus"), Path("/dev")


def physical_cores(cpus: Path = _CPUS) -> int:
    """Return the number of cores this process may use: two threads of a core add up to little more than one."""
    allowed = os.sched_getaffinity(0)
    cores = set()
    for cpu in allowed:
        try:
            cores.add((cpus / f"cpu{cpu}" / "topology" / "thread_siblings_list").read_text())
        except OSError:  # a container or a virtual machine that hides them
            cores.add(str(cpu))
    return len(cores)


def gpus(folder: Path = _GPUS, nodes: Path = _NODES) -> list[str]:
    """Return the names of the GPUs that processes may use, as ``CUDA_VISIBLE_DEVICES`` has them; no driver is asked."""
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        names = (name.strip() for name in visible.split(","))
        return list(takewhile(_names_gpu, names))  # as the driver does
    if any((folder.parent / "capabilities").glob("gpu*/mig/gi*")):
        return ["0"]  # of a GPU that is divided (MIG), a process sees one part, which is its first device
    try:
        found = sum(_has_node(gpu, nodes) for gpu in folder.iterdir())
    except OSError:
        return []
    return [str(i) for i in range(found)]


def _names_gpu(name: str) -> bool:
    return name.isdecimal() or name.startswith(("GPU-", "MIG-"))


def _has_node(gpu: Path, nodes: Path) -> bool:
    """Return whether a GPU can be opened: a container may see the folders of all, and have the devices of some."""
    if not any(nodes.glob("nvidia[0-9]*")):
        return True  # they are made when the driver is used for the first time
    try:
        minor = re.search(r"Device Minor:\s*(\d+)", (gpu / "information").read_text())
    except OSError:
        return True
    return minor is None or (nodes / f"nvidia{minor[1]}").exists()


# --- disks

_BLOCK_DEVICES = Path("/sys/dev/block")
_NVME, _VIRTUAL, _SATA, _ROTATING = 7.0, 2.0, 0.5, 0.2
"""GB read per second by kinds of disks: a good NVMe of PCIe 4, a cloud's volume, an SSD on SATA, platters."""


def disk_rate(path: str, devices: Path = _BLOCK_DEVICES) -> float:
    """Return the GB per second that the disk of a file is assumed to read, from its kind; striped disks add up.

    A disk that cannot be told, of a network or a container, counts as a good one.
    """
    try:
        number = os.stat(path).st_dev
        return _rate_of((devices / f"{os.major(number)}:{os.minor(number)}").resolve(strict=True))
    except OSError:
        return _NVME


def _rate_of(device: Path) -> float:
    if (device / "partition").exists():
        device = device.parent
    below = sorted((device / "slaves").glob("*"))
    if below:
        rates = [_rate_of(one.resolve()) for one in below]
        striped = _text(device / "md" / "level") in ("raid0", "raid10", "raid5", "raid6")
        return sum(rates) if striped else min(rates)
    if _text(device / "queue" / "rotational") == "1" and not device.name.startswith(("vd", "xvd")):
        return _ROTATING
    kinds = {"nvme": _NVME, "sd": _SATA, "vd": _VIRTUAL, "xvd": _VIRTUAL}
    return next((rate for kind, rate in kinds.items() if device.name.startswith(kind)), _NVME)


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
