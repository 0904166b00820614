"""Kill a merge at random moments, resume it, and compare with an uninterrupted run, byte for byte.

    python tools/prove/kill_and_resume.py CONFIG WORKDIR --memory 512MiB --kills 3

Prints wall time and peak resident memory of every run (the operating system's account of the process).
"""

from __future__ import annotations

import argparse
import filecmp
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path


def run(config: str, out: Path, memory: str, kill_at: float) -> tuple[int, float, float]:
    """Run a merge, killed when that share of it is done: (exit status, seconds, peak MiB)."""
    began = time.monotonic()
    command = [
        sys.executable,
        "-m",
        "streammerge.cli",
        "merge",
        config,
        str(out),
        "--memory",
        memory,
        "--json",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        event = json.loads(line)
        if event["event"] == "progress" and event["elements"] >= kill_at * event["elements_total"]:
            os.kill(process.pid, signal.SIGKILL)
            break
    _, status, usage = os.wait4(process.pid, 0)
    return os.waitstatus_to_exitcode(status), time.monotonic() - began, usage.ru_maxrss / 1024


def same(left: Path, right: Path) -> bool:
    """Return whether two outputs hold the same files with the same bytes."""
    names = sorted(p.name for p in left.iterdir())
    if names != sorted(p.name for p in right.iterdir()):
        return False
    return all(filecmp.cmp(left / name, right / name, shallow=False) for name in names)


def main() -> None:
    """Run the proof."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config")
    parser.add_argument("workdir", type=Path)
    parser.add_argument("--memory", default="512MiB")
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    whole, killed = args.workdir / "whole", args.workdir / "killed"
    for out in (whole, killed):
        shutil.rmtree(out, ignore_errors=True)
    code, seconds, peak = run(args.config, whole, args.memory, 2.0)
    print(f"uninterrupted: exit {code}, {seconds:.1f} s, peak {peak:.0f} MiB", flush=True)
    chance = random.Random(args.seed)
    for share in sorted(chance.uniform(0.05, 0.95) for _ in range(args.kills)):
        code, seconds, peak = run(args.config, killed, args.memory, share)
        print(f"killed at {share:.0%}: exit {code}, {seconds:.1f} s, peak {peak:.0f} MiB", flush=True)
    code, seconds, peak = run(args.config, killed, args.memory, 2.0)
    print(f"resumed to the end: exit {code}, {seconds:.1f} s, peak {peak:.0f} MiB", flush=True)
    print("byte-identical" if same(whole, killed) else "THE BYTES DIFFER")
    sys.exit(0 if same(whole, killed) else 1)


if __name__ == "__main__":
    main()
