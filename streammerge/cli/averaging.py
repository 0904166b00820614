"""The command that averages the checkpoints of a training run."""

from __future__ import annotations

from typing import Any

import click

from streammerge.cli.launching import not_shared
from streammerge.cli.merging import run, show_plan
from streammerge.cli.options import (
    MESSAGES,
    METHODS,
    OUTPUT,
    GroupedCommand,
    Whole,
    examples,
    json_events_option,
    option,
    path,
    quiet_option,
    resource_options,
    writing_options,
)

_PLANNED = ("memory", "threads", "device", "shard_size")
"""Options that `plan` has too."""


@click.command(
    cls=GroupedCommand,
    epilog=examples(
        "streammerge average runs/sft averaged                       the mean of its checkpoints",
        "streammerge average runs/sft averaged --last 8              of the newest 8",
        "streammerge average runs/sft averaged --schedule wsm:sqrt   as if the learning rate had decayed",
        "streammerge average runs/sft averaged --plan                which, with what coefficient",
        "streammerge average seed-1 seed-2 seed-3 averaged           of models anywhere",
    ),
)
@click.argument("models", nargs=-1, required=True, metavar="DIR_OR_MODEL...", type=path())
@click.argument("out", type=path())
@option("--last", type=Whole(1), metavar="N", group=METHODS, help="Only the newest N  [default: all]")
@option(
    "--schedule",
    default="sma",
    show_default=True,
    metavar="NAME",
    group=METHODS,
    help="sma, wma, ema:0.9, wsm:linear, wsm:sqrt or wsm:cosine.",
)
@option(
    "--pattern",
    metavar="GLOB",
    group=METHODS,
    help="Pattern of the checkpoints' names  [default: those with a number]",
)
@option(
    "--dtype", metavar="NAME", group=OUTPUT, help="Dtype of the output  [default: that of the checkpoints]"
)
@option(
    "--strip",
    metavar="PREFIX",
    group=METHODS,
    help="Taken off the names of tensors, such as model.; those without it are left out.",
)
@option("--plan", "only_plan", is_flag=True, group=MESSAGES, help="Show what would be done; write nothing.")
@resource_options
@writing_options
@not_shared("`streammerge merge` takes it, with a config that has the key `checkpoints`")
@quiet_option
@json_events_option
def average(
    models: tuple[str, ...],
    out: str,
    last: int | None,
    schedule: str,
    pattern: str | None,
    strip: str | None,
    dtype: str | None,
    only_plan: bool,
    quiet: bool,
    as_json: bool,
    no_kernels: bool,
    **options: Any,
) -> None:
    """Average the checkpoints of a training run into the directory OUT. Running it again resumes.

    The checkpoints are the children of DIR, in natural order (checkpoint-900 before checkpoint-1000), or models given one
    by one, the oldest first. This is the same as a config with `checkpoints:`.
    """
    asked: dict[str, Any] = {"directory": models[0] if len(models) == 1 else list(models)}
    asked |= {"pattern": pattern, "last": last, "schedule": schedule, "strip": strip}
    config: dict[str, Any] = {
        "merge_method": "linear",
        "checkpoints": {key: value for key, value in asked.items() if value is not None},
        **({} if dtype is None else {"dtype": dtype}),
    }
    if only_plan:
        planned = {key: value for key, value in options.items() if key in _PLANNED}
        show_plan(config, out, as_json=as_json, **planned)
    else:
        run(config, out, "averaging", quiet=quiet, as_json=as_json, kernels=not no_kernels, **options)
