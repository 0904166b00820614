"""CPU and wall seconds from a fresh install, with nothing compiled, to the result of a small merge, for each method.

::

    python tools/measure/first_minute.py [--methods linear,ties] [--demo]

Each merge is a process of its own with an empty cache, three tiny fine-tunes and a base of 1 MB (`--mb` for others). CPU seconds
are those of the process and of all it started. With --demo the demo is timed too.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))


def timed(arguments: list[str], cache: Path) -> tuple[float, float]:
    """Run `streammerge` with a cache; return CPU and wall seconds."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache), "PYTHONPATH": str(ROOT)}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.monotonic()
    subprocess.run(
        [sys.executable, "-m", "streammerge", *arguments],
        check=True,
        env=environment,
        stdout=subprocess.DEVNULL,
    )
    wall = time.monotonic() - began
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, wall


def main() -> None:
    """Print a table."""
    from streammerge.methods.registry import all_methods
    from tests.conftest import config_for, write_models

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", help="comma-separated; default: all that ship")
    parser.add_argument("--mb", type=int, default=1, help="MB of each model")
    parser.add_argument("--demo", action="store_true")
    given = parser.parse_args()
    names = given.methods.split(",") if given.methods else list(all_methods())
    required = {"slerp": {"t": 0.5}, "nearswap": {"t": 0.01}}
    print(f"| {'merge':18} | cold, CPU s | wall s | again, CPU s | wall s |\n| --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        paths = write_models(place, shapes={f"layers.{i}.weight": (512, 1024) for i in range(given.mb)})
        for name in names:
            config = place / f"{name}.yml"
            config.write_text(yaml.safe_dump(config_for(name, paths, parameters=required.get(name, {}))))
            figures = []
            for run in range(2):
                out = str(place / f"{name}{run}")
                figures += timed(["merge", str(config), out, "--quiet"], place / f"cache-{name}")
            print(f"| {name:18} | " + " | ".join(f"{figure:.1f}" for figure in figures) + " |", flush=True)
        if given.demo:
            figures = [x for _ in range(2) for x in timed(["demo"], place / "cache-demo")]
            print(f"| {'demo':18} | " + " | ".join(f"{figure:.1f}" for figure in figures) + " |")


if __name__ == "__main__":
    main()
