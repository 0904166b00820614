"""Refuse whole-model statistics that differ between tensors."""

from __future__ import annotations

from collections.abc import Sequence

from streammerge.algebra.extent import Extent
from streammerge.errors import ConfigError, printable
from streammerge.methods.registry import Method
from streammerge.planning.job import Job
from streammerge.planning.needs import likeness, tensor_context_of


def check_uniform(jobs: Sequence[Job], method: Method) -> None:
    """Refuse whole-model statistics that differ between tensors, since each has one value for all."""
    first: list[tuple[object, ...]] | None = None
    members: set[tuple[int, ...]] = set()
    checked: set[tuple[object, ...]] = set()
    for job in jobs:
        key = (job.members, *likeness(job, method))
        if job.kind != "merge" or key in checked:
            continue
        checked.add(key)
        try:
            rounds = method.rounds(tensor_context_of(job), job.parameters)
        except ConfigError as error:
            raise ConfigError(f"tensor {printable(job.name, 120)}: {error}") from None
        asked: list[tuple[object, ...]] = [
            r.common for statistics in rounds for r in statistics if r.extent == Extent.MODEL
        ]
        if asked:
            members.add(job.members)
        if len(members) > 1:
            raise ConfigError(
                f"tensor {printable(job.name, 120)}: this tensor comes from a different set of models; `trim_scope: model` and "
                "norms of Fisher diagonals are statistics of whole models: name the same models in every slice, "
                "and write `tensors: common` in place of `any`"
            )
        if first is not None and asked != first and method.looks_at_names:
            raise ConfigError(
                f"tensor {printable(job.name, 120)}: {method.name!r} asks for whole-model statistics that differ from those "
                "of other tensors: ask for the same statistics for every tensor"
            )
        if first is not None and asked != first:
            raise ConfigError(
                f"tensor {printable(job.name, 120)}: the density differs from other tensors', but `trim_scope: model` "
                "trims the model as a whole: give one density per model"
            )
        first = asked
