"""Describe a plan to users: what it reads, writes and holds, and its memory, disk and time."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

from streammerge.errors import printable
from streammerge.io.disk import space_for
from streammerge.io.volumes import as_path, is_url
from streammerge.output.place import Place, place_of
from streammerge.planning.plan import MergePlan
from streammerge.report.stages import reads_text, stage_tree
from streammerge.report.summary import device_text
from streammerge.report.wrapping import wrapped
from streammerge.units import format_at_least, format_seconds, format_size, plural

ASSUMED_RATE = 500 << 20
"""Assumed speed of the disk in bytes read and written per second: a plain SSD."""
_INDENT = 10
_SHOWN = 20
"""The most left-out tensors that are named; the rest are counted."""
_HOLDS = {
    "unfinished": "holds an unfinished merge: `merge` resumes it if it is this one, else it needs --overwrite",
    "finished": "holds a finished merge: `merge` does nothing if it is this one, else it needs --overwrite",
}


def advice(plan: MergePlan, out: str | None) -> dict[str, Any]:
    """Return the facts that help to decide: other amounts of memory, disk, time, and warnings.

    Parameters
    ----------
    out
        The output directory; None: use the disk of the current directory, without warnings.
    """
    division = plan.division
    found: dict[str, Any] = {
        "memory_least": division.least(),
        "memory_read_once": division.least_unstreamed(),
        "seconds_estimate": round((plan.bytes_to_read() + plan.layout.nbytes) / ASSUMED_RATE, 1),
        "bytes_per_second_assumed": ASSUMED_RATE,
        "disk": None,
        "out_holds": None if out is None else _held_by(place_of(as_path(out))),
        "advice": [],
    }
    if out is not None and is_url(out):
        return found
    try:
        place = place_of(Path(out if out is not None else "."))
        space = space_for(place.out, plan.layout.sizes, place.paths)
    except OSError:
        return found
    found["disk"] = {"path": str(space.place), "bytes_needed": space.needed, "bytes_free": space.free}
    if out is not None and not space.fits:
        found["advice"].append(
            f"{printable(out)} needs {format_size(space.needed)}, but only {format_size(space.free)} are free, so the merge "
            "will be refused: free some space, or choose a different disk"
        )
    return found


def _held_by(place: Place) -> Literal["finished", "unfinished"] | None:
    """Return the state of an earlier merge in an output, or None."""
    if place.is_unfinished:
        return "unfinished"
    return "finished" if os.path.lexists(place.manifest) else None


def plan_text(plan: MergePlan, values: dict[str, Any], out: str | None) -> str:
    """Return a plan as text, wrapped between words if stdout is a terminal.

    Parameters
    ----------
    values
        The values of `describe` and of `advice`.
    """
    lines = [
        f"method    {_method(values)}",
        *_models(plan, values),
        *_quantised(values),
        *_stages(plan),
        f"tensors   {_tensors(values)}",
        *_adapter(values),
        *_components(values),
        *_left_out(values),
        f"read      {_read(plan, values)}",
        f"write     {_write(values)}",
        f"memory    {_memory(values)}",
        f"device    {device_text(values)}",
        f"disk      {_disk(values, out)}",
        f"time      about {format_seconds(values['seconds_estimate'], coarse=True)} if the disk reads and writes "
        f"{format_size(values['bytes_per_second_assumed'])}/s together",
    ]
    if "shared_text" in values:
        lines.append(f"shared    {values['shared_text']}")
    if values["out_holds"] is not None:
        lines.append(f"out       {printable(out)} {_HOLDS[values['out_holds']]}")
    lines += [f"warning: {warning}" for warning in (*values["warnings"], *values["advice"])]
    return wrapped("\n".join(lines), _INDENT)


def _method(values: dict[str, Any]) -> str:
    passes = values["model_passes"]
    before = f", {plural(passes, 'whole-model pass', 'whole-model passes')} before it" if passes else ""
    return f"{values['method']} ({', '.join(values['access'])}){before}"


def _models(plan: MergePlan, values: dict[str, Any]) -> list[str]:
    """Return the line on the models; for an average, a line per checkpoint with its coefficient."""
    if plan.config.checkpoints is not None:
        n = plural(len(values["checkpoints"]), "checkpoint")
        rows = [(f"{one['coefficient']:.6g}", one) for one in values["checkpoints"]]
        width = max(len(number) for number, _ in rows)
        return [
            f"average   {plan.config.checkpoints.schedule} of {n}, oldest first:",
            *(
                f"{'':{_INDENT}}{number:<{width}}  {printable(one['model'])}{'' if one['coefficient'] else ' (not read)'}"
                for number, one in rows
            ),
        ]
    base = f", base {printable(values['base_model'])}" if values["base_model"] else ""
    return [
        f"models    {len(values['models'])}: {', '.join(printable(m, 60) for m in values['models'])}{base}"
    ]


def _quantised(values: dict[str, Any]) -> list[str]:
    """Return one line per quantised input, with its formats."""
    return [
        f"{'' if i else 'quantised':<{_INDENT}}{printable(model, 60)}: "
        + ", ".join(f"{plural(n, 'tensor')} as {title}" for title, n in formats.items())
        for i, (model, formats) in enumerate(values["quantised"].items())
    ]


def _stages(plan: MergePlan) -> list[str]:
    """Return the tree of the stages, one per line; empty without stages."""
    tree = stage_tree(plan) if plan.stages else []
    return [f"{'' if i else 'stages':<{_INDENT}}{line}" for i, line in enumerate(tree)]


def _tensors(values: dict[str, Any]) -> str:
    kinds = ", ".join(f"{n:,} {kind}" for kind, n in values["tensors_by_kind"].items())
    dtypes = ", ".join(values["dtypes"])
    stored = "".join(f", {n:,} stored as {label}" for label, n in values["stored_as"].items())
    return f"{values['tensors']:,} ({kinds}), {dtypes}, {plural(values['elements'], 'parameter')}{stored}"


def _adapter(values: dict[str, Any]) -> list[str]:
    """Return a line on the adapter that is written in place of a model, if it is one."""
    one = values.get("adapter")
    if one is None:
        return []
    rank = (
        f"rank {one['rank']}"
        if "rank" in one
        else f"{100 * one['energy']:g} % of the squared norm, rank {one['max_rank']} at most"
    )
    whole = (
        f"; {plural(one['modules_whole'], 'module')} whole, if they differ from the base"
        if one["modules_whole"]
        else ""
    )
    return [f"adapter   {plural(one['modules'], 'module')} with factors, {rank}{whole}"]


def _left_out(values: dict[str, Any]) -> list[str]:
    """Return a line on tensors that are left out of the output, if any."""
    left = values["tensors_left_out"]
    if not left:
        return []
    shown = [f"{printable(name, 120)} ({why})" for name, why in list(left.items())[:_SHOWN]]
    more = f" and {len(left) - _SHOWN:,} more (--json lists all)" if len(left) > _SHOWN else ""
    return [f"left out  {plural(len(left), 'tensor')}: {', '.join(shown)}{more}"]


def _components(values: dict[str, Any]) -> list[str]:
    """Return the line on a model's folders; none if all its weights lie in its own folder."""
    found = [
        f"{printable(folder)} {', '.join(f'{n:,} {kind}' for kind, n in kinds.items())}"
        for folder, kinds in values["components"].items()
    ]
    return [f"folders   {'; '.join(found)}"] if found else []


