"""Every way a merge can stop, and the exit code of each.

::

    StreammergeError
    ├── InputError          2   the config or an input file is bad: what, where, the cure
    │   ├── ConfigError     2   the YAML config
    │   ├── ModelError      2   a model directory or one of its files
    │   │   └── NotDownloadedError  2   a model that is nowhere here, and may be on the hub
    │   └── BudgetError     2   the work does not fit the memory that was given
    ├── OutputError         2   the output directory holds something that must not be touched
    ├── WorldError          1   disk full, I/O error: what is finished is kept and resumable
    └── Stopped       130/143   SIGINT or SIGTERM: stopped cleanly, resumable

`StreammergeWarning` is what the Python functions warn with.

`InputError` and its kinds are ValueErrors as well, as other libraries' are; whoever catches those lets ours pass first
(`tests/test_errors.py` looks).

A message is one line: what is wrong, where, and the cure, with both numbers where there are two.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class StreammergeError(Exception):
    """Base of all errors a user can cause or meet; anything else is a bug."""

    exit_code = 1


class StreammergeWarning(UserWarning):
    """Something that a user of the Python functions should know; the command line prints it."""


class InputError(StreammergeError, ValueError):
    """The config or an input is bad; raised before any byte is written wherever possible."""

    exit_code = 2


class ConfigError(InputError):
    """The config is bad; the message begins with the path of the offending key."""


class ModelError(InputError):
    """A model directory or one of its files is malformed, missing or of the wrong kind."""


class NotDownloadedError(ModelError):
    """A model that may be one of the hub, and is in no directory and not in the local cache.

    Parameters
    ----------
    reference
        As the config names it.
    where
        What it was looked for in.
    command
        What downloads it.
    """

    def __init__(self, message: str, reference: str, where: str, command: str) -> None:
        super().__init__(message)
        self.reference, self.where, self.command = reference, where, command

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (str(self), self.reference, self.where, self.command)


class BudgetError(InputError):
    """The merge cannot fit the memory it was given; the message holds both numbers."""


class OutputError(StreammergeError):
    """The output directory is in use, finished with another config, or not ours."""

    exit_code = 2


class WorldError(StreammergeError):
    """The machine failed (disk full, I/O error, input changed while it was read)."""

    exit_code = 1


class Stopped(StreammergeError):
    """A signal asked us to stop; finished chunks are durable and the merge is resumable.

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
    """Turn an error of a user's method into one line that names it and the tensor; ours, and of memory, stay as they are."""
    try:
        yield
    except (StreammergeError, MemoryError):
        raise
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":  # torch's: the engine tries with less
            raise
        text = f"{type(error).__name__}: {printable(error)}" if str(error) else type(error).__name__
        raise InputError(
            f"method {printable(method)!r} failed on tensor {printable(tensor)}: {text} "
            "(STREAMMERGE_DEBUG=1 for the traceback)"
        ) from error


def printable(text: object, limit: int = 400) -> str:
    """Return `text` as one line that is safe on a terminal, at most `limit` characters long.

    What could move the cursor, break the line or turn its direction is escaped.

    >>> printable("a\\nb\\x1b[31m")
    'a\\\\nb\\\\x1b[31m'
    """
    line = str(text)[: limit + 1]
    if not line.isprintable():
        line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)
    return line if len(line) <= limit else line[: limit - 1] + "…"
