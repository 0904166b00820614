"""The survey's figures: one per claim and set of models, 800 pixels wide."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator
from PIL import Image

Result = Mapping[str, Any]
ACCURACY = "accuracy on test examples"


def draw(part: str, results: Mapping[str, Result], directory: Path) -> None:
    """Write `PART-CLAIM.png` for every claim."""
    for claim, (width, function) in FIGURES.items():
        if claim not in results:
            continue
        figure, axes = plt.subplots(1, width, figsize=(8, 3.9), dpi=100, squeeze=False)
        function(list(axes[0]), results[claim])
        figure.tight_layout()
        _save(figure, directory / figure_name(part, claim))
        plt.close(figure)


def figure_name(part: str, claim: str) -> str:
    """File name of a claim's figure."""
    return f"{part}-{claim.replace('_', '-')}.png"


def _save(figure: Figure, path: Path) -> None:
    """Write 128 colours: a third of the size."""
    content = io.BytesIO()
    figure.savefig(content)
    Image.open(content).convert("RGB").quantize(128, dither=Image.Dither.NONE).save(path, optimize=True)


def _trim(axes: list[Axes], result: Result) -> None:
    for i, (task, row) in enumerate(result["accuracy"].items()):
        axes[0].plot(result["densities"], row, "o-", ms=4, color=f"C{i}", label=task)
        axes[0].axhline(result["base"][task], color=f"C{i}", lw=1, ls=":", label=f"base on {task}")
    axes[0].axvline(0.2, color="0.6", lw=1, ls="--")
    axes[0].set_xscale("log")
    _ticks(axes[0], result["densities"], [f"{d:g}" for d in result["densities"]])
    _label(axes[0], "fraction of the task vector kept, largest magnitudes first (log scale)", ACCURACY)


def _interference(axes: list[Axes], result: Result) -> None:
    n = [row["n"] for row in result["rows"]]
    shares = {
        "conflict_any": "signs conflict, of all influential entries",
        "conflict_shared": "signs conflict, of those shared by 2 or more",
        "shrunk, mean of all": "shrunk by the mean of all",
        "shrunk, mean of trimmed": "shrunk by the mean of trimmed",
        "shrunk, TIES": "shrunk by TIES",
    }
    for i, (name, label) in enumerate(shares.items()):
        line = "s--" if name.startswith("conflict") else "o-"
        axes[0].plot(
            n, [row["values"][name] for row in result["rows"]], line, ms=4, color=f"C{i}", label=label
        )
    _label(axes[0], "models merged", "share of influential values", legend=False)
    axes[0].set_ylim(-0.02, 1.45)
    axes[0].set_yticks([0, 0.25, 0.5, 0.75, 1])
    axes[0].legend(fontsize=7, loc="upper left")
    for i, name in enumerate(result["rows"][0]["accuracy"]):
        y = [row["accuracy"][name] for row in result["rows"]]
        line = "--" if name.startswith("mean") else "-"
        axes[1].plot(n, y, "o" + line, ms=4, color=f"C{i}", label=name)
    _label(axes[1], "models merged", "accuracy on the merged tasks", legend=False)
    low, high = axes[1].get_ylim()
    axes[1].set_ylim(low, high + 0.3 * (high - low))
    axes[1].set_yticks([tick for tick in axes[1].get_yticks() if low <= tick <= 1])
    axes[1].legend(fontsize=6.5, loc="upper right", ncols=2, columnspacing=0.8)
    for ax in axes:
        ax.set_xticks(n)


def _fisher(axes: list[Axes], result: Result) -> None:
    shown = list(dict.fromkeys(["average", "default", result["best"]]))
    tasks = list(result["rows"]["average"]["tasks"])
    names = {"average": "isotropic average", "default": "Fisher, default"}
    for i, name in enumerate(shown):
        row = result["rows"][name]
        heights = [*row["tasks"].values(), row["report"]]
        places = [x + (i - (len(shown) - 1) / 2) * 0.27 for x in range(len(heights))]
        bars = axes[0].bar(places, heights, 0.25, label=names.get(name, f"Fisher, {name}"))
        axes[0].bar_label(bars, [f"{100 * h:.1f}" for h in heights], fontsize=7)
    axes[0].set_xticks(range(len(tasks) + 1), [*tasks, "mean"])
    axes[0].set_ylim(0, 1.3)
    axes[0].set_yticks([0, 0.25, 0.5, 0.75, 1])
    _label(axes[0], "task", "accuracy on the report half", legend=False)
    axes[0].legend(fontsize=8, loc="upper left", ncols=2)


