"""The page of a sweep: the score over the swept values, and a table of all points."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from streammerge.report.pages.charts import Axis, distinct, label, lines, matrix
from streammerge.report.pages.page import Figure, Section, Table, page_html
from streammerge.units import plural

Row = Mapping[str, str]
"""A row of sweep.csv, as `csv.DictReader` returns it."""

SCORE, SECONDS = "score", "seconds"
_MOST_LINES = 16
"""The most lines of one chart; more settings of the other keys are drawn as points."""


def sweep_page(rows: Sequence[Row], swept: Sequence[str], *, name: str = "sweep", method: str = "") -> str:
    """Return the page of a sweep as HTML. It needs the extra ``pages``: see `streammerge.report.pages.needed`.

    Parameters
    ----------
    rows
        A row for each point, in the order of the grid, as in sweep.csv: a column for each key of `swept` (the value as the
        config spells it), ``score`` and ``seconds`` (numbers as text, empty if there are none), and any other columns, which
        the table shows if a row has something there.
    swept
        The swept keys, in the config's order.
    name
        The title's subject, such as the config's file name.
    method
        The name of the merge method.

    Notes
    -----
    The best point is the first of those with the highest finite score. The numbers of the axes are those of the values if
    all values of a key are numbers; otherwise they are names.
    """
    scores = [number_of(row.get(SCORE, "")) for row in rows]
    best = best_of(scores)
    done = sum(score is not None for score in scores)
    lead = [
        f"{plural(len(rows), 'point')} over {', '.join(swept)}"
        + (f", by {method}" if method else "")
        + f"; {done} scored."
    ]
    if best is not None:
        where = ", ".join(f"{key} = {rows[best].get(key, '')}" for key in swept)
        lead.append(f"Best: {where}, with a score of {scores[best]:.6g}.")
    scored = [(row, score) for row, score in zip(rows, scores, strict=True) if score is not None]
    figures = [_curve(scored, swept, key) for key in swept if len({row.get(key) for row, _ in scored}) > 1]
    if (grid := _grid(scored, swept)) is not None:
        figures.append(grid)
    if not scored:
        lead.append("No point has a score, so there is nothing to draw: give a command with --score.")
    more = (column for row in rows for column, text in row.items() if text)
    head = list(dict.fromkeys([*swept, SCORE, SECONDS, *more]))
    cells = [[_cell(row, column) for column in head] for row in rows]
    table = Table(head, cells, "All points; the best one is bold.", best=best)
    sections = [Section("Score over the swept values", figures=figures), Section("Points", tables=[table])]
    return page_html(f"Sweep of {name}", lead, sections)


def _cell(row: Row, column: str) -> str:
    """Return a cell as text; a score in six digits."""
    score = number_of(row.get(SCORE, "")) if column == SCORE else None
    return str(row.get(column) or "") if score is None else f"{score:.6g}"


def number_of(text: object) -> float | None:
    """Return the finite number that a text spells, or None."""
    try:
        number = float(str(text))
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def best_of(scores: Sequence[float | None]) -> int | None:
    """Return the index of the first highest score, or None without any."""
    known = [(score, -i) for i, score in enumerate(scores) if score is not None]
    return -max(known)[1] if known else None


def _curve(scored: Sequence[tuple[Row, float]], swept: Sequence[str], key: str) -> Figure:
    """Return the score over one key: a line for each setting of the others."""
    others = [other for other in swept if other != key]
    values = [row.get(key, "") for row, _ in scored]
    numbers = [number_of(value) for value in values]
    numeric = None not in numbers
    settings = [", ".join(f"{other} {row.get(other, '')}" for other in others) for row, _ in scored]
    names = list(dict.fromkeys(settings))
    labels = dict(zip(names, distinct(names), strict=True))
    many = len(names) > _MOST_LINES
    points = [
        {
            "series": "" if many else labels[setting],
            "x": number if numeric else label(value),
            "y": score,
            "tip": f"{key} {value}{', ' if setting else ''}{setting}: {score:.6g}",
        }
        for (_, score), value, number, setting in zip(scored, values, numbers, settings, strict=True)
    ]
    order = sorted(points, key=lambda point: (point["series"], point["x"])) if numeric else points
    drawing = lines(
        order,
        Axis(label(key), ordered=not numeric, zero=False),
        Axis(SCORE, ".4~g", zero=False),  # of equal scores too
        [""] if many else list(labels.values()),
        "point" if many else "line",
    )
    note = f"A line for each {' and '.join(others)}." if others else ""
    return Figure(f"Score over {key}", drawing, f"A point for each {' and '.join(others)}." if many else note)


def _grid(scored: Sequence[tuple[Row, float]], swept: Sequence[str]) -> Figure | None:
    """Return the best score for each pair of values of the first two keys; None if a key has one value only."""
    if len(swept) < 2:
        return None
    first, second = swept[:2]
    cells: dict[tuple[str, str], float] = {}
    for row, score in scored:
        place = (row.get(second, ""), row.get(first, ""))
        cells[place] = max(score, cells.get(place, score))
    if len({x for x, _ in cells}) < 2 or len({y for _, y in cells}) < 2:
        return None
    low, high = min(cells.values()), max(cells.values())
    drawing = matrix(
        [
            {"x": x, "y": y, "value": score, "tip": f"{first} {y}, {second} {x}: {score:.6g}"}
            for (x, y), score in cells.items()
        ],
        Axis(label(second), ordered=True),
        Axis(label(first), ordered=True),
        domain=(low, high if high > low else low + 1),
        scheme="blues",
        texts=len(cells) <= 100,
        format=".3g",
    )
    note = "The best over all other keys." if len(swept) > 2 else ""
    return Figure(f"Score by {first} and {second}", drawing, note)
