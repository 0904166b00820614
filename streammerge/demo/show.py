"""The demo: merge the shipped fine-tunes with every method and print each one's accuracy on every task."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from streammerge.api import merge
from streammerge.demo import digits

# Round numbers, not tuned for these models: a user tunes lambda and density on held-out data.
SETTINGS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("linear", {}),
    ("task_arithmetic", {"lambda": 0.4}),
    ("fisher", {}),
    ("ties", {"density": 0.2, "lambda": 1.0}),
    ("dare_linear", {"density": 0.5, "lambda": 0.4}),
    ("dare_fisher", {"density": 0.5}),
    ("dare_ties", {"density": 0.5, "lambda": 0.5}),
)


def run_demo(out: Path | None) -> None:
    """Merge with each method into its own directory under `out`, and print the table."""
    began = time.monotonic()
    click.echo(
        f"{len(digits.TASKS)} fine-tunes of one small network, one per task; accuracy on test images, %\n"
    )
    click.echo(_row("model", {task: task for task in digits.TASKS}, "average"))
    _show("base", digits.load_model(digits.model_dir("base")))
    best = max(_show(f"tuned: {task}", digits.load_model(digits.model_dir(task))) for task in digits.TASKS)
    click.echo("")
    beaten = 0
    with _directory(out) as directory:
        for method, parameters in SETTINGS:
            target = directory / method
            merge(
                demo_config(method, parameters),
                target,
                overwrite=target.exists(),
                on_event=lambda event: None,  # the table has one line for each merge
            )
            average = _show(_label(method, parameters), digits.load_model(target))
            beaten += average > best
    click.echo(
        f"\n{beaten} of {len(SETTINGS)} merges beat every single fine-tune on the average; "
        f"{time.monotonic() - began:.1f} s" + (f"; the merged models are in {out}" if out else "")
    )


def demo_config(method: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config of one of the demo's merges."""
    models = [{"model": str(digits.model_dir(task))} for task in digits.TASKS]
    if method.endswith("fisher"):
        models = [
            m | {"fisher": str(digits.fisher_path(t))} for m, t in zip(models, digits.TASKS, strict=True)
        ]
    config: dict[str, Any] = {
        "merge_method": method,
        "models": models,
        "parameters": dict(parameters),
        "seed": 0,
    }
    if method not in ("linear", "fisher"):
        config["base_model"] = str(digits.model_dir("base"))
    return config


def _show(name: str, weights: Mapping[str, Any]) -> float:
    scores = {task: digits.accuracy(weights, task) for task in digits.TASKS}
    average = sum(scores.values()) / len(scores)
    click.echo(
        _row(name, {task: f"{100 * score:.1f}" for task, score in scores.items()}, f"{100 * average:.1f}")
    )
    return average


def _row(name: str, cells: Mapping[str, str], last: str) -> str:
    return f"{name:<38}" + "".join(f"{cell:>12}" for cell in cells.values()) + f"{last:>10}"


def _label(method: str, parameters: Mapping[str, Any]) -> str:
    inside = ", ".join(f"{name} {value:g}" for name, value in parameters.items())
    return f"{method} ({inside})" if inside else method


@contextlib.contextmanager
def _directory(out: Path | None) -> Iterator[Path]:
    if out is not None:
        yield out
        return
    with tempfile.TemporaryDirectory(prefix="streammerge-demo-") as name:
        yield Path(name)
