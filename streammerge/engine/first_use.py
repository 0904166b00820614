"""Compile the kernels of a merge if they are missing."""

from __future__ import annotations

from streammerge.backends.cpu.before_use import compile_groups
from streammerge.backends.cpu.compile import load_kernels
from streammerge.events import Control
from streammerge.planning.needed_kernels import needed_kernels
from streammerge.planning.plan import MergePlan
from streammerge.planning.prepare import is_small


class CannotCompileError(Exception):
    """Kernels cannot be compiled here; the message says why."""


def compile_first(plan: MergePlan, control: Control) -> float:
    """Compile the missing kernels of a plan; return the seconds it took.

    Raises
    ------
    Stopped
        If the caller stops it; it then takes at most a twentieth of a second.
    CannotCompileError
        If compiling fails and the plan needs the kernels.
    """
    if not plan.backend.compiled and is_small(plan):
        return 0.0
    seconds, failure = compile_groups(needed_kernels(plan), control)
    if failure is not None and plan.backend.compiled:
        raise CannotCompileError(failure)
    return seconds


def load_ahead(plan: MergePlan) -> None:
    """Load the kernels of a plan; in a thread of its own while the first chunks are read, since it takes half a second."""
    if plan.backend.compiled:
        load_kernels(needed_kernels(plan))