def _scaled(axes: list[Axes], result: Result) -> None:
    axes[0].axhline(result["average"]["report"], color="0.4", ls="--", label="averaging")
    for i, (name, row) in enumerate(result["methods"].items()):
        for half, style in (("report", "o-"), ("tune", ":")):
            y = [point[half] for point in row["rows"]]
            label = name if half == "report" else f"{name}, tuning half"
            axes[0].plot(row["lambdas"], y, style, ms=4, color=f"C{i}", label=label)
        best = row["best"]
        axes[0].plot(row["lambdas"][best], row["rows"][best]["report"], "*", ms=13, color=f"C{i}")
    _label(axes[0], "lambda (star: best on the tuning half)", "mean accuracy, report half")


def _later(axes: list[Axes], result: Result) -> None:
    for i, (name, row) in enumerate(result["methods"].items()):
        y = [point["report"] for point in row["rows"]]
        line = "-" if i < 10 else "--"
        axes[0].plot(row["lambdas"], y, line, lw=2.5 if i == 0 else 1.2, color=f"C{i % 10}", label=name)
        best = row["best"]
        axes[0].plot(row["lambdas"][best], row["rows"][best]["report"], "*", ms=11, color=f"C{i % 10}")
    _label(axes[0], "lambda (star: best on the tuning half)", "mean accuracy, report half")


def _drop_alone(axes: list[Axes], result: Result) -> None:
    for i, task in enumerate(result["paper"]):
        for rescale, style, text in (("paper", "o-", "rescaled"), ("none", "x--", "not rescaled")):
            points = result[rescale][task]
            _band(axes[0], result["rates"], points, style, f"C{i}", f"{task}, {text}")
    _drop_axis(axes[0], result["rates"])
    _label(axes[0], "drop rate (scale: logarithm of what is kept)", ACCURACY)


def _drop_before(axes: list[Axes], result: Result) -> None:
    names = [name for name in result["methods"] if not name.endswith("anew")]
    for name, points in result["methods"].items():
        color = f"C{next(i for i, first in enumerate(names) if name.startswith(first))}"
        band = [point["report"] for point in points]
        _band(axes[0], result["rates"], band, "o-" if name in names else "x--", color, f"DARE, then {name}")
        if name in names:
            axes[0].axhline(band[0][0], color=color, lw=1, ls=":", label=f"{name} alone")
    _drop_axis(axes[0], result["rates"])
    _label(axes[0], "drop rate (scale: logarithm of what is kept)", "mean accuracy, report half")


def _band(
    ax: Axes, rates: Sequence[float], points: Sequence[Sequence[float]], style: str, color: str, label: str
) -> None:
    """Draw the mean as a line, least to greatest as a band."""
    x = [1 - rate for rate in rates]
    ax.plot(x, [p[0] for p in points], style, ms=4, color=color, label=label)
    ax.fill_between(x, [p[1] for p in points], [p[2] for p in points], color=color, alpha=0.15, lw=0)


def _drop_axis(ax: Axes, rates: Sequence[float]) -> None:
    ax.set_xscale("log")
    ax.invert_xaxis()
    shown = [rate for rate in rates if rate not in (0.1,)]
    _ticks(ax, [1 - rate for rate in shown], [f"{rate:g}" for rate in shown])


def _ticks(ax: Axes, places: Sequence[float], labels: Sequence[str]) -> None:
    ax.xaxis.set_major_locator(FixedLocator(list(places)))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xticklabels(labels)


def _label(ax: Axes, x: str, y: str, legend: bool = True) -> None:
    ax.set_xlabel(x, fontsize=9)
    ax.set_ylabel(y, fontsize=9)
    ax.tick_params(labelsize=8)
    ax.yaxis.set_major_formatter(lambda y, _: f"{100 * y:.4g} %")
    ax.grid(alpha=0.3)
    if legend:
        ax.legend(fontsize=7.5, loc="upper left", bbox_to_anchor=(1.01, 1.02), frameon=False)


FIGURES: dict[str, tuple[int, Callable[[list[Axes], Result], None]]] = {
    "trim": (1, _trim),
    "interference": (2, _interference),
    "fisher": (1, _fisher),
    "scaled": (1, _scaled),
    "drop_alone": (1, _drop_alone),
    "drop_before": (1, _drop_before),
    "later": (1, _later),
}
"""Number of panels and the function that fills them, in the order of the claims."""
