"""The command that makes a mixture of experts."""

from __future__ import annotations

from typing import Any

import click

from streammerge.cli.launching import not_shared
from streammerge.cli.mergekit_options import mergekit_options, translate
from streammerge.cli.merging import run, show_plan
from streammerge.cli.options import (
    MERGEKIT,
    MESSAGES,
    METHODS,
    MOST_SEED,
    GroupedCommand,
    Whole,
    examples,
    json_events_option,
    option,
    path,
    quiet_option,
    resource_options,
    together,
    without,
    writing_options,
)
from streammerge.errors import ConfigError, printable

_PLANNED = ("memory", "threads", "device", "shard_size", "seed")
"""Options that a plan has too."""
_NEEDLESS = {
    "load_in_4bit": "one layer of the base is in memory at a time, in float32",
    "load_in_8bit": "one layer of the base is in memory at a time, in float32",
    "i_understand_this_is_not_useful_without_training": "a warning names such mixtures",
}
"""Options of mergekit-moe without effect, with the reason."""
_moe_options = together(
    *(
        option(f"--{name.replace('_', '-')}", name, is_flag=True, hidden=True, group=MERGEKIT)
        for name in _NEEDLESS
    )
)


@without("report")  # its pictures are those of tensors that several models share
@click.command(
    cls=GroupedCommand,
    epilog=examples(
        "streammerge moe moe.yml mixture                    make it, or continue after an interruption",
        "streammerge moe moe.yml mixture --dry-run          what it reads, writes and needs",
        "streammerge moe moe.yml mixture --memory 2GiB      never more resident memory than this",
        "streammerge verify mixture --against moe.yml       a sample of it computed once more",
    ),
)
@click.argument("config", type=path())
@click.argument("out", type=path())
@option("--dry-run", is_flag=True, group=MESSAGES, help="Show what would be done; write nothing.")
@resource_options
@option(
    "--seed",
    type=Whole(0, MOST_SEED),
    metavar="N",
    group=METHODS,
    help="Seed of random gates and noise  [default: the config's, else 0]",
)
@writing_options
@not_shared("`streammerge merge CONFIG OUT` makes the same mixture and takes it")
@quiet_option
@json_events_option
@mergekit_options
@_moe_options
def moe(
    config: str, out: str, dry_run: bool, quiet: bool, as_json: bool, no_kernels: bool, **options: Any
) -> None:
    """Make a mixture of experts of the dense models that CONFIG names. Running it again resumes.

    CONFIG is that of mergekit-moe. Everything but the MLPs comes from the base model, and the experts are the MLPs of the
    other models, copied byte for byte. The output is Mixtral, Qwen2-MoE, Qwen3-MoE or DeepSeek.
    """
    from streammerge.api.reading import read_config

    own = [(name, why) for name, why in _NEEDLESS.items() if options.pop(name)]
    options, notes = translate(options)
    notes += [f"--{name.replace('_', '-')}: ignored: {why}" for name, why in own]
    parsed = read_config(config)
    if parsed.moe is None:
        raise ConfigError(
            f"{printable(config)}: a config of a merge, not of a mixture of experts: use `streammerge merge`"
        )
    if dry_run:
        for note in notes:
            click.echo(f"warning: {note}", err=True)
        planned = {key: value for key, value in options.items() if key in _PLANNED}
        show_plan(parsed, out, as_json=as_json, **planned)
    else:
        run(
            parsed,
            out,
            "mixing",
            quiet=quiet,
            as_json=as_json,
            kernels=not no_kernels,
            notes=notes,
            **options,
        )
