"""Tables, JSON and a plot of what tools/measure/bench.py measured."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from bench_measure import Case, Limit, Run, Usage

MIB, GB = 1 << 20, 10**9
COLD = ("cold", "as found")


@dataclass(frozen=True)
class Results:
    """The measurements, as they stand in the JSON file."""

    machine: dict[str, str]
    start_s: dict[str, float]
    """Seconds of a merge of tiny models, everything in the page cache, by program."""
    runs: list[Run]

    def save(self, path: Path) -> None:
        """Write the JSON file, whole or not at all."""
        partial = path.with_name(path.name + ".partial")
        partial.write_text(json.dumps(asdict(self), indent=1) + "\n")
        partial.replace(path)

    @classmethod
    def load(cls, path: Path) -> Results:
        """Read the JSON file."""
        data = json.loads(path.read_text())
        runs = []
        for run in data["runs"]:
            values = {
                "case": Case(**run["case"]),
                "limit": Limit(**run["limit"]),
                "usage": Usage(**run["usage"]),
            }
            runs.append(Run(**{**run, **values}))
        return cls(data["machine"], data["start_s"], runs)

    def good(self, case: Case, caches: Sequence[str]) -> list[Run]:
        """Return the runs of a case, in such a state of the page cache, that did not fail."""
        return [r for r in self.runs if r.case == case and r.cache in caches and not r.failure]

    def rows(self, caches: Sequence[str]) -> list[Row]:
        """Return streammerge's cases in the order measured, with mergekit's runs beside them."""
        rows = []
        for case in dict.fromkeys(r.case for r in self.runs if r.case.program == "streammerge"):
            theirs = self.good(replace(case, program="mergekit", memory="", device="cpu"), caches)
            before = self.good(replace(case, program="before"), caches)
            if runs := self.good(case, caches):
                rows.append(Row(case, runs, theirs, before))
        return rows


@dataclass(frozen=True)
class Row:
    """A line of a table: a case's good runs, at least one, and those of the same merge by others, if any."""

    case: Case
    runs: list[Run]
    theirs: list[Run]
    """mergekit's."""
    before: list[Run]
    """Those of the checkout that `--against` names."""


def wall(runs: Iterable[Run]) -> float:
    """Return the median wall time, in seconds."""
    return median(r.usage.wall_s for r in runs)


def limit(runs: Iterable[Run]) -> float:
    """Return the median limit, in seconds."""
    return median(r.limit.limit_s for r in runs)


def rate(run: Run) -> float:
    """Return the bytes merged and written in a second, in GB."""
    return (run.input_nbytes + run.model_nbytes) / run.usage.wall_s / GB


def cpu(runs: Iterable[Run]) -> float:
    """Return the median of the CPU seconds."""
    return median(r.usage.cpu_s for r in runs)


def cpu_per_gb(runs: Iterable[Run]) -> float:
    """Return the median of the CPU seconds for each GB of inputs; NaN in figures that do not tell the inputs."""
    return median(r.usage.cpu_s / r.input_nbytes * GB if r.input_nbytes else math.nan for r in runs)


def ratio(runs: Iterable[Run]) -> str:
    """Return the median of wall over limit, with its range where there is more than one."""
    ratios = [r.ratio for r in runs]
    spread = f" ({min(ratios):.2f}–{max(ratios):.2f})" if len(ratios) > 1 else ""
    return f"{median(ratios):.2f}{spread}"


def peak(runs: Iterable[Run]) -> float:
    """Return the highest peak, in MiB: a bound is kept by all runs or not at all."""
    return max(r.usage.peak_nbytes for r in runs) / MIB


def size(runs: Sequence[Run]) -> float:
    """Return the size of one model, in GB."""
    return runs[0].model_nbytes / GB


