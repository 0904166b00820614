"""The points of a sweep as plans, and how many of them the disk has room for at a time."""

from __future__ import annotations

from streammerge.config.schema import MergeConfig
from streammerge.config.wording import refuse, shown, suggestion
from streammerge.errors import InputError
from streammerge.methods.registry import Method
from streammerge.planning.plan import MergePlan
from streammerge.planning.resolve.parameters import PRESET
from streammerge.records import dataclass
from streammerge.units import format_size, plural

_MADE_NBYTES = 1 << 14
"""Bytes of the model card, and of the manifest without its tensors."""
_ENTRY_NBYTES = 600
"""Bytes per tensor, in the manifest and in an index."""


def check_swept(config: MergeConfig, method: Method) -> None:
    """Refuse a sweep over anything that is not a parameter of the method.

    Raises
    ------
    ConfigError
        If a parameter is unknown; the message names the nearest.
    """
    known = [*method.parameters, *([PRESET] if method.presets else [])]
    for one in config.sweep:
        if one.name not in known:
            what = f"{shown(one.name)} is not a parameter of method {method.name!r}"
            refuse(
                one.path, f"{what} ({suggestion(one.name, known)})" if known else f"{what}, which has none"
            )


def nbytes_of_point(plan: MergePlan) -> int:
    """Return an upper bound of the bytes of a point's output: shards, copied files, and files that are made."""
    copied = sum(stamp.nbytes for stamp in plan.beside.files.values())
    changed = 0 if plan.tokenizer is None else sum(map(len, plan.tokenizer.changed.values()))
    made = changed + 2 * len(plan.config.text) + _MADE_NBYTES + _ENTRY_NBYTES * len(plan.jobs)
    return plan.layout.nbytes + copied + made


@dataclass(frozen=True)
class Room:
    """The disk space of a sweep, in points."""

    points: int
    """Number of points of the sweep."""
    nbytes: int
    """Bytes of one point."""
    keep: int | None
    """Number of points that are kept at the end; None: all."""
    disk: int | None
    """Bytes that all outputs may take together; None: what is free."""

    @property
    def least(self) -> int:
        """The least number of points that the disk must hold at a time: those that are kept, and a new one."""
        return self.points if self.keep is None else min(self.points, self.keep + 1)

    def check(self) -> None:
        """Refuse a sweep for which the given disk space is too small, before anything is written.

        Raises
        ------
        InputError
            With both numbers.
        """
        needed = self.least * self.nbytes
        if self.disk is not None and needed > self.disk:
            what = f"{plural(self.points, 'point')} of {format_size(self.nbytes)}"
            if self.keep is not None and self.least < self.points:
                what = f"{plural(self.keep, 'point')} kept and a new one, of {format_size(self.nbytes)} each,"
            cure = "give more, or --score with a smaller --keep" if self.keep is None else "give more"
            raise InputError(
                f"--disk {format_size(self.disk)} is too small: {what} need {format_size(needed)}: {cure}"
            )

    def most_at_once(self, held: int, free: int, allocated: int) -> int:
        """Return how many points may be merged next, at least one.

        Parameters
        ----------
        held
            Number of finished points on the disk.
        free
            Bytes that are free.
        allocated
            Bytes that unfinished points have already.
        """
        by_space = (free + allocated) // max(1, self.nbytes)
        by_limit = by_space if self.disk is None else self.disk // max(1, self.nbytes) - held
        return max(1, min(by_space, by_limit))
