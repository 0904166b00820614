"""A merge on a machine where its kernels were never compiled: what serves it best, and compiling them."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import replace

from streammerge.backends.cpu.compile import ensure_compiled
from streammerge.engine.needed_kernels import needed_kernels
from streammerge.engine.telling import Event
from streammerge.errors import BudgetError, Stopped
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


def compile_first(
    plan: MergePlan,
    emit: Callable[[Event], None],
    stop: threading.Event | None,
    signal_received: Callable[[], int | None],
) -> float:
    """Compile what a plan needs and is not compiled; return the seconds it took.

    Raises
    ------
    Stopped
        If `stop` is set meanwhile, within a twentieth of a second.
    CannotCompileError
        If that fails and the plan cannot do without.
    """
    if plan.torch_only and _is_small(plan):
        return 0.0
    seconds, failure = compile_groups(needed_kernels(plan), emit, stop, signal_received)
    if failure is not None and not plan.torch_only:
        raise CannotCompileError(failure)
    return seconds


def compile_groups(
    wanted: Iterable[str],
    emit: Callable[[Event], None],
    stop: threading.Event | None,
    signal_received: Callable[[], int | None],
) -> tuple[float, str | None]:
    """Compile groups of kernels unless they are; return the seconds it took, and why it failed, if it did."""
    names = lacking(wanted)
    if not names or kernel_cache().directory is None:
        return 0.0, None

    def check_stop() -> None:
        if stop is not None and stop.is_set():
            raise Stopped(signal_received() or signal.SIGTERM)

    began = time.monotonic()
    emit(Event("compiling", {"kernels": len(names), "names": names}))
    failure = ensure_compiled(names, check_stop)
    seconds = time.monotonic() - began
    emit(Event("compiled", {"kernels": len(names), "seconds": round(seconds, 3)}))
    return seconds, failure


def _is_small(plan: MergePlan) -> bool:
    return sum(index.nbytes for index in plan.inputs) < WORTH_COMPILING
