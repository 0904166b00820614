"""The page of a comparison: how models differ from their base and from each other."""

from __future__ import annotations

import math
from collections.abc import Sequence

from streammerge.methods.comparison import SHARES
from streammerge.report.comparison import (
    ComparedTensor,
    Comparison,
    Sums,
    is_identical,
    shares_of_signs,
)
from streammerge.report.pages.charts import Axis, bars, distinct, lines, square, whole_numbers
from streammerge.report.pages.page import Figure, Section, Table, page_html
from streammerge.units import plural

PERCENT = Axis("share, %")
_MOST_NAMES = 500
"""The most tensors that a table lists."""
MOST_DRAWN = 24
"""The most models that a figure shows: the first ones and the last. The tables of norms have all."""
MOST_STACKS = 6
"""The most stacks of layers that have figures of their own."""


def comparison_page(found: Comparison) -> str:
    """Return the page of a comparison as HTML. It needs the extra ``pages``: see `streammerge.report.pages.needed`."""
    lead = [
        f"The base is {found.base}: {plural(len(found.tensors), 'tensor')}, norm {number(found.total.base_norm)}. "
        "A task vector is a model minus the base; every number is exact."
    ]
    if found.left_out:
        lead.append(
            f"{plural(len(found.left_out), 'tensor')} left out, since not all models have them alike: see below."
        )
    return page_html("Comparison of models", lead, sections_of(found))


def sections_of(found: Comparison) -> list[Section]:
    """Return everything that a page shows about a comparison."""
    names = distinct(found.short_names)
    return [
        Section("Models", tables=[_models_table(found, names)]),
        Section(
            "How far the models moved",
            _note_of_drawn(names),
            figures=[*_norms(found, names), *_kinds(found, names)],
        ),
        Section("Whether they agree", figures=_agreement(found, names)),
        Section(
            "How their changes are distributed",
            figures=[_magnitudes(found, names), _top_shares(found, names)],
        ),
        Section("All layers and tensors", tables=_tables(found, names)),
    ]


def drawn(names: Sequence[str]) -> list[tuple[int, str]]:
    """Return the series that a figure shows, each with its index: all, or the first ones and the last."""
    shown = list(enumerate(names))
    return shown if len(shown) <= MOST_DRAWN else [*shown[: MOST_DRAWN - 1], shown[-1]]


def _note_of_drawn(names: Sequence[str]) -> list[str]:
    if len(names) <= MOST_DRAWN:
        return []
    return [
        f"The figures show {MOST_DRAWN} of {len(names)} models: the first ones and the last. The tables have all."
    ]


def number(value: float | None) -> str:
    """Return a number in four digits."""
    return "–" if value is None else f"{value:.4g}"


def percent(share: float | None) -> str:
    """Return a share in per cent."""
    return "–" if share is None else f"{100 * share:.3g} %"


def by_stack(layers: dict[tuple[str, int], Sums]) -> dict[str, dict[int, Sums]]:
    """Return layers by the stack that they lie in; at most a few stacks."""
    stacks: dict[str, dict[int, Sums]] = {}
    for (stack, layer), sums in layers.items():
        stacks.setdefault(stack, {})[layer] = sums
    return dict(list(stacks.items())[:MOST_STACKS])


def _models_table(found: Comparison, names: Sequence[str]) -> Table:
    head = [
        "model",
        "norm",
        "of the base's",
        *(f"top {100 * share:.0f} %" for share in SHARES),
        "identical",
        "dtypes",
    ]
    rows = []
    for i, (name, reference) in enumerate(zip(names, found.models, strict=True)):
        dtypes = sorted({tensor.dtypes[i + 1] for tensor in found.tensors})
        same = sum(is_identical(tensor, i) for tensor in found.tensors)
        shown = reference if reference == name else f"{name} ({reference})"
        top = [percent(share) for share in found.total.top_share(i)]
        total = found.total
        rows.append(
            [shown, number(total.norm(i)), percent(total.relative(i)), *top, f"{same:,}", ", ".join(dtypes)]
        )
    note = "top: the part of the squared norm that the largest entries of each tensor hold; identical: tensors equal to the base's"
    return Table(head, rows, note)


def _norms(found: Comparison, names: Sequence[str]) -> list[Figure]:
    """Return the norm of each task vector by layer, a figure for each stack of layers."""
    figures = []
    stacks = by_stack(found.by_layer())
    for stack, layers in stacks.items():
        points = [
            {
                "series": name,
                "x": layer,
                "y": sums.norm(i),
                "tip": f"{name}, layer {layer}: {number(sums.norm(i))}",
            }
            for i, name in drawn(names)
            for layer, sums in layers.items()
        ]
        title = "Norm by layer" + (f" of {stack}" if len(stacks) > 1 else "")
        figures.append(
            Figure(
                title,
                lines(points, whole_numbers("layer", layers), Axis("norm"), names),
                "How much each layer was changed.",
            )
        )
    return figures


def _kinds(found: Comparison, names: Sequence[str]) -> list[Figure]:
    kinds = {kind: sums for kind, sums in found.by_kind().items() if sums.base_square}
    points = [
        {
            "series": name,
            "x": kind,
            "y": 100 * (sums.relative(i) or 0.0),
            "tip": f"{name}, {kind}: {percent(sums.relative(i))}",
        }
        for kind, sums in kinds.items()
        for i, name in drawn(names)
    ]
    if not points:
        return []
    drawing = bars(points, Axis("", ordered=True), Axis("of the base's norm, %"), names)
    return [Figure("Norm by kind of tensor", drawing, "Relative to the base's tensors of that kind.")]


