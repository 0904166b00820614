"""Measure the peak memory and the time of extracting an adapter from the matrices of a 7B model's layer.

    python tools/measure/measure_extraction.py [--memory 512MiB] [--threads 2] [--rank 32]

Makes a base and a fine-tune of it in bf16: gate and down projection of 11008 x 4096 and 4096 x 11008, random, 0.7 GB in
all, in a temporary directory. Runs `streammerge extract-lora` in a process of its own, and prints the operating system's figure
of its peak resident memory, the seconds, and the residuals.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

SHAPES = {"gate_proj": (11008, 4096), "down_proj": (4096, 11008)}


def write_models(room: Path) -> None:
    """Write both models; the change is of rank 64 and a little noise."""
    generator = torch.Generator().manual_seed(0)
    base, tuned = {}, {}
    for name, (rows, columns) in SHAPES.items():
        weight = torch.randn(rows, columns, generator=generator) * 0.02
        left, right = (torch.randn(*s, generator=generator) for s in ((rows, 64), (64, columns)))
        change = left @ right * 1e-4 + torch.randn(rows, columns, generator=generator) * 1e-4
        key = f"model.layers.0.mlp.{name}.weight"
        base[key], tuned[key] = weight.bfloat16(), (weight + change).bfloat16()
    for place, tensors in (("base", base), ("tuned", tuned)):
        (room / place).mkdir()
        save_file(tensors, room / place / "model.safetensors", metadata={"format": "pt"})
        (room / place / "config.json").write_text(json.dumps({"model_type": "llama"}))


def main() -> None:
    """Run the extraction and print its figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--memory", default="512MiB")
    parser.add_argument("--threads", default="2")
    parser.add_argument("--rank", default="32")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as room:
        write_models(Path(room))
        command = [sys.executable, "-m", "streammerge", "extract-lora", f"{room}/tuned", f"{room}/out"]
        command += ["--base", f"{room}/base", "--rank", given.rank, "--json"]
        command += ["--memory", given.memory, "--threads", given.threads]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    end = json.loads(done.stdout.splitlines()[-1])
    print(
        f"peak {end['peak_resident_bytes'] / (1 << 20):.0f} MiB of {given.memory}, {end['took_seconds']:.1f} s"
    )
    print(json.dumps(end["residuals"]["modules"]))


if __name__ == "__main__":
    main()
