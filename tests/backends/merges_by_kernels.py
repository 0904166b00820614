"""Whole merges by the fused kernels' own sources, through the rings and the launcher, on a GPU that memory plays.

    TRITON_INTERPRET=1 python -m tests.backends.merges_by_kernels METHODS...

Prints the methods whose files have the bytes of the CPUs'. Triton's interpreter is slow, so the models are tiny.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numba  # noqa: F401  (its LLVM must be loaded before Triton's)

from streammerge.api import merge
from streammerge.backends.fused.interpreter import Interpreter
from streammerge.backends.fused.specs import kernel_specs
from streammerge.backends.gpu import backend as gpu
from streammerge.backends.gpu.lane import Lane, Sizes
from streammerge.backends.registry import BACKENDS
from streammerge.planning import on_device
from tests.backends.fake_driver import FakeDriver
from tests.conftest import config_for, output_bytes, write_models

SIZES = Sizes(slots_in=3, slots_out=2, slot_bytes=1 << 13, staging=1, staging_bytes=1 << 12)
SHAPES = {"wide": (2, 2600), "odd": (31, 67)}
PARAMETERS: dict[str, dict[str, Any]] = {
    "linear": {"weight": 0.3, "normalize": False},
    "ties": {"density": 0.3, "zero_sign": "majority"},
    "dare_ties": {"density": 0.4, "mask": "exact", "rescale": "l1"},
    "fisher": {},
    "della": {"density": 0.5},
    "breadcrumbs": {"density": 0.5, "gamma": 0.1},
    "slerp": {"t": 0.4},
    "model_stock": {},
}


def lane(device: str) -> Lane:
    """Open the GPU that memory plays; its kernels are run by Triton's interpreter."""
    driver, interpreter = FakeDriver(1 << 24), Interpreter()

    def runs(kernel: tuple[str, str], grid: tuple[int, int], parameters: list[Any]) -> None:
        spec = kernel_specs()[kernel[0]]  # several kernels of one name are told apart by their PTX
        interpreter.launch(spec, grid, [int(one) for one in parameters[: len(spec.signature)]])

    driver.runs = runs
    return Lane(driver, gpu.fused_math, lambda spec: spec.name, SIZES)


def main() -> None:
    """Merge by every method asked for."""
    on_device.DEVICE_BYTES = 1 << 10
    BACKENDS["fused"] = replace(
        gpu.FUSED, open_lane=lane, find=lambda number: f"cuda:{number}", lacks=lambda: None
    )
    with tempfile.TemporaryDirectory() as folder:
        paths = write_models(Path(folder), 2, shapes=SHAPES, spread=1e-3)
        for method in sys.argv[1:] or PARAMETERS:
            config = config_for(method, paths, parameters=PARAMETERS[method], seed=3)
            found = []
            for device in ("cuda", "cpu"):
                out = Path(folder) / method / device
                merge(config, out, device=device, memory="3GiB", threads=1, progress=False)
                found.append(output_bytes(out))
            print(method, "equal" if found[0] == found[1] else "DIFFERENT", flush=True)


if __name__ == "__main__":
    main()
