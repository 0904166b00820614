"""Measure what a sweep costs next to one merge, and kill sweeps at random moments.

    python tools/measure/sweeps.py costs [--mib 350] [--memory 1GiB]   # bytes, time and peak memory of six points
    python tools/measure/sweeps.py kills [--times 20]                  # SIGKILL, then the same command; bytes compared

Times are wall clock and CPU of whole commands, the interpreter's start included.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from streammerge.api import merge
from streammerge.testing.models import output_bytes, write_models

COMMAND = (sys.executable, "-m", "streammerge.cli")
CASES: dict[str, tuple[str, dict[str, Any], dict[str, list[float]]]] = {
    "task_arithmetic, six scales": ("task_arithmetic", {}, {"lambda": [0.3, 0.4, 0.5, 0.6, 0.7, 1.0]}),
    "task_arithmetic, six weights": ("task_arithmetic", {}, {"weight": [0.3, 0.4, 0.5, 0.6, 0.7, 1.0]}),
    "ties, one density": ("ties", {"density": 0.2}, {"lambda": [0.3, 0.4, 0.5, 0.6, 0.7, 1.0]}),
    "ties, six densities": ("ties", {}, {"density": [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]}),
}


def models_of(directory: Path, mib: int) -> list[str]:
    """Write a base and two fine-tunes of about `mib` MiB each, and return their paths."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (16_000, 1024)}
    for i in range(max(1, (mib - 31) // 26)):
        shapes |= {
            f"model.layers.{i}.mlp.{name}.weight": (4096, 1024)
            for name in ("up_proj", "gate_proj", "down_proj")
        }
        shapes |= {
            f"model.layers.{i}.self_attn.q_proj.weight": (1024, 1024),
            f"model.layers.{i}.input_layernorm.weight": (1024,),
        }
    return [str(path) for path in write_models(directory, 2, shapes=shapes)]


def run(*arguments: object) -> dict[str, Any]:
    """Run a command with ``--json``; return its last event, with bytes read, seconds, CPU seconds and peak bytes."""
    before, began = os.times(), time.monotonic()
    done = subprocess.run(
        [*COMMAND, *map(str, arguments), "--json"], stdout=subprocess.PIPE, text=True, check=True
    )
    after = os.times()
    events = [json.loads(line) for line in done.stdout.splitlines()]
    progress = [event for event in events if event["event"] == "progress"]
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return {
        "bytes_read": progress[-1]["bytes_read"],
        "seconds": time.monotonic() - began,
        "cpu": cpu,
        "resident": max(event["resident_bytes"] for event in progress),
    }


def config_of(paths: list[str], method: str, parameters: Mapping[str, Any], **top: Any) -> dict[str, Any]:
    """Return a config over [base, model 1, model 2]."""
    return {
        "merge_method": method,
        "base_model": paths[0],
        "models": paths[1:],
        "parameters": dict(parameters),
        **top,
    }


def costs(directory: Path, mib: int, memory: str) -> None:
    """Print what six points of each case cost, in units of one merge."""
    paths = models_of(directory, mib)
    for title, (method, parameters, grid) in CASES.items():
        one, six = directory / "one.yml", directory / "six.yml"
        first = {key: values[0] for key, values in grid.items()}
        one.write_text(yaml.safe_dump(config_of(paths, method, {**parameters, **first})))
        six.write_text(yaml.safe_dump(config_of(paths, method, parameters, sweep=grid)))
        single = run("merge", one, directory / "one", "--memory", memory)
        swept = run("sweep", six, directory / "six", "--memory", memory)
        ratios = {key: swept[key] / single[key] for key in ("bytes_read", "seconds", "cpu")}
        print(
            f"{title}: reads {ratios['bytes_read']:.3f} x, time {ratios['seconds']:.2f} x, CPU {ratios['cpu']:.2f} x; "
            f"resident at most {swept['resident'] >> 20} MiB of {memory}"
        )
        shutil.rmtree(directory / "one")
        shutil.rmtree(directory / "six")


def kills(directory: Path, times: int, seed: int) -> None:
    """Kill a sweep again and again until it is finished; compare every point with a merge."""
    rng, paths, done = random.Random(seed), models_of(directory, 120), 0
    config = config_of(paths, "ties", {}, sweep={"density": [0.2, 0.5], "lambda": [0.5, 1.0]})
    (directory / "c.yml").write_text(yaml.safe_dump(config))
    while done < times:
        out = directory / "out"
        while True:
            command = [*COMMAND, "sweep", str(directory / "c.yml"), str(out), "--quiet", "--memory", "400MiB"]
            process = subprocess.Popen([*command, "--score", ": {}; echo 1"], stderr=subprocess.DEVNULL)
            try:
                process.wait(rng.uniform(1.5, 12))
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                done += 1
            if process.wait() == 0:
                break
            assert process.returncode == -signal.SIGKILL, process.returncode
        for point in sorted(path for path in out.iterdir() if path.is_dir()):
            single = directory / "single" / point.name
            if not single.exists():
                merge(point / "streammerge_config.yml", single, on_event=lambda event: None)
            assert output_bytes(point) == output_bytes(single), point.name
        print(f"{done} kills; all points have the bytes of a merge", flush=True)
        shutil.rmtree(out)


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["costs", "kills"])
    parser.add_argument("--mib", type=int, default=350)
    parser.add_argument("--memory", default="1GiB")
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="sweeps-") as name:
        if asked.what == "costs":
            costs(Path(name), asked.mib, asked.memory)
        else:
            kills(Path(name), asked.times, asked.seed)


if __name__ == "__main__":
    main()
