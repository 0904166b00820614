"""Every way a merge can stop, and the exit code of each.

::

    StreammergeError
    ├── InputError          2   the config or an input file is bad: what, where, the cure
    │   ├── ConfigError     2   the YAML config
    │   ├── ModelError      2   a model directory or one of its files
    │   │   ├── MergedOverflowError  2   merged values that the output's dtype cannot hold
    │   │   └── NotDownloadedError  2   a model that is not on this machine, and may be on the hub
    │   └── BudgetError     2   the work does not fit the memory that was given
    ├── OutputError         2   the output directory holds something that must not be touched
    ├── WorldError          1   disk full, I/O error: finished work is kept, and the merge can be resumed
    └── Stopped       130/143   SIGINT or SIGTERM: stopped cleanly, resumable

`StreammergeWarning` is what the Python functions warn with.

`InputError` and its kinds are also ValueErrors, as in other libraries. Code that catches ValueError must let `InputError`
pass first (`tests/test_errors.py` checks this).

A message is one line: what is wrong, where, and the cure, with both numbers if there are two.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class StreammergeError(Exception):
    """Base of all errors a user can cause or meet; anything else is a bug."""

    exit_code = 1


class StreammergeWarning(UserWarning):
    """A warning from the Python functions; the command line prints it."""


class InputError(StreammergeError, ValueError):
    """The config or an input is bad; raised before any byte is written wherever possible."""

    exit_code = 2


class ConfigError(InputError):
    """The config is bad; the message begins with the path of the offending key."""


class ModelError(InputError):
    """A model directory or one of its files is malformed, missing or of the wrong kind."""


class MergedOverflowError(ModelError):
    """Merged values that the output's dtype cannot hold.

    Parameters
    ----------
    output
        The name of their output among several that are made from the same reads; empty for a single one.
    """

    def __init__(self, message: str, output: str = "") -> None:
        super().__init__(message)
        self.output = output


class NotDownloadedError(ModelError):
    """A model that is neither a local directory nor in the local cache, and may be on the hub.

    Parameters
    ----------
    reference
        The model's name in the config.
    where
        The cache that was searched.
    command
        The command that downloads it.
    """

    def __init__(self, message: str, reference: str, where: str, command: str) -> None:
        super().__init__(message)
        self.reference, self.where, self.command = reference, where, command

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (str(self), self.reference, self.where, self.command)


class BudgetError(InputError):
    """The merge cannot fit the memory it was given; the message holds both numbers.

    Parameters
    ----------
    least
        Bytes of ``--memory`` that the message asks for; None: it asks for something else.
    """

    def __init__(self, message: str, least: int | None = None) -> None:
        super().__init__(message)
        self.least = least


class OutputError(StreammergeError):
    """The output directory is in use, holds a different merge, or holds foreign files."""

    exit_code = 2


class WorldError(StreammergeError):
    """The machine failed (disk full, I/O error, input changed while it was read)."""

    exit_code = 1


class Stopped(StreammergeError):
    """A signal stopped the run; finished work is durable and the merge can be resumed.

    Parameters
    ----------
    signum
        The signal's number; the exit code is 128 + signum.
    """

    def __init__(self, signum: int) -> None:
        super().__init__("stopped; run the same command again to continue")
        self.exit_code = 128 + signum


@contextmanager
def blamed_on(method: str, tensor: str) -> Iterator[None]:
    """Convert an error in a user's method to one line with method and tensor; our errors and memory errors pass through."""
    try:
        yield
    except (StreammergeError, MemoryError):
        raise
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":  # torch's: the engine retries with smaller blocks
            raise
        text = f"{type(error).__name__}: {printable(error)}" if str(error) else type(error).__name__
        raise InputError(
            f"method {printable(method)!r} failed on tensor {printable(tensor)}: {text} "
            "(STREAMMERGE_DEBUG=1 for the traceback)"
        ) from error


def printable(text: object, limit: int = 400) -> str:
    """Return `text` as one line that is safe on a terminal, at most `limit` characters long.

    Characters that could move the cursor, break the line or change its direction are escaped.

    >>> printable("a\\nb\\x1b[31m")
    'a\\\\nb\\\\x1b[31m'
    """
    line = str(text)[: limit + 1]
    if not line.isprintable():
        line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)
    return line if len(line) <= limit else line[: limit - 1] + "…"
