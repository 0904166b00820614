"""The page of a finished merge: what the method did, where the output lies, and where the time went."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import field
from typing import Any, get_args

from streammerge.records import dataclass
from streammerge.report.comparison import ComparedTensor, Comparison, Sums, short_names
from streammerge.report.pages.charts import Axis, Svg, across, distinct, lines, whole_numbers
from streammerge.report.pages.comparison import MOST_STACKS, PERCENT, drawn, number, percent, sections_of
from streammerge.report.pages.page import Figure, Section, Table, page_html
from streammerge.statistics.kinds import Directions, SignCounts
from streammerge.timing import Stage
from streammerge.units import format_seconds, format_size, plural

Layer = tuple[str, int]
"""A stack of layers, and the number of a layer in it."""
_STAGES = (*get_args(Stage), "wait for work")
"""The stages of a profile, in the order of the data."""


@dataclass(frozen=True)
class Kept:
    """The surviving entries of the task vectors of one tensor, per model of the config."""

    layer: Layer | None
    kept: Sequence[int]
    of: int
    """Elements of the tensor."""
    models: Sequence[int]
    """Index of each count's model."""


@dataclass(frozen=True)
class OutputSigns:
    """The signs of the output's task vector in one tensor."""

    layer: Layer | None
    with_model: Sequence[SignCounts]
    moves: Directions


@dataclass(frozen=True)
class MergeReport:
    """Everything that the page of a merge shows."""

    out: str
    method: str
    settings: Mapping[str, str]
    """Facts about the merge, by name: the config, the seed, the dtypes."""
    models: Sequence[str]
    """The models of the config, whose densities are counted."""
    comparison: Comparison | None
    """The output, the last model, next to the models that it was merged from. Without a base in the merge, the output is the
    base and not a model. None if no tensor could be measured."""
    has_base: bool
    kept: Sequence[Kept] = ()
    """Empty if no task vector lost entries, or if the merge was complete before."""
    densities: Sequence[tuple[str, float]] = ()
    """The density of each model over all tensors."""
    signs: Sequence[OutputSigns] = ()
    rounding: Comparison | None = None
    """A quantised output against the merged fp32 values, which are the base."""
    profile: Mapping[str, Any] = field(default_factory=dict)
    """See `streammerge.engine.profile`; empty if the merge was complete before."""
    notes: Sequence[str] = ()


def merge_page(report: MergeReport) -> str:
    """Return the page of a merge as HTML. It needs the extra ``pages``: see `streammerge.report.pages.needed`."""
    lead = [
        f"Merged by {report.method}, read back and measured next to the models that it was merged from.",
        *report.notes,
    ]
    facts = Table((), list(report.settings.items()))
    sections = [
        Section("The merge", tables=[facts]),
        Section(
            "What the method did",
            _method_notes(report),
            [*_densities(report), *_signs(report)],
            _density_table(report),
        ),
        *(() if report.comparison is None else _places(report, report.comparison)),
        *(() if report.rounding is None else (_rounding(report.rounding),)),
        Section("Where the time went", figures=_time(report.profile)),
        *(() if report.comparison is None else sections_of(report.comparison)),
    ]
    return page_html(f"Merge into {report.out}", lead, sections)


def by_layers(
    title: str,
    note: str,
    series: Sequence[str],
    layers: Mapping[Layer, Sequence[float | None]],
    y: Axis,
    shown: Callable[[float], str],
) -> list[Figure]:
    """Return a figure for each stack of layers: a line for each series.

    Parameters
    ----------
    layers
        The value of each series, by layer; None: no point.
    shown
        Function that returns a value as text.
    """
    stacks: dict[str, dict[int, Sequence[float | None]]] = {}
    for (stack, layer), values in sorted(layers.items()):
        stacks.setdefault(stack, {})[layer] = values
    figures = []
    for stack, found in list(stacks.items())[:MOST_STACKS]:
        points = [
            {"series": name, "x": layer, "y": values[i], "tip": f"{name}, layer {layer}: {shown(value)}"}
            for i, name in drawn(series)
            for layer, values in found.items()
            if (value := values[i]) is not None
        ]
        if points:
            drawing: Svg = lines(points, whole_numbers("layer", found), y, series)
            figures.append(Figure(title + (f" of {stack}" if len(stacks) > 1 else ""), drawing, note))
    return figures


def _method_notes(report: MergeReport) -> list[str]:
    notes = []
    if report.densities and not report.kept:
        notes.append(
            "The densities by layer are known to the run that merged; it is over, so only the totals are shown."
        )
    return notes


def _densities(report: MergeReport) -> list[Figure]:
    """Return the share of each task vector that survived trims and drops, by layer."""
    names = distinct(short_names(report.models))
    kept: dict[Layer, list[int]] = {}
    total: dict[Layer, list[int]] = {}
    for one in report.kept:
        if one.layer is not None:
            for model, count in zip(one.models, one.kept, strict=False):
                kept.setdefault(one.layer, [0] * len(names))[model] += count
                total.setdefault(one.layer, [0] * len(names))[model] += one.of
    layers = {
        layer: [100 * k / n if n else None for k, n in zip(counts, total[layer], strict=True)]
        for layer, counts in kept.items()
    }
    note = "The share of each task vector that trims and drops left."
    return by_layers("Density by layer", note, names, layers, PERCENT, lambda value: f"{value:.4g} %")


