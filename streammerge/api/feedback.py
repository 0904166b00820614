"""Feedback to Python callers: a bar or lines, and Python warnings."""

from __future__ import annotations

import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from streammerge.errors import StreammergeWarning
from streammerge.events import Control, Event
from streammerge.report.progress import BarReporter, Reporter, make_reporter

OnEvent = Callable[[Event], None]
_PACKAGE = os.path.join(Path(__file__).parent.parent, "")


@contextmanager
def controlled(
    on_event: OnEvent | None,
    progress: bool,
    what: str,
    stop: threading.Event | None = None,
    signal_received: Callable[[], int | None] = lambda: None,
) -> Iterator[Control]:
    """Lend the `Control` of a run: the receiver of its events, and the means to stop it.

    Parameters
    ----------
    on_event
        The caller's own receiver of all events, instead of any other output.
    progress
        Whether to show progress: a bar on terminals and in notebooks, lines on stderr elsewhere.
    what
        The activity, for the bar.
    stop, signal_received
        The caller's own, if any.
    """
    stop = stop or threading.Event()
    if on_event is not None:
        yield Control(on_event, stop, signal_received)
        return
    reporter = _reporter(what) if progress else None

    def tell(event: Event) -> None:
        if event.kind == "warning":
            warnings.warn(event.values["message"], StreammergeWarning, stacklevel=_callers_level())
        elif reporter is not None:
            reporter(event)

    try:
        yield Control(tell, stop, signal_received)
    finally:
        if reporter is not None:
            reporter.close()


def _reporter(what: str) -> Reporter:
    """Return a bar if it is visible, else lines on stderr; stdout belongs to the caller."""
    return BarReporter(what) if _in_notebook() else make_reporter(what, lines_to=sys.stderr)


def _in_notebook() -> bool:
    """Return whether this is a notebook with the widget that a bar needs."""
    shell = sys.modules.get("IPython")
    kernel = shell is not None and type(shell.get_ipython()).__name__ == "ZMQInteractiveShell"
    return kernel and find_spec("ipywidgets") is not None


def _callers_level() -> int:
    """Return the `stacklevel` of the first frame outside of this package: the line that called it."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        level, frame = level + 1, frame.f_back
    return level
