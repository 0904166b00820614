"""`merge`: from a config to a finished directory."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

from streammerge.api.deciding import ConfigLike, plan
from streammerge.engine.first_use import SLOWER, CannotCompileError
from streammerge.engine.reader import Backend
from streammerge.engine.session import Event, NonFinite, Options, Summary, execute
from streammerge.engine.telling import warning
from streammerge.errors import InputError, printable
from streammerge.report.card import model_card


def merge(
    config: ConfigLike,
    out: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    device: str = "auto",
    io: Backend = "direct",
    profile: str | os.PathLike[str] | None = None,
    nonfinite: NonFinite = "error",
    hash_inputs: bool = False,
    on_event: Callable[[Event], None] = lambda event: None,
    stop: threading.Event | None = None,
    signal_received: Callable[[], int | None] = lambda: None,
    **options: Any,
) -> Summary:
    """Merge into the directory `out`; run again after an interruption, it continues.

    Parameters
    ----------
    overwrite
        Discard what an earlier merge left in `out`.
    io
        ``direct``: past the page cache, except for what lies in it; ``read``: through it; ``mmap``: reads are
        copies out of a memory map.
    profile
        A JSON file to write: the seconds of every stage, and so what bounded the run.
    nonfinite
        ``error``: a NaN or an infinity, of an input or by overflow, stops the merge; ``warn``: it is written, at its own
        element alone, and reported.
    hash_inputs
        Hash every input file before the first byte, one more read of it: run again, the merge then knows a file that was
        touched or copied from one that changed. The manifest records the hashes.
    on_event
        Called from the calling thread with progress, warnings and the like.
    **options
        Those of `plan`.

    Raises
    ------
    StreammergeError
        See `streammerge.errors`.
    """
    if io not in get_args(Backend):
        raise InputError(f"io {printable(io)!r} is none of {', '.join(get_args(Backend))}")
    decided = plan(config, device=device, **options)
    if nonfinite not in get_args(NonFinite):
        raise InputError(f"nonfinite {printable(nonfinite)!r} is none of {', '.join(get_args(NonFinite))}")
    how = Options(overwrite, io, Path(profile) if profile else None, nonfinite, hash_inputs)
    try:
        return execute(decided, Path(out), how, on_event, model_card, stop, signal_received)
    except CannotCompileError as error:
        on_event(warning(SLOWER.format(error)))
        decided = plan(config, device=device, **{**options, "kernels": False})
    return execute(decided, Path(out), how, on_event, model_card, stop, signal_received)
