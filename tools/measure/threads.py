"""Measure what more threads cost: CPU seconds a gigabyte of inputs, and what waits for what.

    python tools/measure/threads.py MODELS [--threads 1,2,4,8,16] [--methods linear,ties,dare_ties] [--memory 2GiB]

MODELS is a directory as `tools/make/make_models.py` makes it, ``base`` and ``tuned1`` to ``tuned3``. Each merge runs in a
process of its own, from a warm page cache. CPU seconds are the operating system's, from the first chunk to the end of
the run. ``interpreter`` is what is left of them without compiled kernels, checksums and the kernel of the operating
system: no two threads can do that at once, so a GB of inputs never takes less time, on however many cores. On a machine with
fewer cores than threads the waits are those for a core too.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from streammerge.api import merge
from streammerge.events import Event
from streammerge.numerics import ready

PARAMETERS: dict[str, dict[str, float]] = {"ties": {"density": 0.2}, "dare_ties": {"density": 0.5}}
SHOWN = ("wait for memory", "wait for work", "read", "statistics", "compute", "checksum", "write")


def config_of(models: Path, method: str) -> dict[str, Any]:
    """Return a config of the three fine-tunes."""
    tuned = [
        {"model": str(path), "parameters": {"weight": 0.3, **PARAMETERS.get(method, {})}}
        for path in sorted(models.glob("tuned*"))
    ]
    base = {} if method == "linear" else {"base_model": str(models / "base")}
    return {"merge_method": method, "models": tuned, "dtype": "bfloat16", **base}


def cpu() -> tuple[float, float]:
    """Return the seconds of this process so far, as a user and in the operating system."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime, usage.ru_stime


def run(models: Path, method: str, threads: int, memory: str, out: Path) -> dict[str, Any]:
    """Merge in this process; return its profile with the seconds of compiled kernels and of the whole."""
    in_kernels: list[float] = []
    pack = ready.Overload.__init__

    def timed(self: ready.Overload, told: dict[str, Any], address: int) -> None:
        pack(self, told, address)
        call = self._call

        def timed_call(*arguments: Any) -> int:
            began = time.thread_time()
            code = int(call(*arguments))
            in_kernels.append(time.thread_time() - began)
            return code

        self._call = timed_call  # type: ignore[assignment]

    ready.Overload.__init__ = timed  # type: ignore[method-assign]
    began: list[tuple[float, float]] = []

    def on_event(event: Event) -> None:
        if event.kind == "start":
            began.append(cpu())

    summary = merge(config_of(models, method), out, threads=threads, memory=memory, on_event=on_event)
    user, system = (now - then for now, then in zip(cpu(), began[0], strict=True))
    return {"user": user, "system": system, "kernels": sum(in_kernels), **summary.profile}


def row(method: str, threads: int, found: dict[str, Any], gigabytes: float) -> str:
    """Return a line of the table."""
    stages = found["stages"]
    checksum = stages.get("checksum", {}).get("cpu", 0.0)
    interpreter = max(0.0, found["user"] - found["kernels"] - checksum)
    figures = [
        (found["user"] + found["system"]) / gigabytes,
        found["system"] / gigabytes,
        interpreter / gigabytes,
    ]
    waits = [stages.get(stage, {}).get("wall", 0.0) for stage in SHOWN]
    told = [f"{value:.2f}" for value in figures] + [f"{value:.1f}" for value in waits]
    return f"| `{method}` | {threads} | {found['workers']} | {' | '.join(told)} |"


def main() -> None:
    """Run all merges, and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", type=Path)
    parser.add_argument("--threads", default="1,2,4,8,16")
    parser.add_argument("--methods", default="linear,ties,dare_ties")
    parser.add_argument("--memory", default="2GiB")
    parser.add_argument("--one", help="used by the program itself")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.models) as scratch:
        out = Path(scratch) / "out"
        if args.one:
            print(json.dumps(run(args.models, args.methods, int(args.threads), args.memory, out)))
            return
        print(
            "| method | threads | workers | CPU s/GB | system | interpreter | "
            + ", s | ".join(SHOWN)
            + ", s |"
        )
        print("|" + " --- |" * (6 + len(SHOWN)))
        for method in args.methods.split(","):
            config = config_of(args.models, method)
            names = [one["model"] for one in config["models"]] + [config.get("base_model")]
            size = sum(
                path.stat().st_size for name in names if name for path in Path(name).glob("*.safetensors")
            )
            for threads in map(int, args.threads.split(",")):
                command = [sys.executable, __file__, str(args.models), "--methods", method, "--one", "yes"]
                command += ["--threads", str(threads), "--memory", args.memory]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                print(row(method, threads, json.loads(done.stdout.splitlines()[-1]), size / 1e9), flush=True)
                shutil.rmtree(out, ignore_errors=True)


if __name__ == "__main__":
    main()
