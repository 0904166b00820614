"""A plan at a glance: what is merged, how much is read and written, in how much memory."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from streammerge.dtypes import FLOATS
from streammerge.errors import printable
from streammerge.units import format_size

if TYPE_CHECKING:
    from streammerge.planning.plan import MergePlan

_SHOWN = 4
"""Models and warnings that are spelt out; more are counted."""


def overview(plan: MergePlan) -> dict[str, str]:
    """Return a few lines, each under a name."""
    elements = sum(job.n_elements for job in plan.jobs if job.dtype in FLOATS)
    names = [printable(model.reference, 80) for model in plan.models]
    lines = {
        "method": plan.method.name,
        "models": f"{len(names)}: {_some(names)}",
        **({} if plan.base is None else {"base": printable(plan.base.reference, 80)}),
        "tensors": f"{len(plan.jobs)} tensors, {elements:,} parameters, {', '.join(sorted({job.dtype for job in plan.jobs}))}",
        "bytes": f"reads {format_size(plan.bytes_to_read())}, writes {format_size(plan.layout.nbytes)}",
        "memory": f"at most {format_size(plan.budget.total)}, on {plan.device}, {plan.budget.threads} threads",
    }
    return lines | ({"warnings": _some(list(plan.warnings), "; ")} if plan.warnings else {})


def as_text(lines: dict[str, str]) -> str:
    """Return the lines under each other."""
    return "\n".join(f"{name:<9} {text}" for name, text in lines.items())


def as_html(lines: dict[str, str]) -> str:
    """Return the lines as a table for a notebook."""
    rows = "".join(
        f"<tr><th style='text-align:left'>{escape(name)}</th><td style='text-align:left'>{escape(text)}</td></tr>"
        for name, text in lines.items()
    )
    return f"<table>{rows}</table>"


def _some(parts: list[str], separator: str = ", ") -> str:
    more = f"{separator}and {len(parts) - _SHOWN} more" if len(parts) > _SHOWN else ""
    return separator.join(parts[:_SHOWN]) + more
