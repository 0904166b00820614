"""Write README.md's table of what 7B, 70B and 405B models take: from `plan`, on models that are headers only.

    python tools/measure/plan_table.py            # rewrites what stands between the markers in README.md
    python tools/measure/plan_table.py --print    # prints it

Nothing is merged, and the headers take 50 MB of disk. Times are bytes over the rate of a disk, no more: see the table's foot.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
BEGIN, END = "<!-- written by tools/measure/plan_table.py -->", "<!-- end -->"
MEMORY = "4GiB"
RATES = (("500 MiB/s", 500 << 20), ("2 GiB/s", 2 << 30))
SIZES = {"7B": "7b", "70B": "70b", "405B": "405b"}
"""How the table calls a preset of tools/make/make_models.py."""
METHODS: dict[str, dict[str, Any]] = {
    "`linear`, 2 models": {"merge_method": "linear", "models": ["tuned1", "tuned2"]},
    "`ties`, 2 models, base": {
        "merge_method": "ties",
        "base_model": "base",
        "models": ["tuned1", "tuned2"],
        "parameters": {"density": 0.2},
    },
}


def size_text(nbytes: float) -> str:
    """Return bytes in the unit that suits."""
    if nbytes >= 1000 * 2**30:
        return f"{nbytes / 2**40:.1f} TiB"
    return f"{nbytes / 2**20:.0f} MiB" if nbytes < 2**30 else f"{nbytes / 2**30:.3g} GiB"


def time_text(seconds: float) -> str:
    """Return seconds as people say them."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


def planned(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Return what `plan --json` says."""
    command = [sys.executable, "-m", "streammerge", "plan", "-", "--json", "--memory", MEMORY]
    text = json.dumps({**config, "dtype": "bfloat16"})
    done = subprocess.run(command, cwd=folder, input=text, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def rows(sizes: Iterable[str]) -> list[str]:
    """Return the rows of the table for these sizes."""
    lines = []
    for size in sizes:
        with tempfile.TemporaryDirectory() as folder:
            make = [sys.executable, ROOT / "tools" / "make" / "make_models.py", folder, "--models", "2"]
            subprocess.run([*make, "--preset", SIZES[size], "--sparse"], check=True, capture_output=True)
            for name, config in METHODS.items():
                plan = planned(Path(folder), config)
                moved = plan["bytes_to_read"] + plan["bytes_to_write"]
                cells = [
                    size,
                    name,
                    size_text(plan["bytes_to_read"]),
                    size_text(plan["disk"]["bytes_needed"]),
                    size_text(plan["memory_least"]),
                    size_text(plan["memory_read_once"]),
                    *(time_text(moved / rate) for _, rate in RATES),
                ]
                lines.append(f"| {' | '.join(cells)} |")
    return lines


def table(sizes: Iterable[str] = tuple(SIZES)) -> str:
    """Return the whole table."""
    titles = [
        "models",
        "merge",
        f"read at {MEMORY.replace('GiB', ' GiB')}",
        "written",
        "least memory",
        "each byte read once from",
        *(f"time at {name}" for name, _ in RATES),
    ]
    head = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    return "\n".join([*head, *rows(sizes)])


def main() -> None:
    """Print the table, or write it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--print", action="store_true", dest="only_print")
    args = parser.parse_args()
    made = table()
    if args.only_print:
        print(made)
        return
    readme = ROOT / "README.md"
    pattern = re.compile(f"({re.escape(BEGIN)}\n).*?(\n{re.escape(END)})", re.DOTALL)
    readme.write_text(pattern.sub(lambda found: found[1] + made + found[2], readme.read_text()))


if __name__ == "__main__":
    main()
