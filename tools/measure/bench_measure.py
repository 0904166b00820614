"""Measures a merge, and the disk it runs on, for tools/measure/bench.py."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

DROP_CACHES = Path("/proc/sys/vm/drop_caches")
DISK_LIMIT = Path(__file__).with_name("disk_limit.py")


@dataclass(frozen=True)
class Case:
    """One command to measure, some times."""

    program: str
    """`streammerge` or `mergekit`."""
    method: str
    size: str
    """The size of one model, as asked for."""
    memory: str
    """The value of --memory; empty for mergekit, which has no such thing."""
    device: str = "cpu"


@dataclass(frozen=True)
class Limit:
    """The disk's times, right before a merge."""

    limit_s: float
    """Until all was read and all was on the disk."""
    read_s: float
    write_s: float
    way: str = "cat and dd"
    """`direct` past the page cache, or `buffered` where the file system refuses that; earlier figures came from `cat` and `dd`."""


@dataclass(frozen=True)
class Usage:
    """The operating system's account of a process and the children it waited for."""

    exit_code: int
    wall_s: float
    user_s: float
    system_s: float
    peak_nbytes: int
    """Peak resident memory of the largest of these processes, mapped files included."""
    others_cpu_s: float
    """CPU seconds that all else on the machine took meanwhile."""

    @property
    def cpu_s(self) -> float:
        """CPU seconds, user and system."""
        return self.user_s + self.system_s


@dataclass(frozen=True)
class Run:
    """One pair: a limit, and the merge right after it."""

    case: Case
    number: int
    cache: str
    """`cold`, `warm`, or `as found` where the page cache was not dropped."""
    model_nbytes: int
    """Bytes of one model, which the merge writes as well."""
    limit: Limit
    usage: Usage
    failure: str = ""
    """The failure in the command's own words; empty for a good run."""
    input_nbytes: int = 0
    """Bytes of all inputs; 0 in figures from before this was noted."""

    @property
    def ratio(self) -> float:
        """Wall time over limit."""
        return self.usage.wall_s / self.limit.limit_s


_COPY_RATES = """
import time, torch
n, host = 1 << 30, [torch.empty(1 << 30, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
device, streams = [h.cuda() for h in host], [torch.cuda.Stream() for _ in range(2)]
def rate(to, back):
    best = 0.0
    for _ in range(5):
        torch.cuda.synchronize()
        began = time.perf_counter()
        for stream, wanted, target, source in zip(streams, (to, back), (device[0], host[1]), (host[0], device[1])):
            with torch.cuda.stream(stream):
                if wanted:
                    target.copy_(source, non_blocking=True)
        torch.cuda.synchronize()
        best = max(best, (to + back) * n / (time.perf_counter() - began) / 1e9)
    return best
print(torch.cuda.get_device_name())
print("{:.1f} to it, {:.1f} from it, {:.1f} both at once".format(rate(1, 0), rate(0, 1), rate(1, 1)))
"""


def gpu() -> dict[str, str]:
    """Return a GPU's name and how fast pinned memory is copied to it and back, in GB/s."""
    asked = subprocess.run([sys.executable, "-c", _COPY_RATES], capture_output=True, text=True)
    if asked.returncode:
        sys.exit(f"--device cuda: no GPU:\n{asked.stderr}")
    name, rates = asked.stdout.strip().splitlines()
    return {"GPU": f"{name} (GB/s copied: {rates})"}


_MEASURE = """
import json, os, sys, time
began = time.monotonic()
pid = os.posix_spawnp(sys.argv[1], sys.argv[1:], os.environ, file_actions=[(os.POSIX_SPAWN_DUP2, 2, 1)])
_, status, usage = os.wait4(pid, 0)
wall = time.monotonic() - began
code = os.waitstatus_to_exitcode(status)
print(json.dumps([code, wall, usage.ru_utime, usage.ru_stime, usage.ru_maxrss << 10]))
"""


def measure(command: Sequence[str | Path], environment: dict[str, str]) -> tuple[Usage, str]:
    """Run a command: what it used, and what it said on stdout and stderr.

    Linux hands the peak of a forking process on to the child, so a small process does the forking.
    """
    before = busy_seconds()
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", _MEASURE, *command],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode:
        sys.exit(f"{command[0]} could not be started:\n{done.stderr}")
    # The command's own stdout went to stderr.
    code, wall_s, user_s, system_s, peak = json.loads(done.stdout)
    others_cpu_s = max(0.0, busy_seconds() - before - user_s - system_s)
    return Usage(code, wall_s, user_s, system_s, peak, others_cpu_s), done.stderr.strip()


def measure_limit(scratch: Path, inputs: Sequence[Path], nbytes: int) -> Limit:
    """Time direct reads of the inputs beside direct writes of the output's size to `scratch`; see disk_limit.py.

    A process of its own: a Fisher store has more files than a process may hold open, so its limit is raised as far as allowed.
    """
    command = [sys.executable, "-I", "-S", DISK_LIMIT, scratch, str(nbytes), "-"]
    done = subprocess.run(
        command, input=b"\0".join(os.fsencode(path) for path in inputs), capture_output=True, check=False
    )
    if done.returncode:
        sys.exit(f"the limit could not be measured:\n{done.stderr.decode(errors='replace')}")
    read_s, write_s, way = done.stdout.decode().split()
    return Limit(max(float(read_s), float(write_s)), float(read_s), float(write_s), way)


def start_cat(inputs: Sequence[Path]) -> subprocess.Popen[bytes]:
    """Start reading files to nowhere; a Fisher store has more of them than a command line can bear."""
    reader = subprocess.Popen(
        ["xargs", "-0", "cat"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    assert reader.stdin is not None
    reader.stdin.write(b"\0".join(os.fsencode(path) for path in inputs))
    reader.stdin.close()
    reader.stdin = None
    return reader


def fill_cache(inputs: Sequence[Path]) -> None:
    """Read the inputs, so that they lie in the page cache."""
    start_cat(inputs).communicate()


def drop_caches() -> bool:
    """Write back and forget the page cache; return whether that is permitted."""
    os.sync()
    try:
        DROP_CACHES.write_text("3\n")
    except OSError:
        return False
    return True


def meminfo(key: str) -> int:
    """Return a figure of /proc/meminfo, in bytes."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{key}:"))


def busy_seconds() -> float:
    """Return the CPU seconds all processes have taken since the machine started, stolen ones included."""
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(
        int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    )
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def machine(mergekit: Path | None) -> dict[str, str]:
    """Return what a reader needs to judge the figures; nothing that names the machine."""
    model = [t for t in Path("/proc/cpuinfo").read_text().splitlines() if t.startswith("model name")]
    data = {
        "CPU": model[0].split(":", 1)[1].strip() if model else platform.machine(),
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": f"{meminfo('MemTotal') / (1 << 30):.1f} GiB",
        "Python": platform.python_version(),
    }
    for package in ("torch", "numba", "streammerge"):
        try:
            data[package] = version(package)
        except PackageNotFoundError:
            data[package] = "absent"
    if mergekit is not None:
        code = "from importlib.metadata import version as v; print(v('mergekit'), v('torch'))"
        asked = subprocess.run([mergekit / "bin" / "python", "-c", code], capture_output=True, text=True)
        if asked.returncode:
            sys.exit(f"--mergekit: no mergekit there:\n{asked.stderr}")
        data["mergekit"] = "{} (with torch {})".format(*asked.stdout.split())
    return data
