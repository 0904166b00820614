"""The stages of a plan: as plain values, and drawn as a tree."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from streammerge.errors import printable
from streammerge.formats.parts import all_parts
from streammerge.planning.plan import MergePlan
from streammerge.planning.stages import StageRef, bytes_once
from streammerge.units import format_size

_SHOWN = 3
"""The most models that a line names; the rest are counted."""


def stage_values(plan: MergePlan) -> list[dict[str, Any]]:
    """Return the description of each stage, in the order of the merge."""
    refs = all_parts([ref for job in plan.jobs for ref in job.inputs])
    before: dict[str, int] = {}
    for ref in refs:
        if isinstance(ref, StageRef):
            before[ref.stage] = before.get(ref.stage, 0) + ref.bytes_before
    return [
        {
            "name": stage.name,
            "method": stage.method.name,
            "models": [model.reference for model in stage.models],
            "base_model": None if stage.base is None else stage.base.reference,
            "dtypes": sorted({job.dtype for job in stage.jobs}),
            "bytes_of_statistics": before.get(stage.name, 0),
        }
        for stage in plan.stages
    ]


def reads_text(plan: MergePlan) -> str:
    """Return the number of times that the inputs are read."""
    once = bytes_once(plan)
    return f"{plan.bytes_to_read() / max(1, once):.2f} x the {format_size(once)} of the inputs"


def stage_tree(plan: MergePlan) -> list[str]:
    """Return the stages as a tree, the output on top; a stage that is used twice is drawn once.

    ::

        output: slerp of left, right
        ├ left: task_arithmetic of m2, base top
        │ └ top: linear of base, m1
        └ right: ties of m3, base top; its statistics read 391 KiB
          └ top, as above
    """
    plans = {stage.name: stage for stage in plan.stages}
    before = {one["name"]: one["bytes_of_statistics"] for one in stage_values(plan)}
    drawn: set[str] = set()

    def uses(one: MergePlan) -> list[str]:
        references = {index.reference.partition("+")[0] for index in one.inputs}
        return [name for name in plans if name in references]

    def draw(names: Sequence[str], lead: str) -> Iterator[str]:
        for name in names:
            last = name == names[-1]
            if name in drawn:
                yield f"{lead}{'└' if last else '├'} {printable(name, 60)}, as above"
                continue
            drawn.add(name)
            statistics = f"; its statistics read {format_size(before[name])}" if before[name] else ""
            yield f"{lead}{'└' if last else '├'} {printable(name, 60)}: {_merge(plans[name])}{statistics}"
            yield from draw(uses(plans[name]), f"{lead}{' ' if last else '│'} ")

    return [f"output: {_merge(plan)}", *draw(uses(plan), "")]


def _merge(plan: MergePlan) -> str:
    names = [printable(model.reference, 60) for model in plan.models]
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    base = "" if plan.base is None else f", base {printable(plan.base.reference, 60)}"
    return f"{plan.method.name} of {', '.join(names[:_SHOWN])}{more}{base}"
