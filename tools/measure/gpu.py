"""
Measure everything that a GPU does for a merge, and write it down as a table: ten minutes on a machine that has one.

    python tools/measure/gpu.py --work /scratch/gpu [--out gpu.md] [--size 20GB] [--minutes 10] [--device cuda:0]
    python tools/measure/gpu.py --work /tmp/gpu --fake        # tries the program without a GPU, at a small size

The machine and the start; the bus in, out and both ways by size of copy; each rule and statistic by fused kernels, by
eager torch and by one CPU, with a comparison of the bytes; the rings; and whole merges, cold and from the page cache. The
figures go into docs/use/gpu.md.

Each part is a process with a share of the time: one that hangs or crashes is ended, its rows so far stay, and the next
begins. Whole merges have what time is left; their models are as large as the disk allows in it, at most `--size`. Exit
code 1 if any bytes differ, 2 if a part did not finish.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

from gpu_whole import SIZE, Table, by_command, in_process, measure_merges

sys.path.insert(0, str(Path(__file__).parents[2]))

DIFFERENT, UNFINISHED = 1, 2


class Part(NamedTuple):
    """A part of the measurements."""

    name: str
    seconds: float
    """Its share: when it is over, the part is ended."""


PARTS = (
    Part("compile", 120),  # the CPU's kernels, so that no merge waits for them
    Part("start", 45),
    Part("start again", 25),  # from the driver's cache of compiled kernels
    Part("bus", 40),
    Part("kernels", 130),
    Part("rings", 40),
    Part("merges", 10_000),
)
_SPARE = 10.0
"""Seconds before the end of its share at which the part of whole merges stops by itself."""
_DEAD = 5.0
"""Seconds that are waited for a process that was killed: one that waits within the driver may not end."""


def run_parts(
    parts: Sequence[Part], minutes: float, out: Path | None, command: Callable[[Part, float, Path], list[str]]
) -> int:
    """Run each part as a process, and write what all found; return the exit code.

    Parameters
    ----------
    out
        The file of the table, written after each part.
    command
        Returns the command of a part, given its seconds and the file that it writes its rows to.
    """
    end, lines, code = time.monotonic() + 60 * minutes, list[str](), 0
    for part in parts:
        limit = min(part.seconds, end - time.monotonic())
        rows = Path(f"{out or 'gpu.md'}.part")
        rows.unlink(missing_ok=True)
        ended = _ended(command(part, limit, rows), limit) if limit > 0 else "no time was left"
        if ended not in (0, DIFFERENT):
            why = ended if isinstance(ended, str) else f"not all of it was measured (exit code {ended})"
            print(line := f"\n**{part.name}: {why}**", flush=True)
        found = rows.read_text().splitlines() if rows.exists() else []
        lines += found if ended in (0, DIFFERENT) else [*found, line]
        rows.unlink(missing_ok=True)
        code = DIFFERENT if DIFFERENT in (ended, code) else code if ended == 0 else UNFINISHED
        if out is not None:
            out.write_text("\n".join(lines) + "\n")
    return code


def _ended(command: Sequence[str], limit: float) -> int | str:
    """Run a command; return its exit code, or what is told of one that was ended after `limit` seconds."""
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        return f"it was ended after {limit:.0f} s"
    finally:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):
            process.wait(_DEAD)


def run_part(name: str, table: Table, options: argparse.Namespace) -> None:
    """Run a part in this process."""
    from gpu_kernels import (
        measure_bus,
        measure_kernels,
        measure_rings,
        measure_start,
        played,
        show_machine,
    )

    from streammerge.backends.gpu import backend
    from streammerge.backends.gpu.lane import Sizes
    from streammerge.units import nbytes_of

    sizes, opened, lane_of = Sizes(), partial(backend.open_driver, options.device), backend.open_lane
    merge, n, total, most = by_command, 1 << 26, nbytes_of(options.size) or 0, 1 << 28
    if options.fake:
        sizes = Sizes(3, 2, 1 << 16, 1, 1 << 12)
        opened, lane_of = played(sizes)  # type: ignore[assignment]
        merge, n, total, most = in_process, 1 << 14, 1 << 22, 1 << 20
    if name == "start":
        show_machine(table, "" if options.fake else options.device)
    if name.startswith("start"):
        measure_start(table, opened, sizes)
    elif name == "bus":
        measure_bus(table, opened, most)
    elif name == "merges":
        until = time.monotonic() + options.seconds - _SPARE
        measure_merges(table, options.work, total, ["cpu", options.device], merge, until)
    else:
        lane = lane_of(options.device)
        try:
            if name == "kernels":
                measure_kernels(table, lane, options.device, n, 2 if options.fake else 5)
            else:
                threads = min(16, (os.cpu_count() or 2) + 2)
                measure_rings(table, lane, n // 4, total, threads)
        finally:
            lane.close()


def main() -> int:
    """Measure everything, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument(
        "--work", type=Path, required=True, help="a folder on the disk to measure, with room for 30 GB"
    )
    parser.add_argument("--out", type=Path, help="the file of the table")
    parser.add_argument("--size", default=SIZE, help="most bytes of the models of a whole merge")
    parser.add_argument("--minutes", type=float, default=10.0, help="the time of all parts")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--fake", action="store_true", help="try the program without a GPU")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=600.0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault(
        "CUDA_CACHE_PATH", str(options.work / "compiled")
    )  # empty: the first start compiles
    if options.part:
        table = Table(options.rows)
        run_part(options.part, table, options)
        return DIFFERENT if not table.equal else 0 if table.whole else UNFINISHED

    def command(part: Part, limit: float, rows: Path) -> list[str]:
        if part.name == "compile":
            return [sys.executable, "-m", "streammerge", "warm-up"]
        own = ["--part", part.name, "--rows", str(rows), "--seconds", str(limit)]
        return [sys.executable, *sys.argv, *own]

    return run_parts(PARTS[1:] if options.fake else PARTS, options.minutes, options.out, command)


if __name__ == "__main__":
    sys.exit(main())
