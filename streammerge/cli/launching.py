"""`merge --on`: the command line of the processes that a launcher starts, and their end with this one."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Mapping
from typing import Any

import click
from click.core import ParameterSource

from streammerge.cli.mergekit_options import translate
from streammerge.cli.options import Decorator, option, together
from streammerge.cli.process import BEGAN, stop_on_signals
from streammerge.launch.base import PARENT
from streammerge.machine import gpus
from streammerge.units import format_size

_OWN = ("on", "units_from_stdin", "join", "quiet", "as_json", "config", "out")
"""Options of the driver alone."""
_NOT_SHARED = {"profile": "--profile", "report": "--report"}
_PLANNED = ("memory", "threads", "device", "shard_size", "seed", "methods", "max_reads")
_PR_SET_PDEATHSIG = 1


def not_shared(reason: str) -> Decorator:
    """Return what lets a command refuse ``--join`` and ``--on`` with a sentence that has the cure."""

    def refuse(ctx: click.Context, parameter: click.Parameter, value: object) -> None:
        if value:
            raise click.UsageError(f"{parameter.opts[0]}: {reason}", ctx)

    hidden: dict[str, Any] = {"hidden": True, "expose_value": False, "callback": refuse}
    return together(option("--join", is_flag=True, **hidden), option("--on", **hidden))


def command_of(ctx: click.Context, memory: int | None = None) -> list[str]:
    """Return the arguments of a process that takes part in the merge of this command line.

    `memory` is its share in bytes of a ``--memory`` that was given for all; None: it has what was given.
    """
    values = ctx.params if memory is None else {**ctx.params, "memory": memory}
    arguments = ["merge", ctx.params["config"], ctx.params["out"], "--join", "--json"]
    for parameter in ctx.command.params:
        name = parameter.name or ""
        given = ctx.get_parameter_source(name) in (ParameterSource.COMMANDLINE, ParameterSource.ENVIRONMENT)
        if not isinstance(parameter, click.Option) or name in _OWN or not given:
            continue
        value = values[name]
        if parameter.is_flag:
            arguments.append(parameter.opts[0] if value else parameter.secondary_opts[0])
        else:
            arguments += [parameter.opts[0], str(value)]
    return arguments


def run_on(
    where: str, config: str, out: str, *, quiet: bool, as_json: bool, device_reason: str = "", **options: Any
) -> None:
    """Merge by processes that a launcher starts; show one progress and one summary.

    Parameters
    ----------
    device_reason
        What the user is told of the device in place of the plan's reason.
    options
        Those of ``merge``; ``memory`` is that of each process.
    """
    ctx = click.get_current_context()
    for name, shown in _NOT_SHARED.items():
        if options.get(name) is not None:
            raise click.UsageError(f"{shown} does not go with --on: each process would write it")
    command = command_of(ctx, options.get("memory"))
    overwrite = bool(options.get("overwrite"))
    kernels = False if options.pop("no_kernels", False) else None
    translated, _ = translate(options)
    stop, signal_received = stop_on_signals()
    from streammerge.api.launching import merge_on
    from streammerge.engine.session import Options
    from streammerge.events import Control
    from streammerge.report.progress import make_reporter

    planned = {name: translated[name] for name in _PLANNED if name in translated}
    planned |= {
        name: translated[name] for name in ("copy_tokenizer", "write_model_card") if name in translated
    }
    reporter = make_reporter(
        "merging", quiet=quiet, as_json=as_json, signal_received=signal_received, began=BEGAN
    )
    try:
        summary = merge_on(
            where,
            config,
            out,
            command,
            {**planned, "kernels": kernels},
            Options(overwrite=overwrite),
            Control(reporter, stop, signal_received),
            {"device_reason": device_reason} if device_reason else {},
        )
    finally:
        reporter.close()
    reporter.finish(summary)


def on_all_gpus(out: str, options: Mapping[str, Any]) -> int:
    """Return on how many GPUs ``--device cuda`` runs, by one process each; 1: in this process.

    A merge that processes cannot share (one file, an object store, one profile) takes the first GPU, and so does one
    whose ``--memory`` is too little for a process on each GPU.
    """
    alone = out.endswith(".safetensors") or "://" in out
    alone |= any(options.get(name) for name in ("join", "overwrite", "keep_stages", *_NOT_SHARED))
    if options["device"] != "cuda" or alone:
        return 1
    count, memory = len(gpus()), options.get("memory")
    if count > 1 and memory is not None:
        from streammerge.planning.backend import CUDA_LEAST

        return count if memory // count >= CUDA_LEAST else 1
    return max(1, count)


def shared(gpus: int, config: str, out: str, **options: Any) -> bool:
    """Merge by a process on each GPU; False if this merge cannot be shared, and nothing was done.

    A ``--memory`` that was given is that of the merge: each process has its share.
    """
    from streammerge.engine.joined import NotSharedError
    from streammerge.errors import BudgetError

    memory, reason = options.pop("memory", None), f"{gpus} GPUs, by a process for each"
    if memory is not None:
        memory //= gpus
        reason += f" with --memory {format_size(memory)}"
    try:
        run_on(f"processes:{gpus}", config, out, device_reason=reason, memory=memory, **options)
    except (NotSharedError, BudgetError):  # a share may be too little where the whole is enough
        return False
    return True


def end_with_parent() -> None:
    """Have the kernel send SIGTERM to this process when the one that started it ends, if that is wished."""
    wished = os.environ.get(PARENT)
    if wished is None:
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if str(os.getppid()) != wished:  # it ended before
        os.kill(os.getpid(), signal.SIGTERM)
