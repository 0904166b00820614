"""Measures what a quantised base costs: CPU seconds of merges with it, over those of the same merges in BF16.

    python tools/measure/quantised.py WORKDIR [--tensors 16] [--runs 5] [--models 3] [--methods linear,ties] [--memory 2GiB]

The models are made once: a base of matrices in blocks of FP8 as DeepSeek stores them, the same values in BF16, and
fine-tunes of it in BF16. The merges take turns, so that what else runs on the machine meets all of them; a ratio is of
medians. The seconds of each stage come from `--profile`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
from pathlib import Path

import numpy as np
import torch
from bench_measure import measure
from safetensors.torch import save_file

SHAPE = (2048, 4096)
BLOCK = 128
DECLARED = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [BLOCK, BLOCK],
}
NAME = "model.layers.{}.mlp.down_proj.weight"


def write(folder: Path, tensors: dict[str, torch.Tensor], **more: object) -> None:
    """Write a model directory."""
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **more}))


def make_models(place: Path, n_tensors: int, n_models: int) -> None:
    """Write `fp8`, `bf16`, and fine-tunes `0`, `1`, and so on, unless they are there."""
    if (place / f"{n_models - 1}").exists():
        return
    generator = torch.Generator().manual_seed(0)
    folders: dict[str, dict[str, torch.Tensor]] = {
        name: {} for name in ("fp8", "bf16", *map(str, range(n_models)))
    }
    for i in range(n_tensors):
        name = NAME.format(i)
        grid = (SHAPE[0] // BLOCK, BLOCK, SHAPE[1] // BLOCK, BLOCK)
        blocks = (torch.randn(SHAPE, generator=generator) * 0.02).view(grid)
        scale = blocks.abs().amax((1, 3), keepdim=True) / 448
        codes = (blocks / scale).to(torch.float8_e4m3fn)
        values = (codes.float() * scale).view(SHAPE)
        folders["fp8"] |= {name: codes.view(SHAPE), f"{name}_scale_inv": scale[:, 0, :, 0].contiguous()}
        folders["bf16"][name] = values.bfloat16()
        for model in range(n_models):
            moved = values + 1e-3 * torch.randn(SHAPE, generator=generator)
            folders[str(model)][name] = moved.bfloat16()
    for name, tensors in folders.items():
        write(place / name, tensors, **({"quantization_config": DECLARED} if name == "fp8" else {}))


def config_of(place: Path, method: str, base: str, n_models: int) -> dict[str, object]:
    """Return a merge of the fine-tunes with a base, which is one of the models of a linear merge."""
    models = [{"model": str(place / str(i)), "parameters": {"weight": 0.3}} for i in range(n_models)]
    if method == "linear":
        first = {"model": str(place / base), "parameters": {"weight": 0.1}}
        return {"merge_method": method, "models": [first, *models], "dtype": "bfloat16"}
    how = {"density": 0.2} if method == "ties" else {}
    return {
        "merge_method": method,
        "base_model": str(place / base),
        "models": models,
        "dtype": "bfloat16",
        "parameters": how,
    }


def main() -> None:
    """Measure, and print a line a method."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workdir", type=Path)
    parser.add_argument("--tensors", type=int, default=16)
    parser.add_argument("--models", type=int, default=3)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--methods", default="linear,ties")
    parser.add_argument("--memory", default="2GiB")
    parser.add_argument(
        "--stages", action="store_true", help="print the CPU seconds of each stage of the last runs"
    )
    asked = parser.parse_args()
    make_models(asked.workdir, asked.tensors, asked.models)
    out, profile = asked.workdir / "out", asked.workdir / "profile.json"
    # Byte code is cached even where the caller's environment forbids it: an installed package comes with it.
    environment = {"PYTHONPYCACHEPREFIX": str(asked.workdir / "python"), "PYTHONDONTWRITEBYTECODE": ""}
    for method in asked.methods.split(","):
        # With an FP8 output too: what the encoder adds.
        cases: dict[str, tuple[str, dict[str, str]]] = {
            "bf16": ("bf16", {}),
            "fp8": ("fp8", {}),
            "to fp8": ("bf16", {"quantize": "fp8"}),
        }
        seconds: dict[str, list[float]] = {case: [] for case in cases}
        for run in range(asked.runs + 1):
            for case, (base, more) in cases.items():
                config = asked.workdir / f"{method}.json"
                config.write_text(json.dumps(config_of(asked.workdir, method, base, asked.models) | more))
                command = [
                    sys.executable,
                    "-m",
                    "streammerge",
                    "merge",
                    config,
                    out,
                    "--memory",
                    asked.memory,
                ]
                usage, words = measure([*command, "--quiet", "--profile", profile], environment)
                if usage.exit_code:
                    sys.exit(words)
                shutil.rmtree(out)
                if run:  # the first may compile
                    seconds[case].append(usage.cpu_s)
                if asked.stages and run == asked.runs:
                    print(case, profile.read_text())
        medians = {case: statistics.median(found) for case, found in seconds.items()}
        gigabytes = 2 * asked.tensors * int(np.prod(SHAPE)) / 1e9
        print(
            f"{method}: {medians['bf16'] / gigabytes:.2f} CPU s a GB of output in BF16; FP8 base x "
            f"{medians['fp8'] / medians['bf16']:.2f}, FP8 output x {medians['to fp8'] / medians['bf16']:.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
