"""Common parts of options: sizes, sections of a help text, completion of names."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Callable
from typing import Any

import click
from click.shell_completion import CompletionItem

from streammerge.errors import InputError, printable
from streammerge.units import parse_size

MEMORY_AND_SPEED = "Memory and speed"
OUTPUT = "Output"
METHODS = "Methods and randomness"
SCORES = "Scores"
MESSAGES = "Messages"
STORES = "Object stores (s3://, gs://, az://)"
MERGEKIT = "Mergekit compatibility"
_COMPATIBLE = "Accepted under mergekit-yaml's names; a warning lists those without effect"
MOST_SEED = 2**64 - 1
_LEAST_PLAIN_MEMORY = 1 << 20
"""Bytes; a smaller plain number means that the unit was forgotten, since no process is that small."""

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


class Size(click.ParamType):
    """Bytes, as ``512MiB``, ``2GiB``, ``5GB`` or a plain number.

    Parameters
    ----------
    least_plain
        Smaller numbers without a unit are refused: they were probably meant in GiB.
    """

    name = "size"

    def __init__(self, least_plain: int = 0) -> None:
        self._least_plain = least_plain

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the bytes; refuse an invalid size with the option's name."""
        if isinstance(value, int):
            return value
        option = max(param.opts, key=len) if param is not None else "size"
        try:
            nbytes = parse_size(value)
        except InputError as error:
            raise InputError(f"{option}: {error}") from None
        if value.strip().isdecimal() and nbytes < self._least_plain:
            raise InputError(f"{option} {printable(value)} is {nbytes} bytes: did you mean {nbytes}GiB?")
        return nbytes


class Whole(click.ParamType):
    """A whole number within bounds."""

    name = "integer"

    def __init__(self, least: int, most: int | None = None) -> None:
        self._least, self._most = least, most

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the number; refuse an invalid one with the option's name."""
        try:
            number = int(value)
        except ValueError:
            number = None
        if number is not None and self._least <= number and (self._most is None or number <= self._most):
            return number
        span = f"of {self._least} or more" if self._most is None else f"from {self._least} to {self._most}"
        option = max(param.opts, key=len) if param is not None else "number"
        raise InputError(f"{option} {printable(value)!r}: give a whole number {span}")


