"""The command group, and `main`: every error becomes one line and its exit code."""

from __future__ import annotations

import contextlib
import errno
import gc
import importlib
import os
import signal
import sys
from collections.abc import Iterator, MutableMapping
from typing import Any, NoReturn

import click

from streammerge.cli.process import leave, open_closed_streams, report, report_usage
from streammerge.errors import InputError, StreammergeError, WorldError
from streammerge.version import __version__

_HOMES = {
    "merge": "merging",
    "sweep": "sweeping",
    "average": "averaging",
    "moe": "moe",
    "plan": "merging",
    "verify": "merging",
    "status": "watching",
    "compare": "comparing",
    "extract-lora": "extracting",
    "inspect": "showing",
    "methods": "showing",
    "new": "showing",
    "fisher": "estimating",
    "gram": "estimating",
    "demo": "showing",
    "completion": "showing",
    "schema": "showing",
    "warm-up": "warming",
}
"""The module of each command, in the order of use."""


class _Commands(MutableMapping[str, click.Command]):
    """The commands by name; one is imported when it is asked for."""

    def __init__(self) -> None:
        self._more: dict[str, click.Command] = {}

    def __getitem__(self, name: str) -> click.Command:
        if name in self._more:
            return self._more[name]
        home = importlib.import_module(f"streammerge.cli.{_HOMES[name]}")
        command: click.Command = getattr(home, name.replace("-", "_"))
        return command

    def __setitem__(self, name: str, command: click.Command) -> None:
        self._more[name] = command

    def __delitem__(self, name: str) -> None:
        del self._more[name]

    def __iter__(self) -> Iterator[str]:
        return iter({**_HOMES, **self._more})

    def __len__(self) -> int:
        return len({**_HOMES, **self._more})


class _NobodyReadsError(Exception):
    """What a command prints goes into a pipe that has been closed."""


class _Group(click.Group):
    """A group that lists its commands in the order of use, and ends as other programs do where nobody reads on."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:  # click would make an error of it
            raise _NobodyReadsError from None

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


@click.group(
    cls=_Group,
    commands=_Commands(),
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="\b\nExamples:\n"
    "  streammerge new ties > ties.yml       a commented config to start from\n"
    "  streammerge plan ties.yml merged      memory, disk and time it will take\n"
    "  streammerge merge ties.yml merged     merge; run the same line again to resume\n",
)
@click.version_option(__version__, "-V", "--version", prog_name="streammerge")
def cli() -> None:
    """Merge neural-network checkpoints larger than memory: streaming, exact, reproducible, resumable."""


def _start_light() -> None:
    """Have imports neither searched for garbage, which they make none of, nor start the threads of numpy's BLAS.

    Nothing here multiplies matrices by numpy, and a thread for each CPU takes as long to start as half of numpy. Elsewhere
    than on x86 torch reads the same variable.
    """
    gc.set_threshold(20_000, 20, 50)
    if os.uname().machine == "x86_64":
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


def main() -> NoReturn:
    """Run the command line; turn every error into one line and its exit code."""
    code = 0
    _start_light()
    open_closed_streams()
    try:
        cli.main(prog_name="streammerge", standalone_mode=False)
        with contextlib.suppress(BrokenPipeError):  # a merge has done what it should
            sys.stdout.flush()
    except click.exceptions.Abort:
        code = 130
    except click.ClickException as error:
        code = report_usage(error)
    except StreammergeError as error:
        code = report(error, error.exit_code)
    except _NobodyReadsError:
        code = 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        code = report(InputError("stopped"), 130)
    except OSError as error:
        full = error.filename is None and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        what = "standard output cannot be written" if full else type(error).__name__
        code = report(WorldError(f"{what}: {error.strerror if full else error}"), 1)
    except MemoryError as error:
        code = report(WorldError(f"{type(error).__name__}: {error}"), 1)
    leave(code)
