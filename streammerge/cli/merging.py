"""The commands that merge, plan a merge, and verify its output."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

import click

from streammerge.cli.launching import end_with_parent, on_all_gpus, run_on, shared
from streammerge.cli.mergekit_options import mergekit_options, translate
from streammerge.cli.options import (
    MESSAGES,
    MOST_SEED,
    GroupedCommand,
    Whole,
    examples,
    insecure_option,
    join_option,
    json_events_option,
    keep_stages_option,
    max_reads_option,
    memory_option,
    methods_option,
    on_option,
    option,
    path,
    planning_options,
    quiet_option,
    sharing_options,
    units_option,
    writing_options,
)
from streammerge.cli.process import BEGAN, leave_on_signals, stop_on_signals
from streammerge.errors import InputError, printable


@click.command(
    cls=GroupedCommand,
    epilog=examples(
        "streammerge merge ties.yml merged                   merge, or continue after an interruption",
        "streammerge merge ties.yml merged --memory 2GiB     never more resident memory than this",
        "streammerge merge ties.yml merged --overwrite       discard what an earlier merge left there",
        "streammerge merge sdxl.yml models/mix.safetensors   one file, as programs for images load it",
        "srun -N8 streammerge merge ties.yml merged --join   eight nodes share the work",
        "streammerge merge ties.yml merged --on processes:4  four processes here share it",
        "streammerge merge ties.yml merged --json            events for another program",
    ),
)
@click.argument("config", type=path())
@click.argument("out", type=path())
@planning_options
@max_reads_option
@writing_options
@keep_stages_option
@join_option
@on_option
@units_option
@quiet_option
@json_events_option
@mergekit_options
def merge(config: str, out: str, quiet: bool, as_json: bool, no_kernels: bool, **options: Any) -> None:
    """Merge the models that CONFIG names into OUT. Running it again resumes.

    OUT is a directory, one file if its name ends in .safetensors, or a folder of an object store (s3://, gs://, az://).

    After Ctrl-C, a kill or a crash, the same command resumes where it stopped, and the files have the bytes of an
    uninterrupted run. The options of mergekit-yaml are accepted under their own names.
    """
    where, from_stdin = options.pop("on"), options.pop("units_from_stdin")
    if where is not None:
        run_on(where, config, out, quiet=quiet, as_json=as_json, no_kernels=no_kernels, **options)
        return
    translated, notes = translate(options)
    count = 1 if from_stdin else on_all_gpus(out, translated)
    if count > 1 and shared(
        count, config, out, quiet=quiet, as_json=as_json, no_kernels=no_kernels, **options
    ):
        return
    end_with_parent()
    if from_stdin:
        from streammerge.engine.taking import HandedOut

        translated["join"] = HandedOut(sys.stdin, sys.stdout)
    run(
        config,
        out,
        "merging",
        quiet=quiet,
        as_json=as_json,
        kernels=not no_kernels,
        notes=notes,
        **translated,
    )


def run(
    config: Any,
    out: str,
    what: str,
    *,
    quiet: bool,
    as_json: bool,
    kernels: bool,
    notes: Sequence[str] = (),
    **options: Any,
) -> None:
    """Run a merge and show its progress.

    Parameters
    ----------
    config
        A path, or the config as a mapping.
    what
        The activity in one word.
    notes
        Warnings that come first.
    options
        Those of `streammerge.merge`.
    """
    stop, signal_received = stop_on_signals()
    from streammerge.api.reading import read_config

    config = read_config(config, options.pop("methods", None))
    from streammerge.api import merge
    from streammerge.events import warning
    from streammerge.report.progress import make_reporter

    if options.get("report") is not None:
        from streammerge.api.reporting import check_report
        from streammerge.io.volumes import as_path, local_path

        check_report("--report", local_path(options["report"], "a page"), as_path(out))
    reporter = make_reporter(what, quiet=quiet, as_json=as_json, signal_received=signal_received, began=BEGAN)
    for note in notes:
        reporter(warning(note))
    try:
        summary = merge(
            config,
            out,
            on_event=reporter,
            stop=stop,
            kernels=None if kernels else False,
            signal_received=signal_received,
            **options,
        )
    finally:
        reporter.close()
    reporter.finish(summary)


@click.command(
    cls=GroupedCommand,
    epilog=examples(
        "streammerge plan ties.yml                      what it reads, writes and needs",
        "streammerge plan ties.yml /data/merged         and whether that disk has room for it",
        "streammerge plan ties.yml --memory 2GiB        with so much memory",
        "streammerge plan ties.yml --workers 8 --rate 2GB/s   shared by eight processes",
    ),
)
@click.argument("config", type=path())
@click.argument("out", type=path(), required=False)
@planning_options
@max_reads_option
@option(
    "--json",
    "as_json",
    is_flag=True,
    group=MESSAGES,
    help="Print the whole plan, tensor by tensor, as JSON.",
)
@sharing_options
def plan(config: str, out: str | None, as_json: bool, **options: Any) -> None:
    """Show what `merge CONFIG OUT` would do, from the models' headers alone. Nothing is written.

    With OUT, its disk and its present content are checked too.
    """
    show_plan(config, out, as_json=as_json, **options)


def show_plan(
    config: Any,
    out: str | None,
    *,
    as_json: bool,
    workers: int | None = None,
    rate: int | None = None,
    store_rate: int | None = None,
    **options: Any,
) -> None:
    """Print the plan of a config, which is a path or a mapping.

    Parameters
    ----------
    workers, rate, store_rate
        Processes that share the merge, and the bandwidth of each and of the store; see `share_out`.
    options
        Those of `streammerge.plan`.
    """
    if workers is None and (rate is not None or store_rate is not None):
        raise click.UsageError("--rate and --store-rate go with --workers N")
    from streammerge.api.reading import read_config

    config = read_config(config, options.pop("methods", None))
    from streammerge.api import plan as decide
    from streammerge.engine.precheck import check_beforehand
    from streammerge.io.volumes import as_path
    from streammerge.planning.description import describe, tensor_values
    from streammerge.planning.share_out import share_out
    from streammerge.report.plan import advice, plan_text
    from streammerge.report.shares import shares_text, shares_values
    from streammerge.report.stages import stage_values

    decided = decide(config, out=out, **options)
    check_beforehand(decided, None if out is None else as_path(out))
    values = describe(decided) | advice(decided, out)
    if workers is not None:
        shares = share_out(decided, workers, rate, store_rate)
        values |= {"shared": shares_values(shares), "shared_text": shares_text(shares)}
    if as_json:
        values.pop("shared_text", None)
        stages = {"stages": stage_values(decided)} if decided.stages else {}
        told = {**values, **stages, "tensor_plan": tensor_values(decided)}
        click.echo(json.dumps(told, ensure_ascii=False))
    else:
        click.echo(plan_text(decided, values, out))


@click.command(
    cls=GroupedCommand,
    epilog=examples(
        "streammerge verify merged                      every byte against the recorded checksums",
        "streammerge verify merged --against ties.yml   and a random sample computed once more",
    ),
)
@click.argument("out", type=path())
@option(
    "--against",
    type=path(),
    metavar="CONFIG",
    help="Recompute a sample of OUT from the inputs of CONFIG, and compare the bits.",
)
@option(
    "--sample",
    type=Whole(1),
    metavar="N",
    help="Number of pieces to recompute, a million elements each  [default: 16]",
)
@option("--all", "everything", is_flag=True, help="Recompute all of OUT.")
@option("--seed", type=Whole(0, MOST_SEED), metavar="N", help="Seed of the sample's choice  [default: 0]")
@memory_option
@methods_option
@option(
    "--join",
    is_flag=True,
    help="Share the reading with all processes that run the same command, on any hosts that see OUT.",
)
@option("--json", "as_json", is_flag=True, group=MESSAGES, help="Print the result as JSON.")
@insecure_option
def verify(
    out: str, against: str | None, sample: int | None, everything: bool, as_json: bool, **options: Any
) -> None:
    """Re-read a finished output and compare it with its recorded checksums and structure.

    With --against CONFIG, a random sample is also recomputed by the plain formulas and compared bit by bit.
    """
    join = options.pop("join")
    given = {"sample": sample, **options}
    if join and against is not None:
        raise click.UsageError("--join does not go with --against")
    if against is None and (everything or any(value is not None for value in given.values())):
        raise click.UsageError("--sample, --all, --seed, --memory and --methods go with --against CONFIG")
    if everything and sample is not None:
        raise click.UsageError("either --sample or --all")
    leave_on_signals()
    from streammerge.api import DEFAULT_SAMPLE
    from streammerge.api import verify as check
    from streammerge.report.progress import LineReporter
    from streammerge.report.verdict import verdict_text, verdict_values
    from streammerge.report.wrapping import wrapped

    verdict = check(
        out,
        against=against,
        sample=None if everything else sample or DEFAULT_SAMPLE,
        seed=options["seed"] or 0,
        memory=options["memory"],
        methods=options["methods"],
        join=join,
        on_event=LineReporter(quiet=as_json),
    )
    click.echo(json.dumps(verdict_values(verdict)) if as_json else wrapped(verdict_text(out, verdict)))
    if verdict.problems:
        more = f" (and {len(verdict.problems) - 1} more problems)" if len(verdict.problems) > 1 else ""
        raise InputError(f"{printable(out)}: {verdict.problems[0]}{more}")
