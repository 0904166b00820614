"""Merges end to end by the fused kernels, under Triton's interpreter: the files are those of the CPU, byte for byte.

    python tools/prove/gpu_merges.py [--few]

Without --few it runs every variant that the laws of methods know; what has no fused kernel goes through the CPU's kernels or torch,
as in a merge on a GPU.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from streammerge.algebra.block import Block, BlockMath
from streammerge.algebra.extent import Extent
from streammerge.api import merge
from streammerge.backends.cpu.backend import CPU
from streammerge.backends.cpu.math import KernelMath
from streammerge.backends.fused.copied import Copied
from streammerge.backends.fused.interpreter import Interpreter
from streammerge.backends.fused.launcher import KernelSpec
from streammerge.backends.fused.math import FusedMath
from streammerge.backends.registry import register_backend
from streammerge.backends.torch.backend import TORCH
from streammerge.testing.models import config_for, output_bytes, write_models

SHAPES: dict[str, tuple[int, ...]] = {
    "model.layers.0.mlp.down_proj.weight": (21, 53),
    "model.layers.0.input_layernorm.weight": (64,),
    "column": (31, 1),
}
FEW: list[tuple[str, dict[str, Any]]] = [
    ("linear", {"weight": 0.3}),
    ("task_arithmetic", {"lambda": 0.7}),
    ("ties", {"density": 0.3}),
    ("ties", {"density": 0.2, "trim_scope": "model", "zero_sign": "majority", "ties": "all"}),
    ("dare_ties", {"density": 0.5, "rescale": "l1"}),
    ("dare_linear", {"density": 0.5}),
    ("breadcrumbs", {"density": 0.5, "gamma": 0.1}),
    ("fisher", {}),
    ("consensus", {"lambda_mask": 0.6}),
    ("emr", {"weight": 0.5}),
    ("ramplus_tl", {}),
]
DEVICE = "interpreted"
LAUNCHED: Counter[str] = Counter()
"""Launches of each kernel in a merge."""
EVER: Counter[str] = Counter()
"""Those in all merges."""


def register() -> Interpreter:
    """Register a device that runs fused kernels under the interpreter; return its launcher."""
    launcher = Interpreter()
    launch = launcher.launch

    def counted(kernel: KernelSpec, *how: Any) -> None:
        LAUNCHED[kernel.name] += 1
        launch(kernel, *how)

    launcher.launch = counted  # type: ignore[method-assign]

    def math(block: Block, device: str, sees: Extent) -> BlockMath:
        return FusedMath(block, launcher, Copied(block, launcher), KernelMath)

    def torch_math(block: Block, device: str, sees: Extent) -> BlockMath:
        return TORCH.math(block, "cpu", sees)

    rest = replace(TORCH, math=torch_math)
    register_backend(replace(CPU, name=DEVICE, device=DEVICE, math=math, rest=rest))
    return launcher


def compare(variants: list[tuple[str, dict[str, Any]]], *, dtypes: tuple[Any, ...]) -> list[str]:
    """Return the variants whose outputs differ, and say how each went."""
    different = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        models = {
            dtype: write_models(root / str(dtype), dtype=dtype, shapes=SHAPES, spread=2e-4)
            for dtype in dtypes
        }
        for number, (method, parameters) in enumerate(variants):
            dtype = dtypes[number % len(dtypes)]
            config = config_for(method, models[dtype], parameters=parameters)
            outs: list[dict[str, bytes]] = []
            LAUNCHED.clear()
            for device in ("cpu", DEVICE):
                out = root / f"{number}-{device}"
                merge(config, out, device=device, memory="512MiB", write_model_card=False, progress=False)
                outs.append(
                    {name: b for name, b in output_bytes(out).items() if name.endswith(".safetensors")}
                )
            same = outs[0] == outs[1] and bool(outs[0])
            launched = " ".join(f"{name} {n}" for name, n in sorted(LAUNCHED.items())) or "no kernel"
            print(f"{'equal' if same else 'DIFFERS':8}{method} {parameters} {dtype}: {launched}", flush=True)
            EVER.update(LAUNCHED)
            if not same:
                different.append(f"{method} {parameters}")
    return different


def main() -> int:
    """Compare, and return 1 if anything differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--few", action="store_true", help="only what CI runs")
    few = parser.parse_args().few
    register()
    if few:
        variants = FEW
    else:
        from tests.laws.test_methods import VARIANTS

        variants = VARIANTS
    different = compare(variants, dtypes=(torch.bfloat16, torch.float32))
    print(f"{len(variants)} merges, {len(different)} differ")
    return bool(different)


if __name__ == "__main__":
    sys.exit(main())
