"""The command line: a thin shell over `streammerge.api`.

Heavy imports happen inside the commands, so that ``--help`` and a config error answer at once.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import click

from streammerge import __version__
from streammerge.errors import InputError, StreammergeError, WorldError, printable
from streammerge.mergekit_options import mergekit_options, translate


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="streammerge")
def cli() -> None:
    """Merge neural-network checkpoints larger than memory: streaming, exact, reproducible, resumable."""


def _planning_options(command: Callable[..., Any]) -> Callable[..., Any]:
    options = [
        click.option("--memory", metavar="SIZE", help="Peak resident memory of the process, such as 2GiB. [half of what is free]"),
        click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N."),
        click.option("--threads", type=click.IntRange(1, 1024), help="CPUs to keep busy. [those available]"),
        click.option("--shard-size", metavar="SIZE", default="5GB", show_default=True, help="Most bytes in one output file."),
        click.option("--seed", type=click.IntRange(0, 2**64 - 1), help="Of the random drops. [the config's, or 0]"),
        click.option("--methods", metavar="FILE", help="A Python file with merge methods of your own; it is run."),
    ]  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


@cli.command()
@click.argument("config")
@click.argument("out")
@_planning_options
@click.option("--overwrite", is_flag=True, help="Discard what an earlier merge left in OUT.")
@click.option(
    "--io",
    type=click.Choice(["direct", "read", "mmap"]),
    default="direct",
    show_default=True,
    help="Past the page cache, through it, or by memory map.",
)
@click.option(
    "--no-kernels", is_flag=True, help="Use the torch formulas, not the compiled kernels: same bits, slower."
)
@click.option(
    "--profile", metavar="FILE", help="Write to FILE, as JSON, where the time went, stage by stage."
)
@click.option(
    "--nonfinite",
    type=click.Choice(["error", "warn"]),
    default="error",
    show_default=True,
    help="A NaN or infinity, of an input or by overflow, stops the merge, or is written and reported.",
)
@click.option(
    "--hash-inputs",
    is_flag=True,
    help="Hash every input file first, one more read of it: run again, a touched or copied file is known as the same.",
)
@click.option("--quiet/--no-quiet", help="Print warnings and errors only.")
@click.option("--json", "as_json", is_flag=True, help="Print events as JSON, one object a line, on stdout.")
@mergekit_options
def merge(config: str, out: str, quiet: bool, as_json: bool, no_kernels: bool, **options: Any) -> None:
    """Merge the models that CONFIG names into the directory OUT. Run again, it continues.

    Interrupted by Ctrl-C, a kill or a crash, the same command goes on where it stopped, and the files are
    byte for byte those of an uninterrupted run. The options of mergekit-yaml are taken too, under their own names.
    """
    options, notes = translate(options)
    stop, signal_received = _stop_on_signals()
    from streammerge.api import merge as run
    from streammerge.engine.session import Event
    from streammerge.report.progress import BarReporter, JsonReporter, LineReporter

    bar = sys.stderr.isatty() and not quiet and not as_json
    reporter = JsonReporter() if as_json else BarReporter() if bar else LineReporter(quiet)
    for note in notes:
        reporter(Event("warning", {"message": note}))
    try:
        summary = run(
            config, out, on_event=reporter, stop=stop, kernels=not no_kernels,
            signal_received=signal_received, **options,
        )  # fmt: skip
    finally:
        reporter.close()
    reporter.finish(summary)


def _stop_on_signals() -> tuple[threading.Event, Callable[[], int | None]]:
    """Return an event that SIGINT and SIGTERM set, and what tells which of them came first."""
    stop = threading.Event()
    received: list[int] = []

    def on_signal(signum: int, frame: FrameType | None) -> None:
        received.append(signum)
        stop.set()

    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, on_signal)
    return stop, lambda: received[0] if received else None


def _leave_on_signals() -> None:
    """Have SIGINT and SIGTERM end a command at once that writes nothing, and so has nothing to finish."""

    def on_signal(signum: int, frame: FrameType | None) -> None:
        _report(InputError("stopped"), 0)
        os._exit(128 + signum)

    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, on_signal)


@cli.command()
@click.argument("config")
@_planning_options
@click.option("--json", "as_json", is_flag=True, help="Print the whole plan, tensor by tensor, as JSON.")
def plan(config: str, as_json: bool, **options: Any) -> None:
    """Show what `merge CONFIG` would do, from the models' headers alone."""
    import shutil

    from streammerge.api import plan as decide
    from streammerge.planning.plan import describe, plan_json
    from streammerge.report.progress import plan_text

    decided = decide(config, **options)
    free = shutil.disk_usage(".").free
    click.echo(plan_json(decided) if as_json else plan_text(decided, describe(decided), free))


