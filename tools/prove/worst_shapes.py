"""Merge the shapes that are hardest on memory, and compare each peak with `--memory`.

    python tools/prove/worst_shapes.py WORKDIR                                  # all of it, some ten minutes
    python tools/prove/worst_shapes.py WORKDIR --only tiny,models --memory 320MiB,1GiB

The models are made in WORKDIR once and kept (10 GB). Each merge runs in a process of its own; the peak is the
operating system's account of it and of its children. One that is refused is run again with the memory that its
message asks for. Prints a table; fails where a peak exceeds the budget, where a merge fails otherwise, or where what
a message asks for is not enough.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from worst_models import FAMILIES, config, make_family, make_stores

from streammerge.units import parse_size

sys.path.append(str(Path(__file__).resolve().parents[1] / "measure"))

from bench_measure import Usage, measure

MIB = 1 << 20
STREAMMERGE = [sys.executable, "-m", "streammerge.cli"]
ASKS = re.compile(r"give at least (\d+ \w+)")


@dataclass(frozen=True)
class Case:
    """A merge of one family of models."""

    family: str
    method: str
    parameters: dict[str, object] = field(default_factory=dict)
    n_models: int | None = None
    """The first so many models of the family; None: all."""
    fisher: bool = False


CASES = (
    Case("row", "linear"),
    Case("row", "ties", {"density": 0.2}),
    Case("row", "della", {"density": 0.5, "epsilon": 0.1}),
    Case("row", "nuslerp", {"nuslerp_flatten": False}, n_models=2),
    Case("row", "nuslerp", {"nuslerp_flatten": False, "nuslerp_row_wise": True}, n_models=2),
    Case("row", "sce", {"select_topk": 0.5}),
    Case("vector", "linear"),
    Case("vector", "breadcrumbs", {"density": 0.5}),
    Case("vector", "dare_ties", {"density": 0.5, "rescale": "l1"}),
    Case("vector", "ties", {"density": 0.2, "trim_scope": "model"}),
    Case("vector", "della", {"density": 0.5, "epsilon": 0.1}),
    Case("vector", "slerp", {"t": 0.5}, n_models=1),
    Case("vector", "karcher"),
    Case("models", "linear"),
    Case("models", "ties", {"density": 0.2}),
    Case("models", "breadcrumbs", {"density": 0.5}),
    Case("models", "ties", {"density": 0.2, "trim_scope": "model"}),
    Case("models", "karcher"),
    Case("models", "sce", {"select_topk": 0.5}),
    Case("tiny", "linear"),
    Case("tiny", "ties", {"density": 0.2}),
    Case("tiny64", "linear"),
    Case("tiny64", "karcher"),
    Case("fisher", "fisher", fisher=True),
)


@dataclass(frozen=True)
class Outcome:
    """The outcome of a merge under a budget."""

    case: Case
    memory: str
    usage: Usage
    said: str
    asked: str = ""
    """The memory with which it was refused before, or empty."""

    @property
    def problem(self) -> str:
        """Return the fault; empty if there is none."""
        if self.refused:
            return "refused with what a refusal asked for" if self.asked else ""
        if self.usage.exit_code:
            return f"failed: {self.said[-200:]}"
        return "above the budget" if self.usage.peak_nbytes > parse_size(self.memory) else ""

    @property
    def refused(self) -> str:
        """The memory that a refusal asks for; empty if it is none."""
        found = ASKS.search(self.said)
        return found[1] if self.usage.exit_code == 2 and found else ""


def run(case: Case, memory: str, workdir: Path, asked: str = "") -> Outcome:
    """Merge once in a process of its own."""
    paths = make_family(workdir / case.family, FAMILIES[case.family])
    paths = paths[: None if case.n_models is None else 1 + case.n_models]
    fishers = make_stores(paths[1:]) if case.fisher else []
    place = workdir / "merge"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    (place / "config.yml").write_text(config(case.method, paths, case.parameters, fishers))
    command = [*STREAMMERGE, "merge", place / "config.yml", place / "out", "--memory", memory]
    usage, said = measure([*command, "--quiet", "--device", "cpu"], {})
    shutil.rmtree(place)
    return Outcome(case, memory, usage, said, asked)


def outcomes(case: Case, memory: str, workdir: Path) -> Iterator[Outcome]:
    """Merge; where that is refused, once more with the memory asked for."""
    first = run(case, memory, workdir)
    yield first
    if first.refused:
        yield run(case, first.refused.replace(" ", ""), workdir, asked=memory)


def line(outcome: Outcome) -> str:
    """Return a row of the table."""
    case = outcome.case
    parameters = ", ".join(f"{key}: {value}" for key, value in case.parameters.items())
    what = f"{case.method}{f' ({parameters})' if parameters else ''}"
    peak = f"{outcome.usage.peak_nbytes / MIB:.0f} MiB"
    result = f"refused: give at least {outcome.refused}" if outcome.refused else f"peak {peak}"
    wall = f"{outcome.usage.wall_s:.0f} s"
    return f"| {case.family} | {what} | {outcome.memory} | {result} | {wall} | {outcome.problem or 'holds'} |"


def compile_kernels() -> None:
    """Have the kernels compiled, which a first merge does in a child that takes more than the least of budgets."""
    code = "from streammerge.backends.cpu.compile import ensure_compiled; ensure_compiled()"
    subprocess.run([sys.executable, "-c", code], check=True)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("workdir", type=Path)
    parser.add_argument("--only", default=",".join(FAMILIES), help=f"of {', '.join(FAMILIES)}")
    parser.add_argument("--memory", default="320MiB,1GiB")
    args = parser.parse_args()
    compile_kernels()
    problems = 0
    print("| models | method | `--memory` | result | wall | |\n|---|---|---|---|---|---|", flush=True)
    for case in (case for case in CASES if case.family in args.only.split(",")):
        for memory in args.memory.split(","):
            for outcome in outcomes(case, memory, args.workdir):
                print(line(outcome), flush=True)
                problems += bool(outcome.problem)
    sys.exit(f"{problems} merges do not hold" if problems else 0)


if __name__ == "__main__":
    main()
