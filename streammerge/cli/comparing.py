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
    insecure_option,
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
        "streammerge compare math code --base llama --html differ.html    the same as pictures, on one page",
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
@option(
    "--html",
    type=path(dir_okay=False),
    metavar="FILE",
    group=MESSAGES,
    help="Write a page with pictures to FILE; it needs no network.",
)
@quiet_option
@option("--json", "as_json", is_flag=True, group=MESSAGES, help="Print one JSON object on stdout.")
@insecure_option
def compare(
    models: tuple[str, ...],
    base: str | None,
    memory: int | None,
    threads: int | None,
    device: str,
    html: str | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Show how MODELs differ from their base and from each other: norms, cosines, signs.

    Each tensor is read once if it fits in --memory. The numbers are exact and do not depend on --memory.
    """
    stop, signal_received = stop_on_signals()
    import sys
    from contextlib import nullcontext
    from pathlib import Path

    from streammerge.api.comparing import compared
    from streammerge.events import Control
    from streammerge.planning.options import PlanOptions
    from streammerge.report.comparison import comparison_text, comparison_values
    from streammerge.report.pages.comparison import comparison_page
    from streammerge.report.pages.needed import check_page, write_page
    from streammerge.report.progress import make_reporter

    if html is not None:
        check_page("--html", Path(html))
    reporter = make_reporter(
        "comparing", quiet=quiet or as_json, signal_received=signal_received, began=BEGAN, lines_to=sys.stderr
    )
    control = Control(reporter, stop, signal_received)
    options = PlanOptions(memory=memory, threads=threads, device=device, tensors_only=True)
    try:
        found = compared(models, base, options, lambda: nullcontext(control), draws=html is not None)
    finally:
        reporter.close()
    click.echo(json.dumps(comparison_values(found)) if as_json else comparison_text(found))
    if html is not None:  # last, so that a full disk does not lose the numbers
        write_page(Path(html), comparison_page(found))
