"""Weigh CPUs against a GPU: by what the method costs, what the disk gives, and how fast a GPU would be.

Pure: numbers in, a choice and its reason out. Rates are GB (10^9 bytes) of inputs per second. Reading, arithmetic and
copies overlap, so the slowest of them decides.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from streammerge.formats.refs import SourceRef
from streammerge.io.disk import cached_share_of
from streammerge.io.volumes import is_url
from streammerge.machine import disk_rate, physical_cores
from streammerge.records import dataclass
from streammerge.units import format_seconds, plural

START_SECONDS = 1.5
"""Seconds until a GPU has its context, its kernels and its pinned memory."""
LEAST_SECONDS = 10.0
"""Seconds on the CPUs; a shorter merge does not repay the start of a GPU, whatever the estimates say."""
GAIN = 0.8
"""A GPU is taken if it needs at most this share of the CPUs' time: estimates are no better."""
CACHE_RATE, CACHE_RATE_OF_A_CORE = 30.0, 6.0
"""GB per second from the page cache: of all cores, and of one, which copies."""
STORE_RATE = 1.0
"""GB per second from an object store."""
UNKNOWN_COST = 10.0
"""Core seconds per GB of a plain formula in torch."""
DECODING = 1.2e-9
"""Core seconds in which a CPU decodes an element, in the middle of all formats."""
_COSTED = 2
"""Bytes of an element in which costs were measured, bf16. The values of codes are fp32, but cost what any values cost."""


class Volume(NamedTuple):
    """The size of a merge's inputs."""

    nbytes: int
    """Bytes that are read from files, and sent to a GPU: of quantised tensors the codes and scales."""
    values: int
    """Bytes of the values that are computed with; two for each that codes stand for."""
    decoded: int = 0
    """Number of values that codes stand for."""


def volume_of(tensors: Iterable[SourceRef]) -> Volume:
    """Return the size of tensors."""
    nbytes = values = decoded = 0
    for ref in tensors:
        coded = ref.stored_format is not None
        nbytes += ref.file_bytes
        decoded += ref.n_elements if coded else 0
        values += _COSTED * ref.n_elements if coded else ref.nbytes
    return Volume(nbytes, values, decoded)


@dataclass(frozen=True)
class Workload:
    """The arithmetic of a merge."""

    method: str
    nbytes: int
    """Bytes of the inputs as they are read."""
    cost: float
    """Core seconds on CPUs per GB that is read."""
    gpu_rate: float | None
    """GB per second of what is read that a GPU merges; None if this method has no kernels there."""


@dataclass(frozen=True)
class Host:
    """The machine, as far as it bounds a merge."""

    cores: int
    source_rate: float
    """GB per second of the inputs' disk, or of the page cache where they lie in it."""
    source: str = "the disk"
    """What gives the inputs, for messages."""


class Choice(NamedTuple):
    """Whether a GPU is taken, and why, in a few words."""

    gpu: bool
    reason: str


def weigh(work: Workload, host: Host) -> Choice:
    """Choose between CPUs and a GPU that is there."""
    gb = work.nbytes / 1e9
    on_cpus = gb * work.cost / host.cores
    cpu_rate = host.cores / work.cost
    cores = f"{plural(host.cores, 'core')} merge{'s' if host.cores == 1 else ''} {work.method}"
    at = f"{cores} at {_rate(cpu_rate)} GB/s"
    if work.gpu_rate is None:
        return Choice(False, f"no kernel for GPUs computes {work.method}")
    if on_cpus <= LEAST_SECONDS:
        took = "less than a second" if on_cpus < 1 else f"about {format_seconds(on_cpus, coarse=True)}"
        return Choice(False, f"{cores} in {took}; a GPU would not repay its start")
    if cpu_rate >= host.source_rate:
        return Choice(False, f"{at}; a GPU would wait for {host.source}")
    with_gpu = min(work.gpu_rate, host.source_rate)
    if START_SECONDS + gb / with_gpu > GAIN * gb / min(cpu_rate, host.source_rate):
        return Choice(False, f"{at}; a GPU would reach {_rate(with_gpu)}")
    bound = f", as {host.source} gives them" if work.gpu_rate >= host.source_rate else ""
    return Choice(True, f"{at}; a GPU reaches {_rate(with_gpu)}{bound}")


def host_of(paths: Sequence[str], threads: int | None, *, cold: bool = False) -> Host:
    """Return what bounds a merge of some files on this machine. Nothing is read: rates follow from kinds of disks.

    With `cold` the page cache does not count, so that the same files have the same answer later.
    """
    cores = physical_cores() if threads is None else min(threads, physical_cores())
    local = [path for path in paths if not is_url(path)]
    if not local:
        return Host(cores, STORE_RATE, "the store")
    cached = 0.0 if cold else cached_share_of(local)
    warm = min(CACHE_RATE, CACHE_RATE_OF_A_CORE * cores)
    read = min(disk_rate(path) for path in local)
    return Host(
        cores, 1 / (cached / warm + (1 - cached) / read), "the page cache" if cached > 0.5 else "the disk"
    )


def _rate(gb_per_second: float) -> str:
    return f"{gb_per_second:.0f}" if gb_per_second >= 20 else f"{gb_per_second:.1f}"