@cli.command()
@click.argument("out")
@click.option(
    "--against",
    metavar="CONFIG",
    help="Recompute a sample of OUT from the inputs of CONFIG, and compare the bits.",
)
@click.option(
    "--sample",
    type=click.IntRange(1),
    metavar="N",
    help="Pieces to recompute, of a million elements each. [16]",
)
@click.option("--all", "everything", is_flag=True, help="Recompute all of OUT.")
@click.option(
    "--seed", type=click.IntRange(0, 2**64 - 1), help="Of the sample; the same pieces for the same seed. [0]"
)
@click.option("--memory", metavar="SIZE", help="Peak resident memory of the process. [half of what is free]")
@click.option("--methods", metavar="FILE", help="A Python file with merge methods of your own; it is run.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def verify(
    out: str, against: str | None, sample: int | None, everything: bool, as_json: bool, **options: Any
) -> None:
    """Re-read a finished output against its recorded checksums and structure.

    With --against CONFIG a random sample is also computed once more, by the plain formulas, and compared bit by bit.
    """
    given = {"sample": sample, **options}
    if against is None and (everything or any(value is not None for value in given.values())):
        raise click.UsageError("--sample, --all, --seed, --memory and --methods go with --against CONFIG")
    if everything and sample is not None:
        raise click.UsageError("either --sample or --all")
    _leave_on_signals()
    from streammerge.api import DEFAULT_SAMPLE
    from streammerge.api import verify as check
    from streammerge.report.progress import LineReporter
    from streammerge.report.verdict import verdict_text, verdict_values

    verdict = check(
        out, against=against, sample=None if everything else sample or DEFAULT_SAMPLE, seed=options["seed"] or 0,
        memory=options["memory"], methods=options["methods"], on_event=LineReporter(quiet=as_json),
    )  # fmt: skip
    click.echo(json.dumps(verdict_values(verdict)) if as_json else verdict_text(out, verdict))
    if verdict.problems:
        more = f" (and {len(verdict.problems) - 1} more problems)" if len(verdict.problems) > 1 else ""
        raise InputError(f"{printable(out)}: {verdict.problems[0]}{more}")


@cli.command()
@click.argument("model")
@click.option("--json", "as_json", is_flag=True, help="Print every tensor as JSON.")
def inspect(model: str, as_json: bool) -> None:
    """List a model's tensors: dtype, shape, file, bytes."""
    from streammerge.index.model import open_model
    from streammerge.report.tables import inspect_text, inspect_values

    index = open_model(model)
    if as_json:
        click.echo(json.dumps({"model": model, "nbytes": index.nbytes, "tensors": inspect_values(index)}))
    else:
        click.echo(inspect_text(index))


@cli.command()
@click.argument("name", required=False)
@click.option("--methods", metavar="FILE", help="A Python file with merge methods of your own; it is run.")
def methods(name: str | None, methods: str | None) -> None:
    """List the merge methods, or show one: formula, parameters, defaults, paper."""
    from streammerge.methods.catalog import load_builtin, load_file
    from streammerge.methods.registry import all_methods, get_method
    from streammerge.report.tables import method_text, methods_text

    load_builtin()
    if methods is not None:
        load_file(Path(methods))
    click.echo(methods_text(all_methods()) if name is None else method_text(get_method(name, "methods")))


@cli.group()
def fisher() -> None:
    """Fisher diagonals in Zarr stores: how certain a model is of each of its parameters."""


