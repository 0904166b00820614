"""The opening line and the summary of a merge, as text and as plain values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from streammerge.engine.merge import Summary
from streammerge.engine.telling import Density
from streammerge.errors import printable
from streammerge.machine import peak_memory
from streammerge.output.adapter_cut import Residual, total_residual
from streammerge.planning.backend import ASKED, NO_GPU
from streammerge.units import format_seconds, format_size, plural

_NAMED = 4
"""The most models that a sentence names; the rest are counted."""


def opening_line(plan: Mapping[str, Any]) -> str:
    """Return a line on the merge about to start (without ``out``: the comparison): models, method, output, bytes."""
    names = [printable(name, 60) for name in plan["models"]]
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    base = f" (base {printable(plan['base_model'], 60)})" if plan["base_model"] else ""
    if plan.get("adapter") and plan["method"] == "passthrough":
        return (
            f"extracting an adapter of {names[0]}{base} into {printable(plan['out'])}: "
            f"reads {format_size(plan['bytes_to_read'])}, writes at most {format_size(plan['bytes_to_write'])}"
        )
    if "out" not in plan:
        return (
            f"comparing {', '.join(names[:_NAMED])}{more}{base}: reads {format_size(plan['bytes_to_read'])}"
        )
    return (
        f"merging {', '.join(names[:_NAMED])}{more} by {printable(plan['method'])}{base} into {printable(plan['out'])}: "
        f"reads {format_size(plan['bytes_to_read'])}, writes {format_size(plan['bytes_to_write'])}"
    )


def device_text(plan: Mapping[str, Any]) -> str:
    """Return the device of a plan, and why it was chosen."""
    name = "CPUs" if plan["device"] == "cpu" else printable(plan["device"])
    return f"{name} ({printable(plan['device_reason'], 200)})" if plan.get("device_reason") else name


def device_lines(plan: Mapping[str, Any]) -> list[str]:
    """Return a line on the device about to be used, if there was a choice."""
    settled = plan.get("device_reason", "") in ("", ASKED, NO_GPU)
    return [] if settled else [f"device: {device_text(plan)}"]


def summary_values(summary: Summary, elements: int | None = None) -> dict[str, Any]:
    """Return a summary as plain values."""
    return {
        "out": summary.out,
        "already_complete": summary.already_complete,
        **({"edits": dict(summary.edits)} if summary.edits else {}),
        "tensors": summary.tensors,
        "elements": elements,
        "shards": summary.shards,
        "bytes_read": summary.bytes_read,
        "bytes_written": summary.bytes_written,
        "bytes_resumed": summary.bytes_resumed,
        "took_seconds": round(summary.seconds, 3),
        "compile_seconds": round(summary.compile_seconds, 3),
        "peak_resident_bytes": peak_memory(),
        "densities": [density_values(density) for density in summary.densities],
        **({"floored": dict(summary.floored)} if summary.floored is not None else {}),
        **({"residuals": residual_values(summary.residuals)} if summary.residuals else {}),
    }


def residual_values(residuals: Sequence[Residual]) -> dict[str, Any]:
    """Return what an adapter's factors miss as plain values, in all and by module."""
    modules = {one.module: {"rank": one.rank, "residual": one.residual} for one in residuals}
    return {"residual": total_residual(residuals), "modules": modules}


def density_values(density: Density) -> dict[str, Any]:
    """Return a density as plain values; `model` is the model's index."""
    return {
        "model": density.place,
        "name": density.model,
        "kept": density.kept,
        "of": density.of,
        "density": density.density,
    }


def summary_text(summary: Summary) -> str:
    """Return a summary as text."""
    out = printable(summary.out)
    if summary.already_complete:
        edits = "".join(f"; {printable(name)} was {what}" for name, what in summary.edits.items())
        return f"{out} already holds this merge, complete ({plural(summary.tensors, 'tensor')}){edits}; nothing was done"
    rate = (summary.bytes_read + summary.bytes_written) / max(summary.seconds, 1e-6)
    compiling = summary.compile_seconds
    compiled = f", after {format_seconds(compiling)} of compiling" if compiling >= 0.1 else ""
    lines = [
        f"wrote {out}: {plural(summary.tensors, 'tensor')} in {plural(summary.shards, 'shard')}, "
        f"{format_size(summary.bytes_written + summary.bytes_resumed)}",
        f"read {format_size(summary.bytes_read)} in {format_seconds(summary.seconds)}{compiled} "
        f"({format_size(rate)}/s read and written), peak memory {format_size(peak_memory())}",
    ]
    lines += _residual_lines(summary.residuals)
    if summary.bytes_resumed:
        lines.append(f"{format_size(summary.bytes_resumed)} were finished by an earlier run")
    lines += [
        f"{printable(entry.model, 80)}: {100 * entry.density:.4g} % of its changes to the base were kept "
        f"({entry.kept:,} of {entry.of:,}), the rest was dropped or trimmed"
        for entry in summary.densities
    ]
    if summary.floored is not None:
        lines.append(
            f"the floor decided {100 * summary.floored['fraction']:.3g} % of {summary.floored['of']:,} elements"
        )
    return "\n".join(lines)


def _residual_lines(residuals: Sequence[Residual]) -> Iterator[str]:
    """Yield a line for every module of an adapter, and one for all together."""
    if not residuals:
        return
    width = max(len(one.module) for one in residuals)
    yield f"{plural(len(residuals), 'module')}; residual ||D - BA|| / ||D|| of each:"
    for one in residuals:
        yield f"  {printable(one.module):<{width}}  rank {one.rank:>3}  {one.residual:.3g}"
    yield f"residual of all together: {total_residual(residuals):.3g}"
