"""Compiles kernels before they are used, and tells of it: once on a machine."""

from __future__ import annotations

import time
from collections.abc import Iterable

from streammerge.backends.cpu.compile import ensure_compiled
from streammerge.events import Control, Event
from streammerge.numerics.compiled import kernel_cache, lacking


def compile_groups(wanted: Iterable[str], control: Control) -> tuple[float, str | None]:
    """Compile groups of kernels unless they are; return the seconds it took, and why it failed, if it did.

    Raises
    ------
    Stopped
        If the caller stops it meanwhile, within a twentieth of a second.
    """
    names = lacking(wanted)
    if not names or kernel_cache().directory is None:
        return 0.0, None
    began = time.monotonic()
    control.emit(Event("compiling", {"kernels": len(names), "names": names}))
    failure = ensure_compiled(names, control.check)
    seconds = time.monotonic() - began
    control.emit(Event("compiled", {"kernels": len(names), "seconds": round(seconds, 3)}))
    return seconds, failure
