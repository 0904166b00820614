"""A plan, for people."""

from __future__ import annotations

import textwrap
from typing import Any

from streammerge.errors import printable
from streammerge.planning.plan import MergePlan
from streammerge.report.wrapping import terminal_width
from streammerge.units import format_size, plural

_INDENT = 10


def plan_text(plan: MergePlan, values: dict[str, Any], out: str | None) -> str:
    """Return a plan for people."""
    base = f", base {printable(values['base_model'])}" if values["base_model"] else ""
    kinds = ", ".join(f"{n} {kind}" for kind, n in values["tensors_by_kind"].items())
    shards = values["shards"]
    size = f"{shards[0]['name']} … {shards[-1]['name']}" if len(shards) > 1 else shards[0]["name"]
    lines = [
        f"method    {values['method']} ({', '.join(values['access'])})",
        f"models    {len(values['models'])}: {', '.join(printable(m, 60) for m in values['models'])}{base}",
        f"tensors   {values['tensors']} ({kinds}), {', '.join(values['dtypes'])}, {values['elements']:,} parameters",
        f"read      {format_size(values['bytes_to_read'])}",
        f"write     {format_size(values['bytes_to_write'])} in {plural(len(shards), 'shard')}: {size}",
        f"memory    at most {format_size(values['memory'])}: {format_size(values['memory_reserve'])} for the process, lists of tensors and statistics, "
        f"the rest for buffers; {plural(values['chunks'], 'chunk')}, the largest {format_size(values['largest_chunk_bytes'])}",
    ]
    lines += [f"warning: {warning}" for warning in values["warnings"]]
    return "\n".join(
        textwrap.fill(
            line,
            terminal_width(),
            subsequent_indent=" " * _INDENT,
            break_long_words=False,
            break_on_hyphens=False,
        )
        for line in lines
    )
