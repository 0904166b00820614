"""The command that merges every point of a grid of parameters."""

from __future__ import annotations

from typing import Any

import click

from streammerge.cli.launching import not_shared
from streammerge.cli.options import (
    OUTPUT,
    SCORES,
    GroupedCommand,
    Size,
    examples,
    json_events_option,
    max_reads_option,
    option,
    output_options,
    path,
    planning_options,
    quiet_option,
)
from streammerge.cli.process import BEGAN, stop_on_signals
from streammerge.errors import InputError, WorldError, printable
from streammerge.units import plural


class _Keep(click.ParamType):
    """``all``, ``best`` or a number of points."""

    name = "keep"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value in ("all", "best") or isinstance(value, int):
            return value
        if not (value.isascii() and value.isdigit()) or int(value) < 1:
            raise InputError(f"--keep {printable(value)!r}: give all, best, or a whole number of 1 or more")
        return int(value)


@click.command(
    cls=GroupedCommand,
    epilog=examples(
        "streammerge sweep ties.yml swept                                     every point",
        "streammerge sweep ties.yml swept --score 'python score.py {}'        and which is best",
        "streammerge sweep ties.yml swept --score './score {}' --keep best    keep only that one",
    ),
)
@click.argument("config", type=path())
@click.argument("out", type=path())
@option(
    "--score",
    metavar="COMMAND",
    group=SCORES,
    help="Shell command to run for each finished point, {} being its directory; the last line that it prints is a "
    "number, higher is better.",
)
@option(
    "--score-timeout",
    type=float,
    metavar="SECONDS",
    group=SCORES,
    help="End the command after so long; the point then has no score  [default: never]",
)
@option(
    "--keep",
    type=_Keep(),
    default="all",
    show_default=True,
    metavar="all|best|N",
    group=SCORES,
    help="Points to keep; the others are removed once they are scored.",
)
@option(
    "--disk",
    type=Size(1 << 20),
    metavar="SIZE",
    group=OUTPUT,
    help="Most bytes of all points together, such as 200GB  [default: what is free]",
)
@planning_options
@max_reads_option
@output_options
@not_shared(
    "a sweep makes all points from one read, in one process: share a single point by `merge --join`, with its values in the config"
)
@quiet_option
@json_events_option
def sweep(config: str, out: str, quiet: bool, as_json: bool, no_kernels: bool, **options: Any) -> None:
    """Merge every combination of the values under `sweep:` in CONFIG, each into a directory of OUT. Running it again resumes.

    Every point has the bytes that `merge` gives with its values. The inputs are read once for as many points as --memory
    and the disk have room for. OUT/sweep.csv has the values, the score and the seconds of each point.
    """
    stop, signal_received = stop_on_signals()
    from streammerge.api import sweep as run
    from streammerge.report.progress import make_reporter
    from streammerge.report.sweep import sweep_text, sweep_values

    reporter = make_reporter(
        "sweeping", quiet=quiet, as_json=as_json, signal_received=signal_received, began=BEGAN
    )
    try:
        result = run(
            config,
            out,
            on_event=reporter,
            stop=stop,
            kernels=False if no_kernels else None,
            signal_received=signal_received,
            **options,
        )
    finally:
        reporter.close()
    reporter.end(
        {"out": out, "seconds": result.seconds, **sweep_values(result.points, result.best)},
        sweep_text(result.points, result.best, out),
    )
    scored = options["score"] is not None
    if failed := [name for name in result.failed if scored or result.points[name].seconds is None]:
        first = result.points[failed[0]]
        lack = "could not be merged" if first.seconds is None else "have no score"
        cure = "" if first.seconds is None else ": mend the command and run this one again"
        raise WorldError(
            f"{len(failed)} of {plural(len(result.points), 'point')} {lack}; {printable(failed[0], 200)}: "
            f"{printable(first.reason)}{cure}"
        )
