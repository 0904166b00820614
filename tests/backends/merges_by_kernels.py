"""Whole merges by the fused kernels' own sources, through the rings and the launcher, on a GPU that memory plays.

    TRITON_INTERPRET=1 python -m tests.backends.merges_by_kernels METHODS... quantised...

Prints the methods whose files have the bytes of the CPUs'. Triton's interpreter is slow, so the models are tiny.
`quantised` merges models in different formats, and says which share of the bytes of their values went to the GPU.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numba  # noqa: F401  (its LLVM must be loaded before Triton's)
import numpy as np

from streammerge.api import merge
from streammerge.backends.fused.interpreter import Interpreter
from streammerge.backends.fused.specs import kernel_specs
from streammerge.backends.gpu import arena
from streammerge.backends.gpu import backend as gpu
from streammerge.backends.gpu.lane import Lane, Sizes
from streammerge.backends.registry import BACKENDS
from streammerge.engine import bringing
from streammerge.planning import on_device
from tests.backends.fake_driver import FakeDriver
from tests.checkpoint.quantized.formats import write, write_entries
from tests.checkpoint.quantized.numbers import bytes_of, finite_codes, floats_of
from tests.conftest import config_for, output_bytes, write_models

SIZES = Sizes(slots_in=3, slots_out=2, slot_bytes=3 << 12, staging=1, staging_bytes=1 << 12)
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


QUANTISED = {
    "quantised": ("ties", ("fp8 blocks F32", "gptq by index", "nvfp4", "nf4 nested"), 1 << 24),
    "quantised, streamed": ("linear", ("mxfp4 U8", "awq", "pack-quantized 3 bits, zero points"), 400_000),
    "quantised experts": ("linear", ("gpt-oss", "gpt-oss"), 1 << 24),
    "plain FP8": ("task_arithmetic", (), 1 << 24),
    "stacked FP8": ("task_arithmetic", (), 400_000),
}
"""Merges of quantised models: the method, the format of each, and the bytes of the device."""
MEMORY = [1 << 24]
DRIVERS: list[FakeDriver] = []


def lane(device: str) -> Lane:
    """Open the GPU that memory plays; its kernels are run by Triton's interpreter."""
    driver, interpreter = FakeDriver(MEMORY[0]), Interpreter()
    DRIVERS.append(driver)

    def runs(kernel: tuple[str, str], grid: tuple[int, int], parameters: list[Any]) -> None:
        spec = kernel_specs()[kernel[0]]  # several kernels of one name are told apart by their PTX
        interpreter.launch(spec, grid, [int(one) for one in parameters[: len(spec.signature)]])

    driver.runs = runs
    return Lane(driver, gpu.fused_math, lambda spec: spec.name, SIZES)


def both(config: Any, out: Path) -> bool:
    """Merge on the GPU and on the CPUs; return whether the bytes are equal."""
    found = []
    for device in ("cuda", "cpu"):
        merge(config, out / device, device=device, memory="3GiB", threads=1, progress=False)
        found.append(output_bytes(out / device))
    return found[0] == found[1]


def _entry(array: Any) -> Any:
    return floats_of(array, "F32")[0] if array.dtype == np.float32 else bytes_of(array, "F8_E4M3")


def write_experts(path: Path, seed: int, *, fused: bool) -> dict[str, Any]:
    """Write experts in blocks of FP8, all in one tensor or one by one; return arrays of the size of their values."""
    rng, parent = np.random.default_rng(seed), "model.layers.0.mlp.experts"
    entries: dict[str, Any] = {}
    values: dict[str, Any] = {}
    for name, parts, rows, columns in (
        ("gate_up_proj", ("gate_proj", "up_proj"), 48, 64),
        ("down_proj", ("down_proj",), 64, 48),
    ):
        shape = (2, len(parts), rows, columns)
        codes = finite_codes(rng, shape, "F8_E4M3")
        scales = rng.uniform(0.5, 2.0, (*shape[:2], rows // 16, columns // 16)).astype(np.float32)
        values[name] = np.zeros(shape, np.float32)
        for end, array in (("", codes), ("_scale_inv", scales)):
            if fused:
                entries[f"{parent}.{name}{end}"] = _entry(array.reshape(2, -1, array.shape[-1]))
                continue
            for expert in range(2):
                for place, part in enumerate(parts):
                    entries[f"{parent}.{expert}.{part}.weight{end}"] = _entry(array[expert, place])
    declared = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [16, 16],
    }
    write_entries(path, entries, {"quantization_config": declared})
    return values


def quantised(name: str, folder: Path) -> None:
    """Merge models in different formats, and say how it went."""
    method, formats, MEMORY[0] = QUANTISED[name]
    paths = [folder / name / str(number) for number in range(max(2, len(formats)))]
    values: dict[str, Any] = {}
    for number, path in enumerate(paths):
        if name == "stacked FP8":
            values = write_experts(path, number, fused=not number)
        elif formats:
            rows = 96 if MEMORY[0] == 1 << 24 else 384
            shape = {} if formats[0] == "gpt-oss" else {"rows": rows, "columns": 64}
            values = write(path, formats[number], number, **shape)
        else:
            rng = np.random.default_rng(number)
            values = {"w": np.zeros((70, 64), np.float32)}
            codes = finite_codes(rng, (70, 64), "F8_E4M3")
            write_entries(path, {"w": bytes_of(codes, "F8_E4M3")}, {})
    config = config_for(method, paths, parameters=PARAMETERS.get(method, {}), seed=3)
    same = both(config, folder / name / "out")
    sent = sum(call[2] for call in DRIVERS[-1].calls if call[0] == "copy_in")
    wanted = len(paths) * sum(4 * value.size for value in values.values() if value.ndim > 1)
    print(f"{name} {'equal' if same else 'DIFFERENT'}: {sent / wanted:.2f} of the bytes", flush=True)


def main() -> None:
    """Merge by every method asked for."""
    on_device.DEVICE_BYTES, bringing._SLOTS_OF_CODES, arena.LEAST = 1 << 10, 1, 1 << 17
    BACKENDS["fused"] = replace(
        gpu.FUSED, open_lane=lane, find=lambda number: f"cuda:{number}", lacks=lambda: None
    )
    with tempfile.TemporaryDirectory() as folder:
        paths = write_models(Path(folder), 2, shapes=SHAPES, spread=1e-3)
        for method in sys.argv[1:] or [*PARAMETERS, *QUANTISED]:
            if method in QUANTISED:
                quantised(method, Path(folder))
                continue
            config = config_for(method, paths, parameters=PARAMETERS[method], seed=3)
            same = both(config, Path(folder) / method)
            print(method, "equal" if same else "DIFFERENT", flush=True)


if __name__ == "__main__":
    main()
