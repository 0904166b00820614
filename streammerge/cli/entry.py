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
    "merge": ("merging", "Merge models, or continue an interrupted merge."),
    "sweep": ("sweeping", "Merge all combinations of some parameters' values."),
    "average": ("averaging", "Average the checkpoints of a training run."),
    "moe": ("moe", "Make a mixture of experts of dense models."),
    "plan": ("merging", "Show what `merge` would do; write nothing."),
    "verify": ("merging", "Compare an output with its recorded checksums."),
    "status": ("watching", "Show how far a merge is, and who works on it."),
    "compare": ("comparing", "Show how models differ from their base."),
    "extract-lora": ("extracting", "Write the difference of two models as an adapter."),
    "inspect": ("showing", "Show a model's totals and its tensors."),
    "methods": ("showing", "List the merge methods, or explain one."),
    "new": ("showing", "Print a commented config for a method."),
    "fisher": ("estimating", "Estimate, import or show Fisher diagonals."),
    "gram": ("estimating", "Collect or show Gram matrices, for `regmean`."),
    "demo": ("showing", "Merge the small models that ship with the program."),
    "completion": ("showing", "Print a script that completes commands in a shell."),
    "schema": ("showing", "Print the JSON schema of the config, for editors."),
    "warm-up": ("warming", "Compile all kernels in advance."),
}
"""The module of each command, in the order of use, and what a list of them says: whole on a terminal of 80 columns."""


class _Commands(MutableMapping[str, click.Command]):
    """The commands by name; one is imported when it is asked for."""

    def __init__(self) -> None:
        self._more: dict[str, click.Command] = {}

    def __getitem__(self, name: str) -> click.Command:
        if name in self._more:
            return self._more[name]
        module, short = _HOMES[name]
        home = importlib.import_module(f"streammerge.cli.{module}")
        command: click.Command = getattr(home, name.replace("-", "_"))
        command.short_help = short
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
    """A command prints into a pipe that has been closed."""


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