def _read(plan: MergePlan, values: dict[str, Any]) -> str:
    parts = [format_size(values["bytes_to_read"])]
    if plan.stages:
        parts.append(reads_text(plan))
    if values["streamed_tensors"]:
        parts.append(
            f"{plural(values['streamed_tensors'], 'tensor')} larger than half the buffers "
            f"{'is' if values['streamed_tensors'] == 1 else 'are'} read more than once"
        )
        if (enough := values["memory_read_once"]) is not None:
            once = "once" if not values["model_passes"] else "once a pass"
            parts.append(f"with --memory {_option(enough)} each tensor is read {once}")
    return "; ".join(parts)


def _write(values: dict[str, Any]) -> str:
    shards = values["shards"]
    names = f"{shards[0]['name']} … {shards[-1]['name']}" if len(shards) > 1 else shards[0]["name"]
    return f"{format_size(values['bytes_to_write'])} in {plural(len(shards), 'shard')}: {names}"


def _memory(values: dict[str, Any]) -> str:
    least, once = values["memory_least"], values["memory_read_once"]
    parts = [f"at most {format_size(values['memory'])}"]
    if least is not None:
        parts.append(f"needs at least {format_at_least(least)}")
    if once is not None and not values["streamed_tensors"]:
        passes = " a pass" if values["model_passes"] else ""
        from_where = "with that" if once == least else f"from {_option(once)} on"
        parts.append(f"reads each tensor once{passes} {from_where}")
    return (
        f"{', '.join(parts)}; {format_size(values['memory_reserve'])} for the process, lists of tensors and "
        f"statistics, the rest for buffers: {plural(values['chunks'], 'chunk')}, the largest "
        f"{format_size(values['largest_chunk_bytes'])}"
    )


def _disk(values: dict[str, Any], out: str | None) -> str:
    disk = values["disk"]
    if disk is None and out is not None and is_url(out):
        return f"none is needed: {printable(out)} is written as it is merged"
    if disk is None:
        return "unknown: the file system does not answer"
    needed, free = format_size(disk["bytes_needed"]), format_size(disk["bytes_free"])
    if out is None:
        return f"needs {needed}; {free} are free here (give OUT to check a different disk)"
    return f"{printable(out)} needs {needed}; {free} are free there"


def _option(nbytes: int) -> str:
    """Return a size, rounded up, in the form that `--memory` takes without quotes: ``255MiB``, ``31.7GiB``."""
    if nbytes < 1 << 30:
        return format_at_least(nbytes).replace(" ", "")
    tenths = -(-nbytes * 10 // (1 << 30))
    return f"{tenths / 10:g}GiB"
