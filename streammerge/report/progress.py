"""Show a running merge: a bar on a terminal, plain lines elsewhere, JSON on request."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from streammerge.engine.merge import Summary
from streammerge.errors import printable
from streammerge.events import Event
from streammerge.machine import own_memory
from streammerge.report.pace import Tracker
from streammerge.report.summary import device_lines, opening_line, summary_text, summary_values
from streammerge.report.wrapping import wrapped
from streammerge.units import format_seconds, format_share, format_size, plural

if TYPE_CHECKING:
    from rich.console import Console

_LINE_SECONDS = 10.0
_EVENT_SECONDS = 0.25
"""Seconds between JSON progress events, at least."""
_PROGRESS = ("progress", "import", "hash", "verify", "report")
_READING = {
    "hash": ("hashing", "hashed"),
    "verify": ("verifying", "checked"),
    "report": ("reporting", "measured"),
}
"""Words for events that count bytes read only: the activity, and what is done to the bytes."""
_STOPPING = "stopping after the running pieces…"
_DUMB = ("", "dumb", "unknown")


def _never() -> int | None:
    return None


class Reporter(Protocol):
    """Shows the events of a run."""

    def __call__(self, event: Event) -> None:
        """Show an event."""

    def finish(self, summary: Summary) -> None:
        """Show the summary of a merge."""

    def end(self, values: Mapping[str, Any], text: str) -> None:
        """Show the result of any other run: its values to programs, its text to people."""

    def close(self) -> None:
        """Restore the terminal, however the run ended."""


def make_reporter(
    what: str,
    *,
    quiet: bool = False,
    as_json: bool = False,
    signal_received: Callable[[], int | None] = _never,
    began: float | None = None,
    lines_to: TextIO | None = None,
) -> Reporter:
    """Return the reporter that suits the standard streams.

    Parameters
    ----------
    what
        The activity in one word: ``merging``.
    signal_received
        Function that returns the signal that stopped the run, if any.
    began
        Start of the ``seconds`` in JSON events, by the monotonic clock; default: now.
    lines_to
        Stream for plain lines other than progress; default: stdout.
    """
    if as_json:
        return JsonReporter(signal_received, began)
    # rich draws nothing on a dumb terminal.
    if quiet or not sys.stderr.isatty() or os.environ.get("TERM", "") in _DUMB:
        return LineReporter(quiet, signal_received, lines_to)
    return BarReporter(what, signal_received)


class JsonReporter:
    """One JSON object per event on stdout; docs/use/json.md has the fields."""

    def __init__(
        self, signal_received: Callable[[], int | None] = _never, began: float | None = None
    ) -> None:
        self._signal_received = signal_received
        self._began = time.monotonic() if began is None else began
        self._tracker = Tracker()
        self._next = 0.0
        self._stopping = False

    def __call__(self, event: Event) -> None:
        """Print an event."""
        self._tracker(event.kind, event.values)
        self._tell_stop()
        if event.kind == "plan":
            return  # it comes with the start
        values = dict(event.values)
        if event.kind in ("start", "resume"):
            values |= {key: value for key, value in self._tracker.plan.items() if key != "warnings"}
        elif event.kind in _PROGRESS:
            now = time.monotonic()
            if now < self._next and self._tracker.fraction != 1:
                return
            self._next = now + _EVENT_SECONDS
            values |= self._progress() if event.kind in ("progress", "import") else {}
        self._print(event.kind, values)

    def finish(self, summary: Summary) -> None:
        """Print the summary."""
        self.end(summary_values(summary, self._tracker.plan.get("elements")), "")

    def end(self, values: Mapping[str, Any], text: str) -> None:
        """Print the values."""
        self._print("done", values)

    def close(self) -> None:
        """Report a stop that no event has reported."""
        with contextlib.suppress(OSError):
            self._tell_stop()

    def _tell_stop(self) -> None:
        signum = self._signal_received()
        if signum is not None and not self._stopping:
            self._stopping = True
            self._print("stopping", {"signal": signum})

    def _progress(self) -> dict[str, Any]:
        """Return the additional values of a progress event."""
        tracker = self._tracker
        totals = {
            key: tracker.plan[key] for key in ("bytes_to_read", "bytes_to_write") if key in tracker.plan
        }
        return {
            **totals,
            "fraction": _rounded(tracker.fraction, 6),
            "bytes_per_second": _rounded(tracker.bytes_per_second, 0),
            "seconds_left": _rounded(tracker.seconds_left, 1),
            "resident_bytes": own_memory(),
        }

    def _print(self, kind: str, values: Mapping[str, Any]) -> None:
        told = {"event": kind, "seconds": round(time.monotonic() - self._began, 3)}
        for key, value in values.items():
            told["took_seconds" if key == "seconds" else key] = value
        _tell(json.dumps(told, ensure_ascii=True), sys.stdout)


def _tell(line: str, stream: TextIO) -> None:
    """Print a line; if nobody reads them any more (``| head``) it is left out: the run is for its output, and goes on."""
    with contextlib.suppress(BrokenPipeError):
        print(line, file=stream, flush=True)


class LineReporter:
    """Plain lines, for logs and dumb terminals.

    The opening line and the summary go to stdout; progress goes to stderr every few seconds.
    """

    def __init__(
        self,
        quiet: bool = False,
        signal_received: Callable[[], int | None] = _never,
        lines_to: TextIO | None = None,
    ) -> None:
        self._quiet = quiet
        self._lines_to = lines_to
        self._signal_received = signal_received
        self._tracker = Tracker()
        self._began = self._last = time.monotonic()
        self._stopping = False

    def __call__(self, event: Event) -> None:
        """Print warnings always, and progress every few seconds unless quiet."""
        self._tracker(event.kind, event.values)
        if event.kind == "warning":
            _tell(f"warning: {event.values['message']}", sys.stderr)
        if self._quiet:
            return
        self._tell_stop()
        if event.kind == "compiling":
            self._say(compiling_line(event.values))
        elif event.kind == "gates" and not event.values["layer"]:
            self._say(gates_line(event.values))
        elif event.kind in ("start", "resume"):
            self._began = self._last = time.monotonic()
            if self._tracker.plan:
                for line in (opening_line(self._tracker.plan), *device_lines(self._tracker.plan)):
                    self._say(line)
            if event.kind == "resume":
                self._say(resume_line(event.values, self._tracker.plan))
        elif event.kind == "point":
            self._say(point_line(event.values))
        elif event.kind in _PROGRESS and time.monotonic() - self._last >= _LINE_SECONDS:
            self._last = time.monotonic()
            _tell(progress_line(event, self._tracker, self._last - self._began), sys.stderr)

    def finish(self, summary: Summary) -> None:
        """Print the summary on stdout."""
        self.end({}, summary_text(summary))

    def end(self, values: Mapping[str, Any], text: str) -> None:
        """Print the text on stdout."""
        if not self._quiet:
            _tell(text, sys.stdout)

    def close(self) -> None:
        """Nothing is open."""

    def _tell_stop(self) -> None:
        if self._signal_received() is not None and not self._stopping:
            self._stopping = True
            self._say(_STOPPING)

    def _say(self, text: str) -> None:
        """Print to stdout; if it is full or closed, the end of the run reports that."""
        with contextlib.suppress(OSError, ValueError):
            print(text, file=self._lines_to or sys.stdout, flush=True)


class BarReporter:
    """A live bar on a terminal's stderr, with as many columns as fit.

    Parameters
    ----------
    what
        The activity in one word.
    console
        A terminal; default: stderr.
    """

    def __init__(
        self,
        what: str = "merging",
        signal_received: Callable[[], int | None] = _never,
        console: Console | None = None,
    ) -> None:
        from rich.console import Console

        from streammerge.report.bar import FittingProgress

        self._what = what
        self._signal_received = signal_received
        self._console = console or Console(stderr=True)
        self._progress = FittingProgress(self._console)
        self._task = self._progress.add_task(what, total=None, rate="", read="", written="", memory="")
        self._tracker = Tracker()
        self._next = 0.0
        self._begun = self._stopping = False
        self._progress.start()

    def __call__(self, event: Event) -> None:
        """Update the bar; print warnings and notes above it."""
        tracker, values = self._tracker, event.values
        tracker(event.kind, values)
        self._tell_stop()
        if event.kind == "warning":
            self._say(f"warning: {values['message']}")
        elif event.kind == "compiling":
            self._say(compiling_line(values))
            self._describe("compiling")
        elif event.kind == "compiled":
            self._describe(self._what)
        elif event.kind in ("start", "resume"):
            if tracker.plan:
                for line in (opening_line(tracker.plan), *device_lines(tracker.plan)):
                    self._say(line)
            if event.kind == "resume":
                self._say(resume_line(values, tracker.plan))
            self._describe(self._what)
            self._begin()
        elif event.kind == "gates":
            self._describe(f"gates, layer {event.values['layer'] + 1} of {event.values['layers']}")
        elif event.kind in _PROGRESS:
            self._move(event)
        elif event.kind == "scoring":
            self._describe("scoring")
        elif event.kind == "point":
            self._say(point_line(values))
            self._describe(self._what)
        elif event.kind == "commit":
            self._describe("finishing")

    def _begin(self) -> None:
        """Start the time estimate here, so that the work of earlier runs does not count."""
        self._begun = True
        self._progress.reset(self._task, total=self._tracker.total, completed=int(self._tracker.done))

    def _move(self, event: Event) -> None:
        if not self._begun and self._tracker.total is not None:
            self._begin()
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + 0.1
        if event.kind in _READING:
            self._describe(_READING[event.kind][0])
            self._progress.update(self._task, read=f"read {format_size(event.values['bytes_read'])}")
            return
        tracker, plan = self._tracker, self._tracker.plan
        rate = tracker.bytes_per_second
        self._progress.update(
            self._task,
            completed=tracker.done,
            total=tracker.total,
            rate="" if rate is None else f"{format_size(rate)}/s",
            read=f"read {format_share(event.values['bytes_read'], plan.get('bytes_to_read'))}",
            written=f"wrote {format_share(event.values.get('bytes_written', 0), plan.get('bytes_to_write'))}",
            memory=f"memory {format_share(own_memory(), plan.get('memory'))}",
        )

    def finish(self, summary: Summary) -> None:
        """Remove the bar and print the summary on stdout."""
        self.end({}, summary_text(summary))

    def end(self, values: Mapping[str, Any], text: str) -> None:
        """Remove the bar and print the text on stdout."""
        self.close()
        print(wrapped(text))

    def close(self) -> None:
        """Remove the bar."""
        self._progress.stop()

    def _tell_stop(self) -> None:
        if self._signal_received() is not None and not self._stopping:
            self._stopping = True
            fraction = self._tracker.fraction
            self._say(_STOPPING if fraction is None else f"{_STOPPING} ({100 * fraction:.0f} % done)")
            self._describe("stopping")

    def _describe(self, what: str) -> None:
        self._progress.update(self._task, description="stopping" if self._stopping else what)

    def _say(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False)


def compiling_line(values: Mapping[str, Any]) -> str:
    """Return a line on the kernels that are compiled before a merge."""
    count = values.get("kernels")
    what = "the kernels" if count is None else plural(count, "kernel")
    return f"compiling {what} for this machine, once…"


def gates_line(values: Mapping[str, Any]) -> str:
    """Return a line on the base model that is run over the prompts of a mixture of experts."""
    return (
        f"computing the gates: the prompts pass through {plural(values['layers'], 'layer')}, one at a time…"
    )


def point_line(values: Mapping[str, Any]) -> str:
    """Return a line on a finished point of a sweep."""
    score = "" if values["score"] is None else f"score {values['score']:.6g}"
    return f"{printable(values['point'], 200)}: {score or printable(values['reason'], 200) or 'merged'}"


def resume_line(values: Mapping[str, Any], plan: Mapping[str, Any]) -> str:
    """Return a line on the work that an earlier run finished."""
    return (
        f"resuming: {format_share(values['bytes_done'], plan.get('bytes_to_write'))} of the output are done"
    )


def progress_line(event: Event, tracker: Tracker, elapsed: float) -> str:
    """Return a progress line: elapsed time, percent, bytes, rate, time left."""
    values, plan = event.values, tracker.plan
    parts = [f"after {format_seconds(elapsed)}"]
    if event.kind in _READING:
        _, word = _READING[event.kind]
        return f"{parts[0]}: {word} {format_size(values['bytes_read'])}"
    if tracker.fraction is not None:
        parts.append(f"{100 * tracker.fraction:.0f} %")
    parts.append(f"read {format_share(values['bytes_read'], plan.get('bytes_to_read'))}")
    if "bytes_written" in values:
        parts.append(f"wrote {format_share(values['bytes_written'], plan.get('bytes_to_write'))}")
    if tracker.bytes_per_second is not None:
        parts.append(f"{format_size(tracker.bytes_per_second)}/s")
    if tracker.seconds_left is not None:
        parts.append(f"about {format_seconds(tracker.seconds_left, coarse=True)} left")
    return f"{parts[0]}: {', '.join(parts[1:])}"


def _rounded(number: float | None, digits: int) -> float | None:
    return None if number is None else round(number, digits)
