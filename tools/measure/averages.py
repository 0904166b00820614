"""Measures averages of checkpoints against the disk.

    python tools/measure/averages.py WORKDIR [--checkpoints 8] [--nbytes 1700000000] [--runs 5] [--memory 2GiB]

Each run is a pair: a plain read of the checkpoints beside a plain write of the output's size, then the average, both on
a cold page cache where that may be emptied. Prints a line a run and the median ratio.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
from pathlib import Path

import numpy as np
import torch
from bench_measure import drop_caches, measure, measure_limit
from safetensors.torch import save_file

SIDE = 4096


def write_run(directory: Path, n: int, nbytes: int) -> list[Path]:
    """Write checkpoints of bf16 weights in all normal exponents near 1, as files of safetensors; return them."""
    files = []
    generator = np.random.default_rng(0)
    for i in range(n):
        folder = directory / f"checkpoint-{100 * (i + 1)}"
        file = folder / "model.safetensors"
        files.append(file)
        if file.exists():
            continue
        folder.mkdir(parents=True, exist_ok=True)
        shape = (SIDE, SIDE // 2)
        layers = {
            f"layers.{layer}.weight": torch.from_numpy(
                generator.integers(0x3C00, 0x3F80, shape, np.int16)
            ).view(torch.bfloat16)
            for layer in range(max(1, nbytes // (SIDE * SIDE)))
        }
        save_file(layers, file)
    return files


def main() -> None:
    """Measure, and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workdir", type=Path)
    parser.add_argument("--checkpoints", type=int, default=8)
    parser.add_argument("--nbytes", type=int, default=1_700_000_000)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--memory", default="2GiB")
    asked = parser.parse_args()
    files = write_run(asked.workdir / "run", asked.checkpoints, asked.nbytes)
    nbytes, out, ratios = files[0].stat().st_size, asked.workdir / "out", []
    command = [sys.executable, "-m", "streammerge", "average", asked.workdir / "run", out]
    # Byte code is cached even where the caller's environment forbids it: an installed package comes with it.
    environment = {"PYTHONPYCACHEPREFIX": str(asked.workdir / "python"), "PYTHONDONTWRITEBYTECODE": ""}
    measure([sys.executable, "-m", "streammerge", "--help"], environment)
    for number in range(asked.runs):
        cold = drop_caches()
        limit = measure_limit(asked.workdir / "zeros", files, nbytes)
        drop_caches()
        usage, words = measure([*command, "--memory", asked.memory, "--quiet"], environment)
        if usage.exit_code:
            sys.exit(words)
        shutil.rmtree(out)
        ratios.append(usage.wall_s / limit.limit_s)
        print(
            f"run {number + 1}, {'cold' if cold else 'as found'}: {len(files)} x {nbytes / 1e9:.2f} GB, "
            f"limit {limit.limit_s:.2f} s, average {usage.wall_s:.2f} s, ratio {ratios[-1]:.2f}, "
            f"peak {usage.peak_nbytes >> 20} MiB, CPU of others {usage.others_cpu_s:.1f} s",
            flush=True,
        )
    print(f"median ratio {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    main()
