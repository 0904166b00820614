"""Compile kernels before their first use on a machine, and report it."""

from __future__ import annotations

import time
from collections.abc import Iterable

from streammerge.backends.cpu.compile import ensure_compiled
from streammerge.events import Control, Event
from streammerge.numerics.compiled import kernel_cache, lacking


def compile_groups(wanted: Iterable[str], control: Control) -> tuple[float, str | None]:
    """Compile groups of kernels that are not compiled yet; return the seconds and, if it failed, the reason.

    Raises
    ------
    Stopped
        If the caller stops it; it then takes at most a twentieth of a second.
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
