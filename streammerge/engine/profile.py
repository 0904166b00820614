"""The profile of a run, written by ``merge --profile``; it shows what limited the speed."""

from __future__ import annotations

import json
import resource
from pathlib import Path
from typing import Any

from streammerge.io.durable import write_file
from streammerge.machine import peak_memory
from streammerge.timing import BESIDE, Stages


def profile_values(
    stages: Stages, *, seconds: float, running: float, workers: int, threads: int, read: int, written: int
) -> dict[str, Any]:
    """Return the profile of a run as plain values.

    Parameters
    ----------
    seconds, running
        Wall clock of the whole run, and of the part in which workers had chunks.
    read, written
        Bytes.

    Returns
    -------
    ``stages`` has seconds summed over the threads in each stage: ``wall``, and ``cpu`` for computing. ``wait for work`` is
    the rest of ``workers * running``, when workers had no chunk. ``process`` holds the operating system's statistics of the
    process so far.
    """
    by_stage = stages.as_dict()
    busy = sum(entry["wall"] for stage, entry in by_stage.items() if stage not in BESIDE)
    by_stage["wait for work"] = {"wall": round(max(0.0, workers * running - busy), 3), "cpu": 0.0}
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "format": 1,
        "seconds": round(seconds, 3),
        "seconds_with_chunks": round(running, 3),
        "workers": workers,
        "threads": threads,
        "bytes_read": read,
        "bytes_written": written,
        "stages": by_stage,
        "process": {
            "user_seconds": round(usage.ru_utime, 3),
            "system_seconds": round(usage.ru_stime, 3),
            "peak_resident_bytes": peak_memory(),
        },
    }


def write_profile(path: Path, values: dict[str, Any]) -> None:
    """Write a profile as JSON.

    Raises
    ------
    WorldError
        If it cannot be written.
    """
    write_file(path, (json.dumps(values, indent=2) + "\n").encode())