def _agreement(found: Comparison, names: Sequence[str]) -> list[Figure]:
    if len(names) < 2:
        return []
    figures = [
        Figure(
            "Cosines between task vectors",
            square(
                [name for _, name in drawn(names)],
                [[found.cosines[i][j] for j, _ in drawn(names)] for i, _ in drawn(names)],
            ),
            "1: the same direction; 0: unrelated; -1: opposite.",
        )
    ]
    stacks = by_stack(found.by_layer())
    for stack, layers in stacks.items():
        points = [
            {
                "series": series,
                "x": layer,
                "y": 100 * share,
                "tip": f"{series}, layer {layer}: {percent(share)}",
            }
            for layer, sums in layers.items()
            for series, counts in (("all entries", sums.signs), ("largest 20 %", sums.top_signs))
            if (share := shares_of_signs(counts)["conflict"]) is not None
        ]
        if points:
            title = "Conflicting signs by layer" + (f" of {stack}" if len(stacks) > 1 else "")
            note = "Of the entries where two task vectors or more are not zero."
            figures.append(
                Figure(
                    title,
                    lines(points, whole_numbers("layer", layers), PERCENT, ["all entries", "largest 20 %"]),
                    note,
                )
            )
    return figures


def _magnitudes(found: Comparison, names: Sequence[str]) -> Figure:
    """Return the exact counts of changes by power of two; zero and subnormal changes are told apart."""
    exponents = found.total.exponents
    used = [e for e in range(1, exponents.shape[1]) if exponents[:, e].any()]
    points = []
    for i, name in drawn(names):
        total = max(1, int(exponents[i].sum()))
        for e in range(used[0], used[-1] + 1) if used else ():
            count = int(exponents[i, e])
            tip = f"{name}: {count:,} entries from 2^{e - 127} to 2^{e - 126} ({percent(count / total)})"
            points.append({"series": name, "x": e - 127, "y": 100 * count / total, "tip": tip})
    zero = ", ".join(
        f"{name} {percent(int(exponents[i, 0]) / max(1, int(exponents[i].sum())))}"
        for i, name in drawn(names)
    )
    return Figure(
        "Magnitudes of the changes",
        lines(points, whole_numbers("log2 of the magnitude", (e - 127 for e in used)), PERCENT, names),
        f"Exact counts. Not changed: {zero}.",
    )


def _top_shares(found: Comparison, names: Sequence[str]) -> Figure:
    points = [
        {
            "series": name,
            "x": f"top {100 * share:.0f} %",
            "y": 100 * (part or 0.0),
            "tip": f"{name}, top {100 * share:.0f} %: {percent(part)}",
        }
        for i, name in drawn(names)
        for share, part in zip(SHARES, found.total.top_share(i), strict=True)
    ]
    drawing = bars(points, Axis("", ordered=True), Axis("of the squared norm, %"), names)
    return Figure("Held by the largest entries", drawing, "Near 100 %: a trim to that density loses little.")


def _tables(found: Comparison, names: Sequence[str]) -> list[Table]:
    tables = []
    if layers := found.by_layer():
        one_stack = len({stack for stack, _ in layers}) < 2
        rows = [
            [
                str(layer) if one_stack else f"{stack}.{layer}",
                *(f"{number(sums.norm(i))} ({percent(sums.relative(i))})" for i in range(len(names))),
                percent(shares_of_signs(sums.signs)["conflict"]),
            ]
            for (stack, layer), sums in layers.items()
        ]
        tables.append(Table(["layer", *names, "conflict"], rows, "Norm by layer", folded=True))
    kinds = [
        [kind, *(f"{number(sums.norm(i))} ({percent(sums.relative(i))})" for i in range(len(names)))]
        for kind, sums in found.by_kind().items()
        if sums.base_square
    ]
    tables.append(Table(["kind", *names], kinds, "Norm by kind", folded=True))
    listed = found.tensors[:_MOST_NAMES]
    rows = [
        [tensor.name, *(_norm_of(tensor, i) for i in range(len(names))), _dtypes(tensor)] for tensor in listed
    ]
    more = (
        ""
        if len(listed) == len(found.tensors)
        else f" (the first {_MOST_NAMES:,} of {len(found.tensors):,}; --json has all)"
    )
    tables.append(Table(["tensor", *names, "dtypes"], rows, f"Norm by tensor{more}", folded=True))
    for i, name in drawn(names):
        same = [tensor.name for tensor in found.tensors if is_identical(tensor, i)]
        if same:
            told = f"{plural(len(same), 'tensor')} of {name} identical to the base's"
            tables.append(Table(["tensor"], [[one] for one in same[:_MOST_NAMES]], told, folded=True))
    if found.left_out:
        rows = [[name, reason] for name, reason in list(found.left_out.items())[:_MOST_NAMES]]
        told = f"{plural(len(found.left_out), 'tensor')} left out"
        tables.append(Table(["tensor", "reason"], rows, told, folded=True))
    return tables


def _norm_of(tensor: ComparedTensor, model: int) -> str:
    return (
        "identical"
        if is_identical(tensor, model)
        else number(math.sqrt(tensor.difference.dots[model, model]))
    )


def _dtypes(tensor: ComparedTensor) -> str:
    return ", ".join(dict.fromkeys(tensor.dtypes))
