"""The table of `gpu.py`, and its last part: whole merges by each device, from the disk and from the page cache."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

N_MODELS = 3
SIZE = "20GB"
"""Bytes of the models together, unless time or room is short."""
METHODS: dict[str, dict[str, float]] = {"linear": {}, "ties": {"density": 0.5}, "della": {"density": 0.5}}
_PASSES = 10
"""Times the size of all models that their making and the cold merges move, which the disk bounds."""
_COST = 13.0
"""Core seconds per GB of all merges on CPUs."""
_GRAIN = 10**9
"""Bytes; sizes are multiples of it, so that a second run finds the models of the first."""
_TRIED = 1 << 28
"""Bytes that are written to learn the disk's rate."""


@dataclass
class Table:
    """Lines of Markdown, shown as they are found, and written to a file at once."""

    file: Path | None = None
    equal: bool = True
    whole: bool = True
    """Whether everything was measured."""

    def head(self, title: str, *columns: str) -> None:
        """Begin a table."""
        self._say(f"\n## {title}\n\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")

    def row(self, *cells: object) -> None:
        """Add a row; numbers have three digits."""
        shown = [f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in cells]
        self._say(f"| {' | '.join(shown)} |")

    def _say(self, text: str) -> None:
        print(text, flush=True)
        if self.file is not None:
            with open(self.file, "a") as file:
                file.write(f"{text}\n")


def seconds(run: Callable[[], Any]) -> float:
    """Return the time of one call."""
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def write_models(work: Path, nbytes: int) -> list[Path]:
    """Write a base and three models of `nbytes` together, unless they are there."""
    rows = max(64, min(8192, nbytes // (4 * 2 * 4096) // 4))
    tensors = max(1, nbytes // (4 * 2 * 4096 * rows))
    rng, paths = np.random.default_rng(0), []
    base = rng.standard_normal((rows, 4096), np.float32) * 0.02
    for number in range(N_MODELS + 1):
        folder = work / f"models-{nbytes}" / ("base" if not number else f"m{number}")
        paths.append(folder)
        values = base + (rng.standard_normal(base.shape, np.float32) * 1e-3 if number else 0)
        bits = (values.view(np.uint32) >> 16).astype(np.uint16)
        if (folder / "config.json").exists():
            continue
        folder.mkdir(parents=True, exist_ok=True)
        size, header = bits.nbytes, {}
        for i in range(tensors):
            header[f"layers.{i:03}.w"] = {
                "dtype": "BF16", "shape": list(bits.shape), "data_offsets": [i * size, (i + 1) * size]
            }  # fmt: skip
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(folder / "model.safetensors", "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for i in range(tensors):
                file.write(np.roll(bits, 7 * i, axis=0).data)
        (folder / "config.json").write_text('{"model_type": "llama"}')
    return paths


def size_for(work: Path, most: int, left: float) -> int:
    """Return how many bytes the models may have, so that making and merging them takes `left` seconds at most."""
    sys.path.insert(0, str(Path(__file__).parents[2]))
    from streammerge.machine import available_memory, physical_cores

    trial, block = work / "trial", os.urandom(1 << 20)
    blocks = max(1, min(_TRIED, most) >> 20)

    def write() -> None:
        with open(trial, "wb") as file:
            for _ in range(blocks):
                file.write(block)
            os.fsync(file.fileno())

    rate = (blocks << 20) / max(seconds(write), 1e-9) / 1e9
    trial.unlink()
    in_time = left / (_PASSES / rate + _COST / physical_cores()) * 1e9
    # The warm merges need all of it in the page cache; an output is a quarter, and there are two.
    size = int(min(most, in_time, available_memory() / 2, shutil.disk_usage(work).free / 2))
    return size // _GRAIN * _GRAIN or size


def measure_merges(
    table: Table, work: Path, nbytes: int, devices: Sequence[str], merge: Any, until: float
) -> None:
    """Time whole merges by each device, from the disk and from the page cache, and compare their files.

    `until` is the time (`time.monotonic`) at which none begins any more, and at which one that runs is ended.
    """
    nbytes = size_for(work, nbytes, 0.7 * (until - time.monotonic()))
    paths = write_models(work, nbytes)
    files = [path / "model.safetensors" for path in paths]
    total = sum(file.stat().st_size for file in files)
    columns = (*(f"{device}, s" for device in devices), "files")
    table.head(f"Whole merges of {total / 1e9:.1f} GB", "method", "cache", *columns)
    for method, parameters in METHODS.items():
        models = [{"model": str(path), "parameters": {"weight": 0.5}} for path in paths[1:]]
        config = {"merge_method": method, "models": models, "parameters": parameters}
        if method != "linear":
            config["base_model"] = str(paths[0])
        for cache in ("cold", "warm"):
            row: list[object] = []
            outputs = set()
            for device in devices:
                if (left := until - time.monotonic()) <= 0:
                    row.append("no time left")
                    continue
                out = work / f"out-{device.replace(':', '-')}"
                shutil.rmtree(out, ignore_errors=True)
                for file in files:
                    settle(file, warm=cache == "warm")
                row.append(took := merge(config, out, device, left))
                outputs.add((out / "streammerge.json").read_bytes() if isinstance(took, float) else str(took))
            compared = all(isinstance(took, float) for took in row)
            same = len(outputs) == 1
            table.equal &= same or not compared
            table.whole &= compared
            table.row(method, cache, *row, "" if not compared else "equal" if same else "DIFFERENT")


def settle(file: Path, *, warm: bool) -> None:
    """Bring a file into the page cache, or drop it from there."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        if warm:
            while os.read(descriptor, 1 << 24):
                pass
        else:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def by_command(config: Any, out: Path, device: str, limit: float) -> float | str:
    """Return the seconds of a merge in a process of its own, the interpreter's start included; or what it failed of."""
    path = out.with_suffix(".yml")
    path.write_text(json.dumps(config))
    own = ["merge", str(path), str(out), "--device", device, "--quiet"]
    command = [sys.executable, "-m", "streammerge", *own]
    began = time.perf_counter()
    try:
        done = subprocess.run(command, timeout=limit, stderr=subprocess.PIPE, text=True)
    except subprocess.TimeoutExpired:
        return f"ended after {limit:.0f} s"
    took = time.perf_counter() - began
    return (
        took
        if not done.returncode
        else (done.stderr.strip().splitlines() or ["failed"])[-1].replace("|", "/")
    )


def in_process(config: Any, out: Path, device: str, limit: float) -> float:
    """Return the seconds of a merge in this process, where a GPU is played."""
    from streammerge.api import merge

    return seconds(lambda: merge(config, out, device=device, memory="2GiB", progress=False))
