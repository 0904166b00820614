"""A merge on a machine where its kernels were never compiled: what serves it best, and compiling them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from streammerge.backends.cpu.before_use import compile_groups
from streammerge.engine.needed_kernels import needed_kernels
from streammerge.errors import BudgetError
from streammerge.events import Control
from streammerge.numerics.compiled import NOWHERE, kernel_cache, lacking
from streammerge.planning.plan import MergePlan

WORTH_COMPILING = 200_000_000
"""Bytes of inputs; torch has merged less than this before the kernels are compiled."""
SLOWER = "the compiled kernels cannot be used ({}): merging through torch, the same bits at a fraction of the speed"


def from_cold(plan: MergePlan, in_torch: Callable[[], MergePlan]) -> MergePlan:
    """Return the plan, or where its kernels are not compiled and not worth it, the same one through torch.

    Parameters
    ----------
    in_torch
        Makes that one.
    """
    if not lacking(needed_kernels(plan)):
        return plan
    cache = kernel_cache()
    if cache.directory is not None and not _is_small(plan):
        return plan
    try:
        other = in_torch()
    except BudgetError:  # torch takes more memory
        return plan
    if cache.directory is not None:
        return other
    note = SLOWER.format(NOWHERE.format("; ".join(cache.refused)))
    return replace(other, warnings=(note, *other.warnings))


class CannotCompileError(Exception):
    """Kernels cannot be compiled here; the message says why."""


def compile_first(plan: MergePlan, control: Control) -> float:
    """Compile what a plan needs and is not compiled; return the seconds it took.

    Raises
    ------
    Stopped
        If the caller stops it meanwhile, within a twentieth of a second.
    CannotCompileError
        If that fails and the plan cannot do without.
    """
    if plan.torch_only and _is_small(plan):
        return 0.0
    seconds, failure = compile_groups(needed_kernels(plan), control)
    if failure is not None and not plan.torch_only:
        raise CannotCompileError(failure)
    return seconds


def _is_small(plan: MergePlan) -> bool:
    return sum(index.nbytes for index in plan.inputs) < WORTH_COMPILING
