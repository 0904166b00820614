"""The result of `verify`, as text and as plain values."""

from __future__ import annotations

from typing import Any

from streammerge.errors import printable
from streammerge.output.check import Verdict
from streammerge.units import format_size, plural

_SHOWN = 5
"""The most names of files that are listed; the rest are counted."""


def verdict_values(verdict: Verdict) -> dict[str, Any]:
    """Return a verdict as plain values."""
    return {
        "files": verdict.files,
        "nbytes": verdict.nbytes,
        "problems": list(verdict.problems),
        "others": list(verdict.others),
        "edits": dict(verdict.edits),
        **(
            {}
            if (done := verdict.recomputed) is None
            else {
                "recomputed": {
                    "pieces": done.pieces,
                    "of_pieces": done.of_pieces,
                    "elements": done.elements,
                    "of_elements": done.of_elements,
                }
            }
        ),
    }


def verdict_text(out: str, verdict: Verdict) -> str:
    """Return a verdict as text: one line per problem, or a line that there is none."""
    lines = [*verdict.problems]
    if not lines:
        size = format_size(verdict.nbytes)
        lines.append(f"{printable(out)}: {plural(verdict.files, 'file')}, {size}: all as written")
    lines += [f"{printable(name)}: {what}" for name, what in verdict.edits.items()]
    if (done := verdict.recomputed) is not None and not done.problems:
        share = 100 * done.elements / max(1, done.of_elements)
        lines.append(
            f"{done.pieces:,} of {plural(done.of_pieces, 'piece')} recomputed from the inputs ({share:.3g} % of the elements): "
            "the same bits"
        )
    if verdict.others:
        names = ", ".join(printable(name, 60) for name in verdict.others[:_SHOWN])
        more = f" and {len(verdict.others) - _SHOWN} more" if len(verdict.others) > _SHOWN else ""
        lines.append(f"not part of the merge, and not checked: {names}{more}")
    return "\n".join(lines)
