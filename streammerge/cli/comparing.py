"""The command that measures how models differ."""

from __future__ import annotations

import json

import click

from streammerge.cli.options import (
    MEMORY_AND_SPEED,
    MESSAGES,
    GroupedCommand,
    Whole,
    examples,
    memory_option,
    option,
    path,
    quiet_option,
)
from streammerge.cli.process import BEGAN, stop_on_signals


@click.command(
    cls=GroupedCommand,
    epilog=examples(
        "streammerge compare math code --base llama            norms, cosines and signs of two fine-tunes",
        "streammerge compare merged --base llama --json        every layer and tensor, as JSON",
    ),
)
@click.argument("models", nargs=-1, required=True, type=path())
@option(
    "--base",
    type=path(),
    metavar="MODEL",
    help="Model that they were fine-tuned from  [default: the first MODEL]",
)
@memory_option
@option(
    "--threads",
    type=Whole(1, 1024),
    metavar="N",
    group=MEMORY_AND_SPEED,
    help="CPU threads to use  [default: all]",
)
@option(
    "--device",
    default="auto",
    show_default=True,
    metavar="NAME",
    group=MEMORY_AND_SPEED,
    help="auto, cpu, cuda or cuda:N.",
)
@quiet_option
@option("--json", "as_json", is_flag=True, group=MESSAGES, help="Print one JSON object on stdout.")
def compare(
    models: tuple[str, ...],
    base: str | None,
    memory: int | None,
    threads: int | None,
    device: str,
    quiet: bool,
    as_json: bool,
) -> None:
    """Show how MODELs differ from their base and from each other: norms, cosines, signs.

    Each tensor is read once if it fits in --memory. The numbers are exact and do not depend on --memory.
    """
    stop, signal_received = stop_on_signals()
    import sys

    from streammerge.api.comparing import compare as measure_difference
    from streammerge.report.comparison import comparison_text, comparison_values
    from streammerge.report.progress import make_reporter

    reporter = make_reporter(
        "comparing", quiet=quiet or as_json, signal_received=signal_received, began=BEGAN, lines_to=sys.stderr
    )
    try:
        found = measure_difference(
            models,
            base,
            memory=memory,
            threads=threads,
            device=device,
            on_event=reporter,
            stop=stop,
            signal_received=signal_received,
        )
    finally:
        reporter.close()
    click.echo(json.dumps(comparison_values(found)) if as_json else comparison_text(found))
