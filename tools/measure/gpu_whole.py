"""The table of `gpu.py`, and its last part: whole merges by each device, from the disk and from the page cache."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

N_MODELS = 3


@dataclass
class Table:
    """Lines of Markdown, shown as they are found."""

    lines: list[str] = field(default_factory=list)
    equal: bool = True

    def head(self, title: str, *columns: str) -> None:
        """Begin a table."""
        self._say(f"\n## {title}\n\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")

    def row(self, *cells: object) -> None:
        """Add a row; numbers have three digits."""
        shown = [f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in cells]
        self._say(f"| {' | '.join(shown)} |")

    def _say(self, text: str) -> None:
        self.lines.append(text)
        print(text, flush=True)


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


def measure_merges(table: Table, work: Path, nbytes: int, devices: Sequence[str], merge: Any) -> None:
    """Time whole merges by each device, from the disk and from the page cache, and compare their files."""
    paths = write_models(work, nbytes)
    files = [path / "model.safetensors" for path in paths]
    total = sum(file.stat().st_size for file in files)
    table.head(
        f"Whole merges of {total / 1e9:.1f} GB",
        "method",
        "cache",
        *(f"{device}, s" for device in devices),
        "files",
    )
    for method, parameters in (("linear", {}), ("ties", {"density": 0.5}), ("della", {"density": 0.5})):
        models = [{"model": str(path), "parameters": {"weight": 0.5}} for path in paths[1:]]
        config = {"merge_method": method, "models": models, "parameters": parameters}
        if method != "linear":
            config["base_model"] = str(paths[0])
        for cache in ("cold", "warm"):
            row, outputs = [], []
            for device in devices:
                out = work / f"out-{device.replace(':', '-')}"
                shutil.rmtree(out, ignore_errors=True)
                for file in files:
                    settle(file, warm=cache == "warm")
                row.append(merge(config, out, device))
                outputs.append((out / "streammerge.json").read_bytes())
            same = len(set(outputs)) == 1
            table.equal &= same
            table.row(method, cache, *row, "equal" if same else "DIFFERENT")


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


def by_command(config: Any, out: Path, device: str) -> float:
    """Return the seconds of a merge in a process of its own, the interpreter's start included."""
    path = out.with_suffix(".yml")
    path.write_text(json.dumps(config))
    command = [
        sys.executable,
        "-m",
        "streammerge",
        "merge",
        str(path),
        str(out),
        "--device",
        device,
        "--quiet",
    ]
    return seconds(lambda: subprocess.run(command, check=True))


def in_process(config: Any, out: Path, device: str) -> float:
    """Return the seconds of a merge in this process, where a GPU is played."""
    from streammerge.api import merge

    return seconds(lambda: merge(config, out, device=device, memory="2GiB", progress=False))
