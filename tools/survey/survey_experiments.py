"""The survey's seven experiments: each merges through streammerge, scores, and returns plain numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from survey_models import Bench, accuracy

Result = dict[str, Any]
Vector = NDArray[np.float32]

TOP = 0.2  # The influential fraction of a task vector's entries.
SEEDS = (0, 1, 2)
DENSITIES = {
    "demo": (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0),
    "minilm": (0.01, 0.05, 0.1, 0.2, 0.5, 1.0),
}
SCALED: dict[str, tuple[str, dict[str, Any]]] = {
    "task arithmetic": ("task_arithmetic", {}),
    "TIES, density 0.2": ("ties", {"density": TOP}),
    "TIES, density 0.5": ("ties", {"density": 0.5}),
}
LAMBDAS = {
    "demo": {
        "task arithmetic": tuple(i / 10 for i in range(1, 11)),
        "TIES, density 0.2": tuple(i / 5 for i in range(1, 11)),
        "TIES, density 0.5": tuple(i / 5 for i in range(1, 11)),
    },
    "minilm": {
        "task arithmetic": (0.2, 0.4, 0.6, 0.8, 1.0),
        "TIES, density 0.2": (0.6, 1.0, 1.4, 1.8, 2.2),
        "TIES, density 0.5": (1.0, 1.4, 1.8),
    },
}
DROPS_ALONE = {
    "demo": (0.0, 0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99),
    "minilm": (0.0, 0.5, 0.8, 0.9, 0.99),
}
DROPS_BEFORE = {"demo": (0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95), "minilm": (0.5, 0.9)}
TUNED_AGAIN = ("demo",)  # Thirty merges a point: for small models.
TUNED_LAMBDAS = tuple(i / 10 for i in range(1, 11))
ALONE_SEEDS = {"demo": SEEDS, "minilm": SEEDS[:1]}

LATER = {
    "task arithmetic": "task_arithmetic",
    "consensus": "consensus",
    "EMR": "emr",
    "PCB": "pcb",
    "Iso-C": "iso_c",
    "Iso-CTS": "iso_cts",
    "TSV-M": "tsv_m",
    "WUDI": "wudi",
    "KnOTS": "knots",
    "sum, then SVC": "svc",
    "sum, then Subspace Boosting": "subspace_boosting",
}
"""Task arithmetic, and what was published after the survey: votes and methods of whole matrices."""
LATER_LAMBDAS = {"demo": tuple(i / 10 for i in range(1, 21)), "minilm": (0.2, 0.4, 0.6, 0.8, 1.0, 1.4)}

TRIMMED = {"drop_rate": 1 - TOP, "drop_mask": "magnitude", "drop_rescale": "none"}
JOINS: dict[str, Callable[[int], tuple[str, dict[str, Any]]]] = {
    "mean of all": lambda n: ("linear", {}),
    "mean of trimmed": lambda n: ("linear", TRIMMED),
    "mean of trimmed, elected": lambda n: (
        "ties",
        {"density": TOP, "normalize": False, "lambda": 1 / n},
    ),
    "sum of all": lambda n: ("task_arithmetic", {"lambda": 1.0}),
    "sum of trimmed": lambda n: ("task_arithmetic", {"lambda": 1.0} | TRIMMED),
    "sum of trimmed, elected": lambda n: ("ties", {"density": TOP, "normalize": False, "lambda": 1.0}),
    "TIES": lambda n: ("ties", {"density": TOP, "lambda": 1.0}),
}
"""How several task vectors become one; each of the first six differs from the next by one step."""

FISHERS: dict[str, dict[str, Any]] = {
    "default": {},
    "no floor, average where all are 0": {"floor": 0.0, "fallback": "average"},
    "no floor, average where all are 0, unnormalised": {
        "floor": 0.0,
        "fallback": "average",
        "normalize": False,
    },
    "floor of 0.1 rms on all": {"floor": 0.1, "floor_on": "all"},
    "floor of 1 rms on all": {"floor": 1.0, "floor_on": "all"},
}


def references(bench: Bench) -> Result:
    """Score the base and the fine-tunes on every task; how large each task vector is beside the base."""
    scores = {name: bench.score_model(name) for name in ("base", *bench.part.tasks)}
    base = np.linalg.norm(_parameters(bench.part.model("base")))
    return {
        "accuracy": {
            name: {task: accuracy({task: row[task]}) for task in row} for name, row in scores.items()
        },
        "size": {
            task: float(np.linalg.norm(_task_vector(bench, bench.part.model(task))) / base)
            for task in bench.part.tasks
        },
    }


def trim(bench: Bench) -> Result:
    """Claim 1: accuracy of each fine-tune of which the top `density` of its task vector is kept."""
    tasks = bench.part.tasks
    result: Result = {"base": {t: accuracy(bench.score_model("base", [t])) for t in tasks}}
    result["densities"] = DENSITIES[bench.part.name]
    result["accuracy"] = {
        task: [accuracy(bench.score("ties", [task], density=d)) for d in result["densities"]]
        for task in tasks
    }
    return result


def interference(bench: Bench) -> Result:
    """Claim 2: what joining n task vectors does to values and to accuracy, mean over all sets of n tasks."""
    tasks = bench.part.tasks
    whole = {task: _task_vector(bench, bench.part.model(task)) for task in tasks}
    top = {
        task: _task_vector(bench, bench.merged("ties", [task], density=TOP)) for task in tasks
    }  # A merge of one model is the model trimmed.
    rows = []
    for n in range(1, len(tasks) + 1):
        sets = list(combinations(tasks, n))
        values = [_conflicts([top[t] for t in chosen]) for chosen in sets]
        values = [v | _shrinkage(bench, chosen, whole, top) for v, chosen in zip(values, sets, strict=True)]
        row = {name: sum(v[name] for v in values) / len(values) for name in values[0]}
        rows.append({"n": n, "sets": len(sets), "values": row, "accuracy": _join_all(bench, sets)})
    return {"rows": rows}


def _join_all(bench: Bench, sets: list[tuple[str, ...]]) -> dict[str, float]:
    """Accuracy on their own tasks of sets that are joined in each way, mean over the sets."""
    found = {}
    for name, way in JOINS.items():
        method, parameters = way(len(sets[0]))
        if len(sets[0]) == 1:  # One model: its mean is its sum, and nothing is elected.
            method, parameters = "ties", {"density": 1.0 if name.endswith("all") else TOP}
        found[name] = sum(accuracy(bench.score(method, chosen, **parameters)) for chosen in sets) / len(sets)
    return found


def _conflicts(top: list[Vector]) -> dict[str, float]:
    """Share of the entries that are influential in one model (or in two) whose signs conflict."""
    positive, negative = (sum((sign * v > 0).astype(np.int8) for v in top) for sign in (1, -1))
    conflict, known = (positive > 0) & (negative > 0), positive + negative
    return {
        "conflict_any": float(conflict.sum() / (known > 0).sum()),
        "conflict_shared": float(conflict.sum() / max(1, (known > 1).sum())),
    }


def _shrinkage(
    bench: Bench, chosen: tuple[str, ...], whole: Mapping[str, Vector], top: Mapping[str, Vector]
) -> dict[str, float]:
    """Share of influential values of which a merge keeps less than 3/4 of the size, and the median kept."""
    found = {}
    for name in ("mean of all", "mean of trimmed", "TIES"):
        method, parameters = JOINS[name](len(chosen))
        joined = np.abs(_task_vector(bench, bench.merged(method, chosen, **parameters)))
        kept = np.concatenate([joined[top[t] != 0] / np.abs(whole[t][top[t] != 0]) for t in chosen])
        found[f"shrunk, {name}"] = float((kept < 0.75).mean())
        found[f"kept, {name}"] = float(np.median(kept))
    return found


def _task_vector(bench: Bench, directory: Path) -> Vector:
    """Return a model minus the base; only to count, never to merge."""
    return _parameters(directory) - _parameters(bench.part.model("base"))


def _parameters(directory: Path) -> Vector:
    """All float entries of a model as one vector."""
    tensors = {}
    for path in sorted(directory.glob("model*.safetensors")):
        tensors |= load_file(path)
    return torch.cat([t.flatten() for _, t in sorted(tensors.items()) if t.is_floating_point()]).numpy()


def fisher(bench: Bench) -> Result:
    """Claim 3: Fisher merging against the isotropic average, on the report half; the variant by the other."""
    scores = {"average": bench.score("linear")}
    scores |= {name: bench.score("fisher", **parameters) for name, parameters in FISHERS.items()}
    best = max(FISHERS, key=lambda name: accuracy(scores[name], "tune"))
    return {"best": best, "rows": {name: _halves(row) for name, row in scores.items()}}


def scaled(bench: Bench) -> Result:
    """Claim 4: averaging, task arithmetic and TIES; lambda chosen on the tuning half."""
    result: Result = {"average": _halves(bench.score("linear")), "methods": {}}
    for label, (method, extra) in SCALED.items():
        lambdas = LAMBDAS[bench.part.name][label]
        rows = [_halves(bench.score(method, lambda_=value, **extra)) for value in lambdas]
        best = max(range(len(rows)), key=lambda i: rows[i]["tune"])
        result["methods"][label] = {"lambdas": lambdas, "rows": rows, "best": best}
    return result


def later(bench: Bench) -> Result:
    """Claim 7: later methods against task arithmetic; lambda chosen on the tuning half."""
    result: Result = {"methods": {}}
    for label, method in LATER.items():
        lambdas = LATER_LAMBDAS[bench.part.name]
        rows = [_halves(bench.score(method, lambda_=value)) for value in lambdas]
        best = max(range(len(rows)), key=lambda i: rows[i]["tune"])
        result["methods"][label] = {"lambdas": lambdas, "rows": rows, "best": best}
    return result


def settings(scaled: Result) -> dict[str, tuple[str, dict[str, Any]]]:
    """Task arithmetic and the better TIES with the lambda that was best on the tuning half."""
    rows = scaled["methods"]
    tuned = {label: row["rows"][row["best"]]["tune"] for label, row in rows.items()}
    ties = max((label for label in tuned if label.startswith("TIES")), key=lambda label: tuned[label])
    found = {}
    for name, label in (("task arithmetic", "task arithmetic"), ("TIES", ties)):
        method, extra = SCALED[label]
        found[name] = method, extra | {"lambda": rows[label]["lambdas"][rows[label]["best"]]}
    return found


def drop_alone(bench: Bench) -> Result:
    """Claim 5: accuracy of each fine-tune of which a random part of the task vector is dropped."""
    rates, seeds = DROPS_ALONE[bench.part.name], ALONE_SEEDS[bench.part.name]
    result: Result = {"rates": rates, "n_seeds": len(seeds)}
    result["base"] = {t: accuracy(bench.score_model("base", [t])) for t in bench.part.tasks}
    for rescale in ("paper", "none"):
        result[rescale] = {
            task: [_spread(_dropped(bench, task, rate, rescale, seed) for seed in seeds) for rate in rates]
            for task in bench.part.tasks
        }
    return result


def _dropped(bench: Bench, task: str, rate: float, rescale: str, seed: int) -> float:
    if rate == 0:
        return accuracy(bench.score_model(task, [task]))
    density = round(1 - rate, 6)
    scores = bench.score("dare_linear", [task], seed=seed, density=density, rescale=rescale, lambda_=1.0)
    return accuracy(scores)


def drop_before(bench: Bench, variant: str, scaled: Result) -> Result:
    """Claim 6: DARE before each method, on the report half, mean and spread over the seeds."""
    tuned = settings(scaled)
    ways: dict[str, tuple[str, dict[str, Any]]] = {
        "averaging": ("linear", {}),
        "task arithmetic": tuned["task arithmetic"],
        "Fisher": ("fisher", FISHERS[variant]),
        "TIES": tuned["TIES"],
    }
    rates = (0.0, *DROPS_BEFORE[bench.part.name])
    result: Result = {"rates": rates, "settings": ways, "methods": {}, "lambdas": {}}
    for name, (method, parameters) in ways.items():
        points = [_drop_point(bench, method, rate, parameters) for rate in rates]
        result["methods"][name] = points
        if bench.part.name in TUNED_AGAIN and "lambda" in parameters:
            again = [_tune_again(bench, method, rate, parameters) for rate in rates]
            result["methods"][f"{name}, λ anew"] = [point for _, point in again]
            result["lambdas"][f"{name}, λ anew"] = [value for value, _ in again]
    return result


def _drop_point(bench: Bench, method: str, rate: float, parameters: Mapping[str, Any]) -> dict[str, Any]:
    if rate == 0:
        runs = [bench.score(method, **parameters)]
    else:
        runs = [bench.score(method, seed=seed, drop_rate=rate, **parameters) for seed in SEEDS]
    tune = [accuracy(run, "tune") for run in runs]
    return {"tune": sum(tune) / len(tune), "report": _spread(accuracy(run, "report") for run in runs)}


def _tune_again(
    bench: Bench, method: str, rate: float, parameters: Mapping[str, Any]
) -> tuple[float, dict[str, Any]]:
    """Choose lambda for this rate, on the tuning half."""
    points = [(x, _drop_point(bench, method, rate, {**parameters, "lambda": x})) for x in TUNED_LAMBDAS]
    return max(points, key=lambda pair: pair[1]["tune"])


def _halves(scores: Any) -> dict[str, Any]:
    each = {task: accuracy({task: row}, "report") for task, row in scores.items()}
    return {"tune": accuracy(scores, "tune"), "report": accuracy(scores, "report"), "tasks": each}


def _spread(values: Any) -> list[float]:
    """Mean, least and greatest."""
    all_values = list(values)
    return [sum(all_values) / len(all_values), min(all_values), max(all_values)]
