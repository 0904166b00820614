"""
Measure the CPU seconds that each method takes for a GB of its inputs: the figures `cost=` of the built-in methods.

    python tools/measure/method_costs.py --work /tmp/costs [METHOD ...]

Each method merges a base and three models of one tensor of bf16 twice, small and large, from the page cache; the slope of
the CPU seconds of the process (user and system) is the cost, so that what a process does once does not count. The lesser
of two runs counts, for CPU seconds grow too where a machine is busy.
"""

from __future__ import annotations

import argparse
import shutil
import time
from pathlib import Path

from streammerge.api import merge, plan
from streammerge.methods.catalog import load_builtin
from streammerge.methods.registry import Method, all_methods
from streammerge.testing.models import config_for, write_models

ROWS = {False: (512, 2560), True: (128, 512)}
"""Rows of the small and the large tensor; of matrices that are decomposed fewer."""
COLUMNS = {False: 4096, True: 512}
TYPICAL = {"density": 0.5, "gamma": 0.1, "t": 0.4, "weight": 0.5}
"""Parameters that methods are used with, where they have them: without, half of them would do nothing."""


def seconds(method: Method, paths: list[Path], out: Path) -> tuple[float, int]:
    """Return the CPU seconds of a merge, the lesser of two, and the bytes it reads in one pass."""
    best = float("inf")
    parameters = {name: value for name, value in TYPICAL.items() if name in method.parameters}
    config = config_for(method.name, paths, parameters=parameters)
    nbytes = sum(index.nbytes for index in plan(config, device="cpu", memory="4GiB").inputs)
    for _ in range(2):
        shutil.rmtree(out, ignore_errors=True)
        began = time.process_time()
        merge(config, out, device="cpu", memory="4GiB", kernels=True, io="read", progress=False)
        best = min(best, time.process_time() - began)
    return best, nbytes


def main() -> None:
    """Print the cost of every method asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("methods", nargs="*")
    options = parser.parse_args()
    load_builtin()
    for name, method in all_methods().items():
        if options.methods and name not in options.methods:
            continue
        found = []
        for rows in ROWS[method.matrices or method.gram]:
            shape = (rows, COLUMNS[method.matrices or method.gram])
            place = options.work / f"{shape[0]}x{shape[1]}"
            paths = [place / one for one in ("base", "m1", "m2", "m3")]
            if not paths[-1].exists():
                paths = write_models(place, shapes={"model.layers.0.mlp.down_proj.weight": shape})
            found.append(seconds(method, paths, options.work / "out"))
        (small, few), (large, many) = found
        print(
            f"{name:20} {(large - small) / (many - few) * 1e9:8.2f} CPU s a GB of {many / 1e6:.0f} MB",
            flush=True,
        )


if __name__ == "__main__":
    main()