@fisher.command("import")
@click.argument("model")
@click.argument("diagonals")
@click.option("--out", required=True, metavar="STORE", help="The store to write, such as math.zarr.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True,
              help="Of the stored values.")  # fmt: skip
@click.option("--memory", metavar="SIZE", help="Peak resident memory of the process. [half of what is free]")
@click.option("--estimator", metavar="TEXT", help="How the diagonals were estimated, for the record.")
@click.option("--examples", type=click.IntRange(1), help="From how many examples, for the record.")
@click.option("--seed", type=click.IntRange(0), help="With which seed, for the record.")
@click.option("--overwrite", is_flag=True, help="Replace STORE, or what an unfinished import left.")
@click.option("--quiet", is_flag=True, help="Print warnings and errors only.")
@click.option("--json", "as_json", is_flag=True, help="Print events as JSON, one object a line, on stdout.")
def fisher_import(
    model: str, diagonals: str, out: str, dtype: str, memory: str | None, estimator: str | None,
    examples: int | None, seed: int | None, overwrite: bool, quiet: bool, as_json: bool,
) -> None:  # fmt: skip
    """Stream DIAGONALS, a safetensors or PyTorch file, into a store for MODEL. Run again, it continues."""
    stop, signal_received = _stop_on_signals()
    from streammerge.dtypes import NAMES
    from streammerge.fisher.importing import import_diagonal
    from streammerge.report.fisher import imported_text
    from streammerge.report.progress import JsonReporter, LineReporter
    from streammerge.units import parse_size

    known = {"estimator": estimator, "examples": examples, "seed": seed}
    imported = import_diagonal(
        model, diagonals, Path(out), dtype=NAMES[dtype], memory=None if memory is None else parse_size(memory),
        about={key: value for key, value in known.items() if value is not None}, overwrite=overwrite,
        emit=JsonReporter() if as_json else LineReporter(quiet), stop=stop, signal_received=signal_received,
    )  # fmt: skip
    if as_json:
        summary = {key: value for key, value in imported.about.items() if key != "tensors"}
        click.echo(json.dumps({"event": "done", "out": out, "resumed": imported.resumed, **summary}))
    elif not quiet:
        click.echo(imported_text(imported))


def _streaming_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of what runs a model over examples."""
    options = [
        click.option("--examples", type=click.IntRange(1), metavar="N", help="Take the first N. [all]"),
        click.option("--max-length", type=click.IntRange(2), default=512, show_default=True, help="Cut examples after so many tokens."),
        click.option("--batch-size", type=click.IntRange(1), default=16, show_default=True,
                     help="Examples read and written at a time; the values do not depend on it."),
        click.option("--memory", metavar="SIZE", help="Peak resident memory of the process. [half of what is free]"),
        click.option("--device", default="cpu", show_default=True, help="cpu, cuda or cuda:N."),
        click.option("--overwrite", is_flag=True, help="Replace STORE, or what an unfinished run left."),
        click.option("--quiet", is_flag=True, help="Print warnings and errors only."),
        click.option("--json", "as_json", is_flag=True, help="Print events as JSON, one object a line, on stdout."),
    ]  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


def _stream(run: str, what: str, *given: str, quiet: bool, as_json: bool, **options: Any) -> None:
    """Call the function `run` of the API, tell its progress under the name `what`, and print what it did."""
    stop, signal_received = _stop_on_signals()
    from streammerge import api
    from streammerge.report.fisher import computed_text, computed_values
    from streammerge.report.progress import BarReporter, JsonReporter, LineReporter

    bar = sys.stderr.isatty() and not quiet and not as_json
    reporter = JsonReporter() if as_json else BarReporter(what) if bar else LineReporter(quiet)
    try:
        computed = getattr(api, run)(
            *given, on_event=reporter, stop=stop, signal_received=signal_received, **options
        )
    finally:
        reporter.close()
    if as_json:
        click.echo(json.dumps({"event": "done", **computed_values(computed)}))
    elif not quiet:
        click.echo(computed_text(computed))


@fisher.command("compute")
@click.argument("model")
@click.option(
    "--data",
    required=True,
    metavar="FILE",
    help="JSON lines: text or input_ids, and label for empirical labels.",
)
@click.option("--out", required=True, metavar="STORE", help="The store to write, such as math.zarr.")
@click.option(
    "--labels",
    type=click.Choice(["sampled", "empirical", "exact"]),
    help="Drawn from the model, those of the data, or all of a classifier's. [exact for classifiers, else sampled]",
)
@click.option(
    "--seed", type=click.IntRange(0, 2**64 - 1), default=0, show_default=True, help="Of the drawn labels."
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16"]),
    default="float32",
    show_default=True,
    help="Of the stored values.",
)
@_streaming_options  # fmt: skip
def fisher_compute(model: str, data: str, out: str, **options: Any) -> None:
    """Estimate the Fisher diagonal of MODEL over examples, layer by layer within --memory. Run again, it continues.

    A causal language model or a sequence classifier that transformers can build; the model need not fit in memory.
    """
    _stream("compute_fisher", "estimating", model, data, out, **options)


@fisher.command("info")
@click.argument("store")
@click.option("--json", "as_json", is_flag=True, help="Print the store's table as JSON.")
def fisher_info(store: str, as_json: bool) -> None:
    """Show a store's totals, the share of each layer, and which parameters are undecided."""
    from streammerge.index.fishers import open_fisher
    from streammerge.report.fisher import info_text

    index = open_fisher(store, with_table=True)
    if index.model is not None:
        raise InputError(f"{printable(store)}: a safetensors file, not a store: see `streammerge inspect`")
    click.echo(json.dumps(dict(index.about)) if as_json else info_text(index))