class GroupedOption(click.Option):
    """An option in a section of its command's help text."""

    def __init__(self, *arguments: Any, group: str = "Options", **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.group = group


class GroupedCommand(click.Command):
    """A command whose help lists options by section."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the sections."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx) if isinstance(parameter, click.Option) else None
            if record is not None:
                sections.setdefault(getattr(parameter, "group", "Options"), []).append(record)
        own = {"Options": sections.pop("Options", [])}  # the help option among them
        ordered = own | sections if len(own["Options"]) > 1 else sections | own
        for name, records in ordered.items():
            with formatter.section(name):
                formatter.write_dl(records)
        compatible = [
            max(p.opts, key=len) for p in self.get_params(ctx) if getattr(p, "group", "") == MERGEKIT
        ]
        if compatible:
            with formatter.section(MERGEKIT):
                names = ", ".join(compatible)
                formatter.write(_filled(f"{_COMPATIBLE}: {names}.", formatter))


def _filled(text: str, formatter: click.HelpFormatter) -> str:
    """Return text wrapped for a section; option names are not broken at hyphens, as click would."""
    indent = " " * formatter.current_indent
    lines = textwrap.wrap(
        text, formatter.width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False
    )
    return "\n".join(lines) + "\n"


def option(*names: str, group: str = "Options", **keywords: Any) -> Decorator:
    """Return the decorator that adds an option to a section of the help text."""
    return click.option(*names, cls=GroupedOption, group=group, **keywords)


def together(*options: Decorator) -> Decorator:
    """Return one decorator for several, in the order of the help text."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for add in reversed(options):
            command = add(command)
        return command

    return decorate


def complete_methods(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Return the names of the methods with this prefix."""
    from streammerge.methods.catalog import load_builtin
    from streammerge.methods.registry import all_methods

    load_builtin()
    found = ((name, method.summary) for name, method in all_methods().items() if name.startswith(incomplete))
    return [CompletionItem(name, help=summary) for name, summary in found]


class _AnyPath(click.Path):
    """A path that shells complete and click does not check: the command reports problems itself."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return value


def path(**keywords: Any) -> click.Path:
    """Return the type of a path; with ``file_okay=False`` shells complete directories only."""
    return _AnyPath(**keywords)


def examples(*lines: str) -> str:
    """Return the examples at the end of a help text."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


memory_option = option(
    "--memory",
    type=Size(_LEAST_PLAIN_MEMORY),
    metavar="SIZE",
    group=MEMORY_AND_SPEED,
    help="Peak resident memory of the whole process, such as 2GiB  [default: half of what is free]",
)
methods_option = option(
    "--methods",
    type=path(dir_okay=False),
    metavar="FILE",
    group=METHODS,
    help="A Python file with your own merge methods (it will be executed).",
)


def _allow_plain_http(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value:
        from streammerge.io.object_stores import INSECURE

        os.environ[INSECURE] = "1"


def _set_connections(ctx: click.Context, param: click.Parameter, value: int | None) -> None:
    if value is not None:
        from streammerge.io.object_file import CONNECTIONS

        os.environ[CONNECTIONS] = str(value)


connections_option = option(
    "--connections",
    type=Whole(1, 256),
    metavar="N",
    expose_value=False,
    callback=_set_connections,
    group=STORES,
    help="Requests in flight when reading, of 8 MiB each  [default: 16]",
)
insecure_option = option(
    "--insecure-endpoint",
    is_flag=True,
    expose_value=False,
    callback=_allow_plain_http,
    group=STORES,
    help="AWS_ENDPOINT_URL may be plain http to a different machine.",
)
json_events_option = option(
    "--json",
    "as_json",
    is_flag=True,
    group=MESSAGES,
    help="Print events as JSON, one object per line, on stdout.",
)
quiet_option = option("--quiet", is_flag=True, group=MESSAGES, help="Print warnings and errors only.")

resource_options = together(
    memory_option,
    option(
        "--threads",
        type=Whole(1, 1024),
        metavar="N",
        group=MEMORY_AND_SPEED,
        help="CPU threads to use  [default: all]",
    ),
    option(
        "--device",
        default="auto",
        show_default=True,
        metavar="NAME",
        group=MEMORY_AND_SPEED,
        help="auto, cpu, cuda or cuda:N.",
    ),
    option(
        "--shard-size",
        type=Size(),
        metavar="SIZE",
        default="5GB",
        show_default=True,
        group=OUTPUT,
        help="Most bytes in one output file.",
    ),
)
planning_options = together(
    resource_options,
    option(
        "--seed",
        type=Whole(0, MOST_SEED),
        metavar="N",
        group=METHODS,
        help="Seed of the random drops  [default: the config's, else 0]",
    ),
    methods_option,
    connections_option,
    insecure_option,
)

max_reads_option = option(
    "--max-reads",
    type=click.FloatRange(1),
    metavar="N",
    default=8.0,
    show_default=True,
    group=MEMORY_AND_SPEED,
    help="Of a config with stages: read at most N times the bytes of its inputs.",
)


class Rate(click.ParamType):
    """A bandwidth: a size, with or without ``/s``."""

    name = "rate"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return bytes per second."""
        if isinstance(value, int):
            return value
        try:
            rate = parse_size(str(value).removesuffix("/s"))
        except InputError as error:
            self.fail(str(error), param, ctx)
        if rate < 1:
            self.fail("at least one byte a second", param, ctx)
        return rate


sharing_options = together(
    option(
        "--workers",
        type=Whole(1, 10_000),
        metavar="N",
        group=MEMORY_AND_SPEED,
        help="Show how N processes share the merge: shards, idle time, what bounds it.",
    ),
    option(
        "--rate",
        type=Rate(),
        metavar="SIZE/s",
        group=MEMORY_AND_SPEED,
        help="With --workers: what each process can read and write.",
    ),
    option(
        "--store-rate",
        type=Rate(),
        metavar="SIZE/s",
        group=MEMORY_AND_SPEED,
        help="With --workers: what the store gives all processes together.",
    ),
)
"""Options of a plan for several processes."""
join_option = option(
    "--join",
    is_flag=True,
    group=OUTPUT,
    help="Share the merge with all processes that run the same command, on any hosts that see OUT: each takes shards.",
)
"""Option of the command whose work several processes may share."""
on_option = option(
    "--on",
    metavar="WHERE[:N]",
    group=OUTPUT,
    help="Start N processes that share the merge, and keep them until it is done: `processes:4` on this host, `ray:4` on a Ray cluster.",
)
"""Option of the command whose work a launcher shares out."""
units_option = option("--units-from-stdin", is_flag=True, hidden=True, group=OUTPUT)
"""Option of the processes that a scheduler starts; see `streammerge.engine.taking.HandedOut`."""
keep_stages_option = option(
    "--keep-stages",
    type=path(file_okay=False),
    metavar="DIR",
    group=OUTPUT,
    help="Of a config with stages: write each stage too, to DIR/NAME; DIR may be a folder of a store.",
)

output_options = together(
    option("--overwrite", is_flag=True, group=OUTPUT, help="Discard what an earlier merge left in OUT."),
    option(
        "--nonfinite",
        type=click.Choice(["error", "warn"]),
        default="error",
        show_default=True,
        group=OUTPUT,
        help="On NaN or infinity, in an input or by overflow: stop, or write and report it.",
    ),
    option(
        "--io",
        type=click.Choice(["direct", "read", "mmap"]),
        default="direct",
        show_default=True,
        group=MEMORY_AND_SPEED,
        help="Read past the page cache, through it, or by memory map.",
    ),
    option(
        "--no-kernels",
        is_flag=True,
        group=MEMORY_AND_SPEED,
        help="Use the torch formulas instead of the compiled kernels: same bits, slower.",
    ),
    option(
        "--hash-inputs",
        is_flag=True,
        group=OUTPUT,
        help="Hash every input file first (reads it once more); a resumed merge then accepts touched or copied files.",
    ),
)
"""Options of all commands that merge."""

writing_options = together(
    output_options,
    option(
        "--profile",
        type=path(dir_okay=False),
        metavar="FILE",
        group=MESSAGES,
        help="Write the time spent in each stage to FILE, as JSON.",
    ),
    option(
        "--report",
        type=path(dir_okay=False),
        metavar="FILE",
        group=MESSAGES,
        help="After the merge, write a page on what the method did to FILE.html; reads the models once more.",
    ),
)
"""Options of the commands that write one output."""


def without(*names: str) -> Callable[[click.Command], click.Command]:
    """Return a decorator of a command that takes away shared options, by parameter name, that mean nothing to it."""

    def remove(command: click.Command) -> click.Command:
        command.params = [param for param in command.params if param.name not in names]
        return command

    return remove
