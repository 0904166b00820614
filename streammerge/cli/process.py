"""The command line as a process: signals, standard streams, one line for an error, the exit code."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

import click

from streammerge.errors import InputError, Stopped, printable
from streammerge.io.object_waiting import listen

BEGAN = time.monotonic()
"""The time when the command started; ``seconds`` of a JSON event counts from it."""
_KINDS = ("config", "model", "budget", "output", "input", "world", "stopped")
"""Kinds of errors, as in docs/use/json.md; subclasses of an error have its kind."""
_STREAMING = ("merge", "sweep", "moe", "import", "compute")
"""Commands whose ``--json`` prints events, an error among them."""


def stop_on_signals() -> tuple[threading.Event, Callable[[], int | None]]:
    """Return an event that SIGINT and SIGTERM set, and a function that returns the first signal received."""
    stop = threading.Event()
    received: list[int] = []

    def on_signal(signum: int, frame: FrameType | None) -> None:
        received.append(signum)
        stop.set()

    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, on_signal)

    def check() -> None:
        if received:
            raise Stopped(received[0])

    listen(_say, check)
    return stop, lambda: received[0] if received else None


def leave_on_signals() -> None:
    """Let SIGINT and SIGTERM end the process immediately, for commands that write nothing."""

    def on_signal(signum: int, frame: FrameType | None) -> None:
        report(InputError("stopped"), 0)
        os._exit(128 + signum)

    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, on_signal)
    listen(_say, lambda: None)


def _say(line: str) -> None:
    """Print a line about a wait."""
    print(f"streammerge: {line}", file=sys.stderr, flush=True)


def open_closed_streams() -> None:
    """Open the null device in place of standard streams that the caller has closed.

    Otherwise the next file opened, perhaps a shard, would receive the messages.
    """
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free descriptor, which is this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(descriptor, "w" if descriptor else "r", closefd=False))  # noqa: SIM115


def report(error: Exception, code: int) -> int:
    """Print an error as one line on stderr, and under ``--json`` as an event too; return its exit code."""
    if os.environ.get("STREAMMERGE_DEBUG") == "1":
        import traceback

        traceback.print_exception(error)
    _report_line(printable(error, 2000), _kind_of(error), code)
    return code


def report_usage(error: click.ClickException) -> int:
    """Print an error in a command's arguments as one line; return the exit code.

    A group that is called without a command shows its help instead.
    """
    ctx = getattr(error, "ctx", None)
    if ctx is not None and isinstance(error, getattr(click.exceptions, "NoArgsIsHelpError", ())):
        click.echo(ctx.get_help())
        return error.exit_code
    message = " ".join(error.format_message().split())
    if ctx is not None:
        message = f"{message.rstrip('.')} (see '{ctx.command_path} --help')"
    _report_line(printable(message, 2000), "usage", error.exit_code)
    return error.exit_code


def _kind_of(error: Exception) -> str:
    """Return an error's kind: ``config``, ``model``, ``budget``, ``output``, ``world``, …

    >>> from streammerge.errors import ConfigError, InputError
    >>> _kind_of(ConfigError("")), _kind_of(InputError(""))
    ('config', 'input')
    """
    names = (kind.__name__.removesuffix("Error").lower() for kind in type(error).__mro__)
    return next((name for name in names if name in _KINDS), "world")


def _report_line(message: str, kind: str, code: int) -> None:
    with contextlib.suppress(OSError):
        print(f"streammerge: {message}", file=sys.stderr, flush=True)
    arguments = sys.argv[1:]
    if code and "--json" in arguments and any(command in arguments[:2] for command in _STREAMING):
        event = {"event": "error", "kind": kind, "message": message, "exit_code": code}
        with contextlib.suppress(OSError):
            print(json.dumps({**event, "seconds": round(time.monotonic() - BEGAN, 3)}), flush=True)


def leave(code: int) -> NoReturn:
    """Exit without a traceback, even if stdout or stderr is full or closed."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # Python flushes once more
        except (OSError, ValueError):
            code = code or 1
            os._exit(code)
    sys.exit(code)