def _density_table(report: MergeReport) -> list[Table]:
    if not report.densities:
        return []
    rows = [[name, f"{100 * density:.4g} %"] for name, density in report.densities]
    return [Table(["model", "density"], rows, "Entries of the task vectors that were kept, over all tensors")]


def _signs(report: MergeReport) -> list[Figure]:
    """Return the signs that the output took: each model's, and up, down or none."""
    if not report.signs or report.comparison is None:
        return []
    names = distinct(report.comparison.short_names)[:-1]
    agree: dict[Layer, list[list[int]]] = {}
    moves: dict[Layer, list[int]] = {}
    for one in report.signs:
        if one.layer is None:
            continue
        counts = agree.setdefault(one.layer, [[0, 0] for _ in names])
        for i, found in enumerate(one.with_model):
            counts[i][0] += found.agree
            counts[i][1] += found.conflict
        moved = moves.setdefault(one.layer, [0, 0, 0])
        for i, count in enumerate((one.moves.up, one.moves.down, one.moves.still)):
            moved[i] += count
    agreeing = {
        layer: [100 * a / (a + c) if a + c else None for a, c in counts] for layer, counts in agree.items()
    }
    directions = {
        layer: [100 * count / max(1, sum(counts)) for count in counts] for layer, counts in moves.items()
    }
    won = "Of the entries that both the model and the output changed: where the output has the model's sign."
    took = "Unchanged: trimmed in all models, tied, cancelled, or lost in rounding."

    def shown(value: float) -> str:
        return f"{value:.4g} %"

    return [
        *by_layers("Whose sign the output took", won, names, agreeing, PERCENT, shown),
        *by_layers(
            "Signs of the output", took, ["positive", "negative", "unchanged"], directions, PERCENT, shown
        ),
    ]


def _places(report: MergeReport, found: Comparison) -> list[Section]:
    """Return how far the output lies from the base and from each model."""
    names = distinct(found.short_names)
    if report.has_base:
        own = ["the base", *names[:-1]]
        distances = _from_base
    else:
        own = names
        distances = _from_output
    layers: dict[Layer, Sequence[float | None]] = {
        layer: distances(sums) for layer, sums in found.by_layer().items()
    }
    figures = by_layers(
        "Distance of the output by layer",
        "The norm of the difference.",
        own,
        layers,
        Axis("distance"),
        number,
    )
    whole = distances(found.total)
    norm = found.total.base_norm if report.has_base else None
    rows = [
        [name, number(distance), percent(distance / norm) if norm else "–"]
        for name, distance in zip(own, whole, strict=True)
    ]
    head = ["from", "distance", "of the base's norm"]
    if not report.has_base:
        head, rows = head[:2], [row[:2] for row in rows]
    return [Section("Where the output lies", figures=figures, tables=[Table(head, rows, "Over all tensors")])]


def _from_base(sums: Sums) -> list[float]:
    """Return the distances of the output, the last vector, from the base and from each other vector."""
    dots = sums.dots
    own = dots[-1, -1]
    others = [max(0.0, own - 2 * dots[i, -1] + dots[i, i]) for i in range(len(dots) - 1)]
    return [math.sqrt(square) for square in (own, *others)]


def _from_output(sums: Sums) -> list[float]:
    """Return the norms of the vectors, which begin at the output."""
    return [sums.norm(i) for i in range(len(sums.dots))]


def _rounding(found: Comparison) -> Section:
    """Return the relative error of the stored values, by layer and by tensor."""
    layers: dict[Layer, Sequence[float | None]] = {}
    for layer, sums in found.by_layer().items():
        relative = sums.relative(0)
        layers[layer] = [None if relative is None else 100 * relative]
    figures = by_layers(
        "Quantisation error by layer",
        "Norm of the difference to the merged values, relative to their norm.",
        ["error"],
        layers,
        Axis("error, %"),
        lambda value: f"{value:.4g} %",
    )
    worst = sorted(found.tensors, key=_error, reverse=True)[:20]
    rows = [[tensor.name, percent(_error(tensor)), tensor.dtypes[1]] for tensor in worst]
    total = f"Over {plural(len(found.tensors), 'quantised tensor')} the error is {percent(found.total.relative(0))}."
    tables = [Table(["tensor", "error", "stored as"], rows, "The largest errors", folded=True)]
    return Section("Quantisation error", [total], figures, tables)


def _error(tensor: ComparedTensor) -> float:
    return Sums.of([tensor], 1).relative(0) or 0.0


def _time(profile: Mapping[str, Any]) -> list[Figure]:
    """Return the seconds of each stage, summed over the threads."""
    stages: Mapping[str, Mapping[str, float]] = profile.get("stages", {})
    points = [
        {"series": name, "x": stages[name]["wall"], "tip": f"{name}: {stages[name]['wall']:.3g} s"}
        for name in (*_STAGES, *(other for other in stages if other not in _STAGES))
        if name in stages and stages[name]["wall"]
    ]
    if not points:
        return []
    took = (
        f"{format_seconds(profile['seconds'])} in all, by {profile['workers']} workers: read "
        f"{format_size(profile['bytes_read'])}, wrote {format_size(profile['bytes_written'])}, peak memory until then "
        f"{format_size(profile['process']['peak_resident_bytes'])}."
    )
    return [Figure("Seconds by stage, summed over workers", across(points, Axis("seconds")), took)]
