"""Lines for the user at the end of a merge: densities, floors, tensors that differ, non-finite values."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from streammerge.dtypes import itemsize
from streammerge.engine.nonfinite import trace
from streammerge.errors import printable
from streammerge.io.buffer_pool import Bytes
from streammerge.io.reader import Reader
from streammerge.output.adapter_cut import Residual
from streammerge.output.journal import Receipt
from streammerge.planning.plan import MergePlan
from streammerge.records import dataclass
from streammerge.units import plural

_FLOOR_WARNING = 0.1
"""Fraction of elements decided by a Fisher floor above which a mistake is likely."""


@dataclass(frozen=True)
class Density:
    """The part of one model's task vector that survived trims and drops."""

    model: str
    """The model's name in the config."""
    place: int
    """Index among the config's models, from 0."""
    kept: int
    """Number of entries that survived."""
    of: int
    """Number of entries of the task vector."""
    density: float
    """`survived` / `entries`."""


def named_densities(plan: MergePlan, entries: Sequence[Mapping[str, Any]]) -> tuple[Density, ...]:
    """Return a manifest's densities with the models' names in the config."""
    return tuple(
        Density(plan.models[place].reference, place, entry["kept"], entry["of"], entry["density"])
        for entry in entries
        if 0 <= (place := entry["model"]) < len(plan.models)
    )


def differing(plan: MergePlan, receipts: Sequence[Receipt]) -> Iterator[str]:
    """Yield a line for each integer tensor on which the models disagree."""
    for ordinal in sorted({receipt.job for receipt in receipts if receipt.differs}):
        job = plan.jobs[ordinal]
        yield (
            f"tensor {printable(job.name)} ({job.dtype}) differs between the models; "
            f"taken from {printable(plan.template.reference)}"
        )


def not_finite_lines(
    plan: MergePlan,
    reader: Reader,
    receipts: Sequence[Receipt],
    output: Callable[[int, int, int], Bytes],
    label: str = "",
) -> Iterator[str]:
    """Yield lines on the origin of NaN and infinity in each tensor.

    Parameters
    ----------
    output
        Returns bytes of a job's merged tensor.
    label
        The name of the output, if it is one of several.
    """
    for ordinal in sorted({receipt.job for receipt in receipts if receipt.not_finite}):
        job = plan.jobs[ordinal]
        width = itemsize(job.dtype)

        def merged(first: int, last: int, ordinal: int = ordinal, width: int = width) -> Bytes:
            return output(ordinal, first * width, last * width)

        yield from trace(reader, job, 0, job.n_elements, merged).warnings(label)


def of_floor(floored: Mapping[str, Any] | None) -> Iterator[str]:
    """Yield a line if a Fisher floor decided many elements."""
    if floored is not None and floored["fraction"] > _FLOOR_WARNING:
        yield (
            f"the floor decided {100 * floored['fraction']:.1f} % of the elements, so the models' diagonals hardly count: "
            "use a smaller `floor`, or `floor_units: rms`"
        )


def of_energy(plan: MergePlan, residuals: Sequence[Residual]) -> Iterator[str]:
    """Yield a line if modules of an adapter have less of their squared norm than was asked, because of the highest rank."""
    asked = plan.config.lora
    if asked is None or asked.energy is None:
        return
    short = [
        one for one in residuals if one.rank >= asked.max_rank and 1 - one.residual**2 < asked.energy - 1e-9
    ]
    if short:
        worst = max(short, key=lambda one: one.residual)
        yield (
            f"{plural(len(short), 'module')} of the adapter have less than {asked.energy:.3g} of their squared norm at rank "
            f"{asked.max_rank} (the least: {printable(worst.module)}, {1 - worst.residual**2:.3g}): raise max_rank (--max-rank)"
        )