WAYS = {
    "direct": "direct reads of all that is merged beside direct writes of one model's size",
    "buffered": "reads of all that is merged beside writes of one model's size, through the page cache",
    "cat and dd": "`cat` of all that is merged beside a `dd conv=fdatasync` of one model's size",
}
OURS: list[tuple[str, Callable[[Row], str]]] = [
    ("method", lambda row: f"`{row.case.method}`"),
    ("model, GB", lambda row: f"{size(row.runs):.2f}"),
    (
        "`--memory`",
        lambda row: row.case.memory + ("" if row.case.device == "cpu" else f", {row.case.device}"),
    ),
    ("runs", lambda row: str(len(row.runs))),
    ("limit, s", lambda row: f"{limit(row.runs):.2f}"),
    ("wall, s", lambda row: f"{wall(row.runs):.2f}"),
    ("GB/s", lambda row: f"{median(rate(r) for r in row.runs):.2f}"),
    ("wall / limit", lambda row: ratio(row.runs)),
    ("CPU, s", lambda row: f"{cpu(row.runs):.1f}"),
    ("CPU s/GB", lambda row: f"{cpu_per_gb(row.runs):.2f}"),
    ("peak, MiB", lambda row: f"{peak(row.runs):.0f}"),
]
BEFORE: list[tuple[str, Callable[[Row], str]]] = [
    ("before: wall / limit", lambda row: ratio(row.before)),
    ("CPU s/GB", lambda row: f"{cpu_per_gb(row.before):.2f}"),
    ("peak, MiB", lambda row: f"{peak(row.before):.0f}"),
    ("CPU, now / before", lambda row: f"{cpu(row.runs) / cpu(row.before):.2f}"),
]
THEIRS: list[tuple[str, Callable[[Row], str]]] = [
    ("mergekit runs", lambda row: str(len(row.theirs))),
    ("wall, s", lambda row: f"{wall(row.theirs):.1f}"),
    ("wall / limit", lambda row: ratio(row.theirs)),
    ("peak, MiB", lambda row: f"{peak(row.theirs):.0f}"),
    ("factor", lambda row: f"{wall(row.theirs) / wall(row.runs):.1f}"),
]


def table(rows: Sequence[Row]) -> str:
    """Return a Markdown table; empty without rows. Columns about others are there where others ran."""
    groups = [
        (OURS, lambda row: True),
        (BEFORE, lambda row: bool(row.before)),
        (THEIRS, lambda row: bool(row.theirs)),
    ]
    shown = [(columns, has) for columns, has in groups if any(map(has, rows))]
    names = [name for columns, _ in shown for name, _ in columns]
    lines = [names, ["---"] * len(names)]
    for row in rows:
        lines.append([cell(row) if has(row) else "" for columns, has in shown for _, cell in columns])
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) if rows else ""


def header(results: Results) -> str:
    """Say on what the figures were measured, and how to read them."""
    data = dict(results.machine)
    cpu, cores, memory = data.pop("CPU"), data.pop("cores"), data.pop("memory")
    way = results.runs[0].limit.way if results.runs else "direct"
    gpu = f" {data.pop('GPU')}." if "GPU" in data else ""
    versions = ", ".join(f"{name} {text}" for name, text in data.items())
    lines = [
        f"{cpu}, {cores} cores, {memory} of memory; {versions}.{gpu}",
        "",
        f"A base and three fine-tunes, bf16, llama-shaped. Limit: {WAYS[way]}, measured right",
        "before each merge. Figures are medians, peaks (resident, of the largest process, mapped files included) the",
        "highest of all runs; CPU is user and system, for each GB of the inputs; GB/s counts the bytes merged and written.",
    ]
    if results.start_s:
        start = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in results.start_s.items())
        lines.append(f"Starting costs, in every wall time (a merge of tiny models, warm): {start}.")
    if good := [r for r in results.runs if not r.failure]:
        others = median(r.usage.others_cpu_s / r.usage.wall_s for r in good)
        lines.append(f"Other processes kept {others:.1f} cores busy during the merges (median).")
    if "mergekit" in results.machine:
        lines.append(
            "mergekit ran the same config, word for word; unlike streammerge it does not wait until its"
        )
        lines.append("output is on the disk. Factor: its wall time over streammerge's.")
    return "\n".join(lines)


