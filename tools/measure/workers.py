"""Measure how a shared merge scales when each process may move so many bytes a second, as a node's network does.

    python tools/measure/workers.py [--workers 1 2 4 8] [--rate 1MB] [--size 128MB] [--shards 32] [--method linear]

Needs root and cgroup v1 with the blkio controller. Each process gets a group of its own whose reads and writes of the disk
are capped; direct I/O keeps writes out of the page cache, and the inputs are dropped from it before each run. The ideal is
the bytes of the plan over the rates of all processes; the time is from the first claim to the last record, by the file
system's clock. Several processes on few CPUs also compete for these, so choose a rate so low that the ideal for the most
workers takes more than a minute.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from streammerge.api import plan
from streammerge.units import parse_size

ROOT = Path(__file__).resolve().parents[2]
_GROUPS = Path("/sys/fs/cgroup/blkio")
_ARRAY = 1 << 18
"""Elements of one tensor: 512 KiB in BF16."""


def device_of(directory: Path) -> str:
    """Return the block device of a directory, as the controller names it."""
    number = os.stat(directory).st_dev
    return f"{os.major(number)}:{os.minor(number)}"


def capped(name: str, device: str, rate: int) -> Path:
    """Create a group that may read and write so many bytes a second each."""
    group = _GROUPS / name
    group.mkdir(exist_ok=True)
    for way in ("read", "write"):
        (group / f"blkio.throttle.{way}_bps_device").write_text(f"{device} {rate}")
    return group


def drop(directory: Path) -> None:
    """Drop files from the page cache."""
    for path in directory.rglob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class Watch(threading.Thread):
    """Notes the time of each process's first claim of a shard and of the last record."""

    def __init__(self, out: Path) -> None:
        super().__init__(daemon=True)
        self._out, self.last, self.seen = out, 0.0, 0
        self.began: dict[str, float] = {}
        """The time of each process's first claim, by its token."""

    def run(self) -> None:
        """Look until the working files are gone."""
        while not (self.seen and not (self._out / ".streammerge").exists()):
            for path in self._out.glob(".streammerge/*/*"):
                try:
                    when, token = path.stat().st_mtime, path.read_text() if path.suffix == ".claim" else ""
                except OSError:
                    continue
                if token and not path.name.startswith("commit"):
                    self.began[token] = min(self.began.get(token, when), when)
                if path.name.startswith("merge-") and path.name.endswith(".done"):
                    self.last, self.seen = max(self.last, when), self.seen + 1
            time.sleep(0.05)


def measure(config: dict[str, Any], work: Path, workers: int, rate: int, shard: int) -> dict[str, Any]:
    """Merge once; return the figures."""
    out, device = work / f"out{workers}", device_of(work)
    (work / "config.yml").write_text(json.dumps(config))
    decided = plan(config, shard_size=shard, memory="700MiB", threads=1)
    nbytes = decided.bytes_to_read() + decided.layout.nbytes
    drop(work)
    watch = Watch(out)
    watch.start()
    began = time.monotonic()
    processes = []
    for number in range(workers):
        group = capped(f"workers{number}", device, rate)
        line = f"echo $$ > {group}/cgroup.procs && exec {sys.executable} -m streammerge merge {work}/config.yml {out} "
        line += f"--join --quiet --memory 700MiB --threads 1 --shard-size {shard}"
        processes.append(subprocess.Popen(["sh", "-c", line], cwd=ROOT))
    codes = [process.wait() for process in processes]
    wall = time.monotonic() - began
    watch.join(5)
    for number in range(workers):
        (_GROUPS / f"workers{number}").rmdir()
    assert codes == [0] * workers, codes
    # Reads and writes have a cap each; reads are the more.
    ideal = max(decided.bytes_to_read(), decided.layout.nbytes) / rate / workers
    first = min(watch.began.values())
    spent = watch.last - first
    present = sum(watch.last - began for began in watch.began.values())
    return {
        "workers": workers,
        "shards": len(decided.layout.shards),
        "bytes": nbytes,
        "ideal_seconds": round(ideal, 1),
        "seconds_from_first_claim_to_last_record": round(spent, 1),
        "efficiency": round(ideal / spent, 3),
        "efficiency_while_all_are_present": round(ideal * workers / present, 3),
        "seconds_until_the_last_one_began": round(max(watch.began.values()) - first, 1),
        "wall_seconds": round(wall, 1),
    }


def main() -> None:
    """Write the models, measure, and print a line of JSON for each number of workers."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--rate", default="1MB", help="bytes a second that each process may read, and write")
    parser.add_argument("--size", default="128MB", help="bytes of each of the two models")
    parser.add_argument("--shards", type=int, default=32)
    parser.add_argument("--method", default="linear")
    args = parser.parse_args()
    size, rate = parse_size(args.size), parse_size(args.rate)
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as place:
        import torch

        sys.path.insert(0, str(ROOT))
        from tests.conftest import config_for, write_model

        work = Path(place)
        n = max(1, size // (2 * _ARRAY))
        paths = []
        for number in range(3):
            generator = torch.Generator().manual_seed(number)
            tensors = {f"w{i}": torch.randn(_ARRAY, generator=generator).bfloat16() for i in range(n)}
            paths.append(write_model(work / f"m{number}", tensors))
        config = json.loads(json.dumps(config_for(args.method, paths), default=str))
        for workers in args.workers:
            print(json.dumps(measure(config, work, workers, rate, size // args.shards + 1)), flush=True)


if __name__ == "__main__":
    main()
