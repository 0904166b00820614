"""
Time `iso_c` and `tsv_m` next to a plain torch loop over the same tensors, and measure the peak of both.

    python tools/measure/matrices.py --work /tmp/matrices --layers 4 --memory 1GiB

The loop reads one tensor of every model at a time, decomposes it with `torch.linalg.svd` as the published codes do, in
float32 or float64 on all CPUs, and writes all results with safetensors. Runs alternate, and the median of each counts.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
import yaml
from safetensors import safe_open
from safetensors.torch import save_file

VOCABULARY = 8192
N_MODELS = 3


def shapes(layers: int, hidden: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a model like Llama's, with small key and value projections."""
    inner, keys = hidden * 8 // 3 // 128 * 128, hidden // 4
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, hidden)}
    for i in range(layers):
        for name, shape in (
            ("self_attn.q_proj", (hidden, hidden)),
            ("self_attn.k_proj", (keys, hidden)),
            ("self_attn.v_proj", (keys, hidden)),
            ("self_attn.o_proj", (hidden, hidden)),
            ("mlp.gate_proj", (inner, hidden)),
            ("mlp.up_proj", (inner, hidden)),
            ("mlp.down_proj", (hidden, inner)),
        ):
            found[f"model.layers.{i}.{name}.weight"] = shape
    return found


def make(work: Path, layers: int, hidden: int) -> list[Path]:
    """Write a base and fine-tunes of it in bf16, unless they exist; return their directories."""
    paths = [work / name for name in ("base", *(f"m{i}" for i in range(N_MODELS)))]
    for seed, path in enumerate(paths):
        if path.exists():
            continue
        path.mkdir(parents=True)
        base, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
        tensors = {}
        for name, shape in shapes(layers, hidden).items():
            weight = torch.randn(shape, generator=base) * 0.02
            if seed:
                low = torch.randn(shape[0], 32, generator=own) @ torch.randn(32, shape[1], generator=own)
                weight += 2e-4 * low + 1e-3 * torch.randn(shape, generator=own)
            tensors[name] = weight.bfloat16()
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        (path / "config.json").write_text(json.dumps({"model_type": "llama", "torch_dtype": "bfloat16"}))
    return paths


def iso_c(deltas: list[torch.Tensor]) -> torch.Tensor:
    """Return the merged task vector as the published code computes it."""
    u, s, vh = torch.linalg.svd(sum(deltas[1:], start=deltas[0]), full_matrices=False)
    return s.mean() * (u @ vh)


def tsv_m(deltas: list[torch.Tensor]) -> torch.Tensor:
    """Return the merged task vector as the published code computes it."""
    k = min(deltas[0].shape) // len(deltas)
    left, values, right = [], [], []
    for delta in deltas:
        u, s, vh = torch.linalg.svd(delta, full_matrices=False)
        left, values, right = [*left, u[:, :k]], [*values, s[:k]], [*right, vh[:k]]
    pu, _, qu = torch.linalg.svd(torch.cat(left, dim=1), full_matrices=False)
    pv, _, qv = torch.linalg.svd(torch.cat(right), full_matrices=False)
    return (pu @ qu * torch.cat(values)) @ (pv @ qv)


def loop(method: str, dtype: torch.dtype, paths: list[Path], out: Path) -> None:
    """Merge tensor by tensor."""
    files = [safe_open(path / "model.safetensors", "pt") for path in paths]
    merged = {}
    for name in files[0].keys():  # noqa: SIM118
        base, *models = (file.get_tensor(name).to(dtype) for file in files)
        deltas = [model - base for model in models]
        if "layers" in name:
            tau = {"iso_c": iso_c, "tsv_m": tsv_m}[method](deltas)
        else:
            tau = torch.stack(deltas).mean(dim=0)
        merged[name] = (base + tau).bfloat16()
    out.mkdir()
    save_file(merged, out / "model.safetensors", metadata={"format": "pt"})
    with open(out / "model.safetensors", "rb") as file:
        os.fsync(file.fileno())


class Usage(NamedTuple):
    """What a run took."""

    seconds: float
    cpu: float
    """Seconds of all CPUs together, which other processes disturb less."""
    peak: int
    """Bytes."""


def measured(command: list[str]) -> Usage:
    """Run a command."""
    began = time.monotonic()
    pid = os.posix_spawn(command[0], command, os.environ)
    _, status, usage = os.wait4(pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} failed")
    return Usage(time.monotonic() - began, usage.ru_utime + usage.ru_stime, usage.ru_maxrss << 10)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=1536)
    parser.add_argument("--memory", default="1GiB")
    parser.add_argument("--methods", nargs="+", default=["iso_c", "tsv_m"])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "float64"])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--loop", nargs=3, metavar=("METHOD", "DTYPE", "OUT"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    paths = make(given.work, given.layers, given.hidden)
    if given.loop:
        method, dtype, out = given.loop
        torch.set_num_threads(given.threads)
        loop(method, getattr(torch, dtype), paths, Path(out))
        return
    nbytes = sum((path / "model.safetensors").stat().st_size for path in paths)
    print(f"{nbytes / 1e6:.0f} MB of inputs, {os.cpu_count()} CPUs", flush=True)
    for method in given.methods:
        config = given.work / f"{method}.yml"
        models = [str(path) for path in paths[1:]]
        config.write_text(
            yaml.safe_dump({"merge_method": method, "base_model": str(paths[0]), "models": models})
        )
        kinds = ["streammerge", *given.dtypes]
        found: dict[str, list[Usage]] = {kind: [] for kind in kinds}
        for _ in range(given.runs):
            for kind in kinds:
                out = given.work / "out"
                subprocess.run(["rm", "-rf", str(out)], check=True)
                command = [sys.executable, "-m", "streammerge", "merge", str(config), str(out)]
                command += ["--memory", given.memory, "--threads", str(given.threads)]
                command += ["--device", "cpu", "--quiet"]
                if kind != "streammerge":
                    command = [sys.executable, __file__, "--work", str(given.work)]
                    command += ["--layers", str(given.layers), "--hidden", str(given.hidden)]
                    command += ["--threads", str(given.threads), "--loop", method, kind, str(out)]
                found[kind].append(measured(command))
        seconds = {kind: statistics.median(one.seconds for one in runs) for kind, runs in found.items()}
        cpu = {kind: statistics.median(one.cpu for one in runs) for kind, runs in found.items()}
        for kind, runs in found.items():
            wall, work = (took["streammerge"] / took[kind] for took in (seconds, cpu))
            print(
                f"{method} {kind}: {seconds[kind]:.1f} s, {cpu[kind]:.1f} s of CPU, peak "
                f"{max(one.peak for one in runs) / 2**20:.0f} MiB; streammerge takes {wall:.2f} x ({work:.2f} x CPU)",
                flush=True,
            )


if __name__ == "__main__":
    main()
