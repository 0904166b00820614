"""A sweep as text, as plain values, and as a page."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from streammerge.errors import InputError, printable
from streammerge.events import Control
from streammerge.output.sweep_record import PAGE, REASON, SCORE, SECONDS, Row, SweepRecord, cells_of
from streammerge.planning.plan import MergePlan
from streammerge.report.pages.needed import check_memory, require_library, write_page
from streammerge.report.pages.sweep import sweep_page

_MOST_ROWS = 24
"""The most rows of the table on the screen; sweep.csv has all."""
_MOST_REASON = 60


def write_sweep_page(record: SweepRecord, where: str, plan: MergePlan, control: Control) -> None:
    """Write sweep.html, the score over the swept values; say so if that needs more than there is.

    Parameters
    ----------
    where
        The name of the config.
    plan
        The plan of any point.
    """
    if record.command is None:
        return
    try:
        require_library(f"{PAGE} is not written")
        check_memory(PAGE, plan.division.budget)
    except InputError as error:
        control.warn(str(error))
        return
    rows = [cells_of(row) for row in record.rows.values()]
    swept = [key for key, _ in next(iter(record.rows.values())).values]
    page = sweep_page(rows, swept, name=Path(where).name, method=plan.method.name)
    write_page(record.out / PAGE, page)


def sweep_values(points: Mapping[str, Row], best: str | None) -> dict[str, Any]:
    """Return a sweep's points as plain values."""
    return {
        "best": best,
        "points": [
            {
                "point": name,
                "values": dict(row.values),
                "score": row.score,
                "seconds": row.seconds,
                "reason": row.reason,
                "removed": row.removed,
            }
            for name, row in points.items()
        ],
    }


def sweep_text(points: Mapping[str, Row], best: str | None, out: str) -> str:
    """Return the table of the points, the best marked; of many points, those with the best scores."""
    names = list(points)
    if len(names) > _MOST_ROWS:
        names.sort(
            key=lambda name: -math.inf if (score := points[name].score) is None else score, reverse=True
        )
        names = names[:_MOST_ROWS]
    rows = {name: {"": "best" if name == best else "", **_shown(points[name])} for name in names}
    columns = list(next(iter(rows.values())))
    used = [
        key for key in columns if key not in ("", SCORE, REASON) or any(row[key] for row in rows.values())
    ]
    widths = {key: max(len(key), *(len(row[key]) for row in rows.values())) for key in used}
    lines = ["  ".join(key.ljust(widths[key]) for key in used)]
    lines += ["  ".join(row[key].ljust(widths[key]) for key in used) for row in rows.values()]
    more = len(points) - len(names)
    end = [f"and {more} more in {printable(out)}/sweep.csv"] if more else []
    if best is not None:
        end.append(f"best: {printable(out)}/{printable(best, 250)}")
    return "\n".join([*(line.rstrip() for line in lines), *end])


def _shown(row: Row) -> dict[str, str]:
    """Return a row's cells for a screen."""
    cells = {key: printable(text, 40) for key, text in cells_of(row).items()}
    cells[SECONDS] = "" if row.seconds is None else f"{row.seconds:.1f}"
    cells[SCORE] = "" if row.score is None else f"{row.score:.6g}"
    cells[REASON] = printable(cells[REASON], _MOST_REASON)
    return cells