@cli.group()
def gram() -> None:
    """Gram matrices in Zarr stores: what a model's linear maps are fed with, for `regmean`."""


@gram.command("compute")
@click.argument("model")
@click.option("--data", required=True, metavar="FILE", help="JSON lines: text or input_ids.")
@click.option("--out", required=True, metavar="STORE", help="The store to write, such as math-gram.zarr.")
@_streaming_options
def gram_compute(model: str, data: str, out: str, **options: Any) -> None:
    """Collect the Gram matrices of MODEL over examples, layer by layer within --memory. Run again, it continues.

    A causal language model or a sequence classifier that transformers can build; the model need not fit in memory.
    """
    _stream("compute_grams", "collecting", model, data, out, **options)


@cli.command()
@click.argument("out", required=False)
def demo(out: str | None) -> None:
    """Merge the small real models that ship with the package and print the accuracy of each merge.

    The outputs go to OUT if it is given, else to a temporary directory.
    """
    from streammerge.demo.show import run_demo

    run_demo(None if out is None else Path(out))


def main() -> NoReturn:
    """Run the command line; turn every error into one line and its exit code."""
    code = 0
    _open_closed_streams()
    try:
        cli.main(standalone_mode=False)
        sys.stdout.flush()
    except click.exceptions.Abort:
        code = 130
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except StreammergeError as error:
        code = _report(error, error.exit_code)
    except BrokenPipeError:
        code = 0
    except KeyboardInterrupt:
        code = _report(InputError("stopped"), 130)
    except (OSError, MemoryError) as error:
        code = _report(WorldError(f"{type(error).__name__}: {error}"), 1)
    _leave(code)


def _open_closed_streams() -> None:
    """Put the null device where the caller has closed a standard stream.

    Else the next file opened, perhaps a shard, would be what messages are written to.
    """
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free: this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(descriptor, "w" if descriptor else "r", closefd=False))  # noqa: SIM115


def _report(error: Exception, code: int) -> int:
    if os.environ.get("STREAMMERGE_DEBUG") == "1":
        import traceback

        traceback.print_exception(error)
    with contextlib.suppress(OSError):
        print(f"streammerge: {printable(error, 2000)}", file=sys.stderr, flush=True)
    return code


def _leave(code: int) -> NoReturn:
    """Exit without a traceback even where stdout or stderr is full or its reader gone."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            code = code or 1
            os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    main()