def failures(runs: Iterable[Run]) -> str:
    """Return every failed run with what the command said."""
    blocks = []
    for run in runs:
        if run.failure:
            case = run.case
            what = (
                f"{case.program} `{case.method}` {case.size} {case.memory}, run {run.number + 1}, {run.cache}"
            )
            words = "\n".join(f"    {line}" for line in run.failure.strip().splitlines())
            blocks.append(f"{what}:\n\n{words}")
    return "\n\n".join(blocks)


def report(results: Results) -> str:
    """Return the whole report, as Markdown."""
    sections = {
        "Cold page cache": table(results.rows(["cold"])),
        "Page cache as found": table(results.rows(["as found"])),
        "Warm page cache": table(results.rows(["warm"])),
        "FAILED": failures(results.runs),
    }
    body = "".join(f"\n\n## {name}\n\n{text}" for name, text in sections.items() if text)
    return f"# Speed and memory\n\n{header(results)}{body}\n"


def plot(results: Results, path: Path) -> bool:
    """Draw the runs that are not warm; return whether there is a matplotlib to draw with."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = results.rows(COLD)
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.5))
    draw_times(rows, left)
    draw_peaks(rows, right)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    right.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return True


def draw_times(rows: Sequence[Row], axis: Any) -> None:
    """Draw the wall time of every run against its limit."""
    colours = colours_of(rows)
    walls = [r.usage.wall_s for row in rows for r in (*row.runs, *row.theirs)]
    limits = [r.limit.limit_s for row in rows for r in (*row.runs, *row.theirs)]
    for row in rows:
        for runs, marker in ((row.runs, "o"), (row.theirs, "x")):
            points = [r.limit.limit_s for r in runs], [r.usage.wall_s for r in runs]
            axis.scatter(*points, marker=marker, color=colours[row.case.method], s=24)
    axis.set(xscale="log", yscale="log", xlabel="limit of the same run, s", ylabel="wall time, s")
    from matplotlib import ticker

    for scale in (axis.xaxis, axis.yaxis):
        scale.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        scale.set_major_formatter(ticker.ScalarFormatter())
        scale.set_minor_formatter(ticker.NullFormatter())
    if rows:
        ends = [min(limits) / 1.3, max(limits) * 1.3]
        axis.plot(ends, ends, ":", color="gray")
        axis.annotate("the limit", (ends[1], ends[1]), color="gray", fontsize=8, ha="right", va="top")
        axis.set_ylim(min(*limits, *walls) / 1.5, max(*limits, *walls) * 1.5)


def draw_peaks(rows: Sequence[Row], axis: Any) -> None:
    """Draw the peak memory against the size of a model: a line for each method and --memory."""
    colours = colours_of(rows)
    for program in ("streammerge", "mergekit"):
        lines: dict[tuple[str, str], list[tuple[float, float]]] = {}
        for row in rows:
            runs, memory = (
                (row.runs, row.case.memory) if program == "streammerge" else (row.theirs, "mergekit")
            )
            if runs:
                lines.setdefault((row.case.method, memory), []).append((size(runs), peak(runs)))
        for (method, memory), points in lines.items():
            style = "o-" if program == "streammerge" else "x--"
            axis.plot(
                *zip(*sorted(points), strict=True), style, color=colours[method], label=f"{method}, {memory}"
            )
    axis.set(xlabel="size of each of the four models, GB", ylabel="peak resident memory, MiB")
    axis.set_xlim(left=0)
    axis.set_ylim(bottom=0)


def colours_of(rows: Sequence[Row]) -> dict[str, str]:
    """Return a colour for each method."""
    return {method: f"C{i % 10}" for i, method in enumerate(dict.fromkeys(row.case.method for row in rows))}
