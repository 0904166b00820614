"""The command that writes the difference of two models as a LoRA adapter."""

from __future__ import annotations

from typing import Any

import click

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
    without,
    writing_options,
)

_PLANNED = ("memory", "threads", "device")
"""Options that `plan` has too."""
_MOST_RANK = 1 << 14


@without("shard_size", "max_reads", "report")  # one file, one read, and no page
@click.command(
    "extract-lora",
    cls=GroupedCommand,
    epilog=examples(
        "streammerge extract-lora tuned adapter --base base                  rank 32 everywhere",
        "streammerge extract-lora tuned adapter --base base --rank 64        a higher rank misses less",
        "streammerge extract-lora tuned adapter --base base --energy 0.95    by module: 95 % of the squared norm",
        "streammerge extract-lora tuned adapter --base base --plan           memory, disk and time it will take",
    ),
)
@click.argument("model", type=path())
@click.argument("out", type=path(file_okay=False))
@option("--base", required=True, type=path(), metavar="BASE", help="The model that the adapter will go on.")
@option(
    "--rank", type=Whole(1, _MOST_RANK), metavar="N", group=METHODS, help="Rank of the adapter  [default: 32]"
)
@option(
    "--energy",
    type=click.FloatRange(0, 1, min_open=True),
    metavar="SHARE",
    group=METHODS,
    help="Instead of --rank: the least rank of each module that has this share of its squared norm.",
)
@option(
    "--max-rank",
    type=Whole(1, _MOST_RANK),
    metavar="N",
    group=METHODS,
    help="The most that --energy may choose  [default: 256]",
)
@option(
    "--include", metavar="RE", group=METHODS, help="Only modules whose names this regular expression finds."
)
@option(
    "--exclude", metavar="RE", group=METHODS, help="No modules whose names this regular expression finds."
)
@option(
    "--embeddings",
    is_flag=True,
    group=METHODS,
    help="Decompose embeddings and heads too, not store them whole.",
)
@option(
    "--modules-to-save",
    multiple=True,
    metavar="NAME",
    group=METHODS,
    help="Store this module whole, by its name or the end of it; may be given several times.",
)
@option("--drop-rest", is_flag=True, group=METHODS, help="Leave out everything that is not decomposed.")
@option(
    "--dtype",
    metavar="NAME",
    group=OUTPUT,
    help="Dtype of the adapter  [default: factors float32, the rest the model's]",
)
@option("--plan", "only_plan", is_flag=True, group=MESSAGES, help="Show what would be done; write nothing.")
@resource_options
@writing_options
@quiet_option
@json_events_option
def extract_lora(
    model: str,
    out: str,
    base: str,
    rank: int | None,
    energy: float | None,
    max_rank: int | None,
    include: str | None,
    exclude: str | None,
    embeddings: bool,
    modules_to_save: tuple[str, ...],
    drop_rest: bool,
    dtype: str | None,
    only_plan: bool,
    quiet: bool,
    as_json: bool,
    no_kernels: bool,
    **options: Any,
) -> None:
    """Write MODEL minus BASE as a LoRA adapter into the directory OUT. Running it again resumes.

    PEFT loads the adapter. Each matrix gets the best factors of its rank; what they miss is printed and recorded.
    Embeddings, heads and norms are stored whole if they differ. This is the same as a config with `output: lora`.
    """
    if rank is not None and energy is not None:
        raise click.UsageError("either --rank or --energy")
    from streammerge.config.lora import extraction

    config = extraction(
        model,
        base,
        rank=rank,
        energy=energy,
        dtype=dtype,
        max_rank=max_rank,
        include=include,
        exclude=exclude,
        embeddings=embeddings,
        modules_to_save=list(modules_to_save),
        drop_rest=drop_rest,
    )
    if only_plan:
        planned = {key: value for key, value in options.items() if key in _PLANNED}
        show_plan(config, out, as_json=as_json, **planned)
    else:
        run(config, out, "extracting", quiet=quiet, as_json=as_json, kernels=not no_kernels, **options)
