"""The commands for Fisher diagonals and Gram matrices."""

from __future__ import annotations

import json
from typing import Any

import click

from streammerge.cli.options import (
    MEMORY_AND_SPEED,
    MESSAGES,
    MOST_SEED,
    OUTPUT,
    GroupedCommand,
    Whole,
    examples,
    json_events_option,
    memory_option,
    option,
    path,
    quiet_option,
    together,
)
from streammerge.cli.process import BEGAN, stop_on_signals
from streammerge.errors import InputError, printable

_stored_dtype_option = option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16"]),
    default="float32",
    show_default=True,
    group=OUTPUT,
    help="Data type of the stored values.",
)
_overwrite_option = option(
    "--overwrite", is_flag=True, group=OUTPUT, help="Replace STORE, or what an unfinished run left."
)
_store_option = option(
    "--out",
    required=True,
    type=path(file_okay=False),
    metavar="STORE",
    group=OUTPUT,
    help="The store to write, such as math.zarr.",
)
_info_json_option = option(
    "--json", "as_json", is_flag=True, group=MESSAGES, help="Print the store's table as JSON."
)


@click.group()
def fisher() -> None:
    """Fisher diagonals in Zarr stores: how certain a model is of each parameter."""


@fisher.command(
    "import",
    cls=GroupedCommand,
    epilog=examples("streammerge fisher import models/math fisher.safetensors --out math.zarr"),
)
@click.argument("model", type=path())
@click.argument("diagonals", type=path())
@_store_option
@_stored_dtype_option
@memory_option
@option("--estimator", metavar="TEXT", help="Estimator to record in the store.")
@option("--examples", type=Whole(1), metavar="N", help="Number of examples to record in the store.")
@option("--seed", type=Whole(0), metavar="N", help="Seed to record in the store.")
@_overwrite_option
@quiet_option
@json_events_option
def fisher_import(
    model: str,
    diagonals: str,
    out: str,
    dtype: str,
    memory: int | None,
    estimator: str | None,
    examples: int | None,
    seed: int | None,
    overwrite: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Stream DIAGONALS, a safetensors or PyTorch file, into a store for MODEL. Running it again resumes."""
    stop, signal_received = stop_on_signals()
    from streammerge.api import import_fisher
    from streammerge.report.progress import make_reporter
    from streammerge.report.stores import imported_text

    reporter = make_reporter(
        "importing", quiet=quiet, as_json=as_json, signal_received=signal_received, began=BEGAN
    )
    known = {"estimator": estimator, "examples": examples, "seed": seed}
    try:
        imported = import_fisher(
            model,
            diagonals,
            out,
            dtype=dtype,
            memory=memory,
            overwrite=overwrite,
            about={key: value for key, value in known.items() if value is not None},
            on_event=reporter,
            stop=stop,
            signal_received=signal_received,
        )
    finally:
        reporter.close()
    summary = {key: value for key, value in imported.about.items() if key != "tensors"}
    reporter.end({"out": out, "resumed": imported.resumed, **summary}, imported_text(imported))


_streaming_options = together(
    option("--examples", type=Whole(1), metavar="N", help="Use the first N examples  [default: all]"),
    option(
        "--max-length",
        type=Whole(2),
        metavar="N",
        default=512,
        show_default=True,
        help="Truncate examples to N tokens.",
    ),
    option(
        "--batch-size",
        type=Whole(1),
        metavar="N",
        default=16,
        show_default=True,
        group=MEMORY_AND_SPEED,
        help="Examples read and written at a time; values do not depend on it.",
    ),
    memory_option,
    option(
        "--device",
        default="cpu",
        show_default=True,
        metavar="NAME",
        group=MEMORY_AND_SPEED,
        help="cpu, cuda or cuda:N.",
    ),
    _overwrite_option,
    quiet_option,
    json_events_option,
)


def _stream(run: str, what: str, *given: str, quiet: bool, as_json: bool, **options: Any) -> None:
    """Call the function `run` of the API, show its progress as `what`, and print the result."""
    stop, signal_received = stop_on_signals()
    from streammerge import api
    from streammerge.report.progress import make_reporter
    from streammerge.report.stores import computed_text, computed_values

    reporter = make_reporter(what, quiet=quiet, as_json=as_json, signal_received=signal_received, began=BEGAN)
    try:
        computed = getattr(api, run)(
            *given, on_event=reporter, stop=stop, signal_received=signal_received, **options
        )
    finally:
        reporter.close()
    reporter.end(computed_values(computed), computed_text(computed))


@fisher.command(
    "compute",
    cls=GroupedCommand,
    epilog=examples(
        "streammerge fisher compute models/math --data math.jsonl --out math.zarr",
        "streammerge fisher compute models/math --data math.jsonl --out math.zarr --examples 512",
    ),
)
@click.argument("model", type=path())
@option(
    "--data",
    required=True,
    type=path(dir_okay=False),
    metavar="FILE",
    help="JSON lines with text or input_ids, and label for empirical labels.",
)
@_store_option
@option(
    "--labels",
    type=click.Choice(["sampled", "empirical", "exact"]),
    help="Labels drawn from the model, the data's own, or all labels of a classifier  "
    "[default: exact for classifiers, else sampled]",
)
@option(
    "--seed",
    type=Whole(0, MOST_SEED),
    metavar="N",
    default=0,
    show_default=True,
    help="Seed for drawing labels.",
)
@_stored_dtype_option
@_streaming_options
def fisher_compute(model: str, data: str, out: str, **options: Any) -> None:
    """Estimate the Fisher diagonal of MODEL over examples, layer by layer within --memory. Running it again resumes.

    MODEL is a causal language model or a sequence classifier that transformers can build; it need not fit in memory.
    """
    _stream("compute_fisher", "estimating", model, data, out, **options)


@fisher.command("info", cls=GroupedCommand, epilog=examples("streammerge fisher info math.zarr"))
@click.argument("store", type=path())
@_info_json_option
def fisher_info(store: str, as_json: bool) -> None:
    """Show a store's totals, each layer's share, and the undecided parameters."""
    from streammerge.checkpoint.companions import open_fisher
    from streammerge.report.stores import info_text

    index = open_fisher(store, with_table=True)
    if index.model is not None:
        raise InputError(f"{printable(store)}: a safetensors file, not a store: see `streammerge inspect`")
    click.echo(json.dumps(dict(index.about)) if as_json else info_text(index))


@click.group()
def gram() -> None:
    """Gram matrices in Zarr stores: the inputs of a model's linear maps, for `regmean`."""


@gram.command(
    "compute",
    cls=GroupedCommand,
    epilog=examples("streammerge gram compute models/math --data math.jsonl --out math-gram.zarr"),
)
@click.argument("model", type=path())
@option(
    "--data",
    required=True,
    type=path(dir_okay=False),
    metavar="FILE",
    help="JSON lines with text or input_ids.",
)
@_store_option
@_streaming_options
def gram_compute(model: str, data: str, out: str, **options: Any) -> None:
    """Collect the Gram matrices of MODEL over examples, layer by layer within --memory. Running it again resumes.

    MODEL is a causal language model or a sequence classifier that transformers can build; it need not fit in memory.
    """
    _stream("compute_grams", "collecting", model, data, out, **options)


@gram.command("info", cls=GroupedCommand, epilog=examples("streammerge gram info math-gram.zarr"))
@click.argument("store", type=path())
@_info_json_option
def gram_info(store: str, as_json: bool) -> None:
    """Show the examples and the linear maps of a store of Gram matrices."""
    from streammerge.checkpoint.companions import open_grams
    from streammerge.report.stores import gram_info_text

    index = open_grams(store, with_table=True)
    click.echo(json.dumps(dict(index.about)) if as_json else gram_info_text(index))
