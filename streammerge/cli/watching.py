"""The command that shows how far a merge is."""

from __future__ import annotations

import json

import click

from streammerge.cli.options import MESSAGES, GroupedCommand, examples, option, path


@click.command(
    cls=GroupedCommand,
    epilog=examples(
        "streammerge status merged            how far the merge is, and who works on it",
        "watch streammerge status merged      again every two seconds",
    ),
)
@click.argument("out", type=path())
@option("--json", "as_json", is_flag=True, group=MESSAGES, help="Print the status as JSON.")
def status(out: str, as_json: bool) -> None:
    """Show how far a merge into OUT is, and which processes work on it, from any host that sees OUT.

    Nothing is changed, and nobody is disturbed.
    """
    from streammerge.io.volumes import as_path
    from streammerge.output.status import status_of
    from streammerge.report.status import status_text, status_values

    found = status_of(as_path(out))
    click.echo(json.dumps(status_values(found)) if as_json else status_text(found))
