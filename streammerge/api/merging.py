"""`merge`: from a config to a finished directory."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from streammerge.api.deciding import plan
from streammerge.api.feedback import OnEvent, controlled
from streammerge.api.gates import supply_gates
from streammerge.api.reading import ConfigLike, read_config
from streammerge.config.schema import MergeConfig
from streammerge.config.stages import kept_stages, read_from
from streammerge.engine.first_use import CannotCompileError
from streammerge.engine.merge import NonFinite, Options, Summary, execute
from streammerge.engine.taking import Taking
from streammerge.errors import BudgetError, InputError, printable
from streammerge.io.object_waiting import listening
from streammerge.io.reader import IoMode
from streammerge.io.volumes import as_path, is_url, local_path
from streammerge.lazy import late_module
from streammerge.planning.memory.enough import with_enough
from streammerge.planning.options import DEFAULT_SHARD_SIZE, MAX_READS
from streammerge.planning.plan import MergePlan
from streammerge.planning.prepare import SLOWER
from streammerge.report.card import model_card

if TYPE_CHECKING:
    from streammerge.api import reporting
    from streammerge.engine import joined, to_store
else:
    reporting = late_module("streammerge.api.reporting")
    joined = late_module("streammerge.engine.joined")
    to_store = late_module("streammerge.engine.to_store")


def merge(
    config: ConfigLike,
    out: str | os.PathLike[str],
    *,
    memory: str | int | None = None,
    threads: int | None = None,
    device: str = "auto",
    shard_size: str | int = DEFAULT_SHARD_SIZE,
    seed: int | None = None,
    methods: str | os.PathLike[str] | None = None,
    kernels: bool | None = None,
    copy_tokenizer: bool = True,
    write_model_card: bool = True,
    keep_stages: str | os.PathLike[str] | None = None,
    max_reads: float = MAX_READS,
    overwrite: bool = False,
    nonfinite: NonFinite = "error",
    hash_inputs: bool = False,
    join: bool | Taking = False,
    io: IoMode = "direct",
    profile: str | os.PathLike[str] | None = None,
    report: str | os.PathLike[str] | None = None,
    progress: bool = True,
    on_event: OnEvent | None = None,
    stop: threading.Event | None = None,
    signal_received: Callable[[], int | None] = lambda: None,
) -> Summary:
    """Merge into the directory `out`; after an interruption, the same call resumes.

    Ctrl-C raises KeyboardInterrupt after the running pieces are done. Finished work is kept, and the same call resumes. The
    output has the same bytes as without the interruption.

    Parameters
    ----------
    config
        Path of a YAML file, its text (more than one line), or the equivalent mapping.
    out
        The directory to write.
    memory
        Bound of the process's peak resident memory, ``"2GiB"`` or bytes; default: half of what is free.
    threads
        CPUs to keep busy; default: those available.
    device
        ``auto``, ``cpu`` or ``cuda[:N]``.
    shard_size
        Most bytes of tensors in one output file, ``"5GB"`` or a number.
    seed
        Overrides the config's.
    methods
        A Python file with methods of your own; it is run.
    kernels
        True: use the compiled kernels, and compile them if needed. False: use the torch formulas, which give the same
        bits. Default: the kernels, or the formulas for a small merge whose kernels are not compiled yet.
    copy_tokenizer, write_model_card
        False: leave it out of the output.
    keep_stages
        A directory, or a folder of an object store: every stage of the config is written there too, under its name, and read from there.
    max_reads
        Bytes that stages may read for each byte of the inputs; more is refused.
    overwrite
        Discard what an earlier merge left in `out`.
    nonfinite
        ``error``: stop at NaN or infinity, in an input or by overflow; ``warn``: write it, at its own element only, and
        report it.
    hash_inputs
        Hash every input file first, which reads it once more. A resumed merge then distinguishes a touched or copied file
        from a changed one. The manifest records the hashes.
    join
        Share the merge with other processes that make the same call, on any hosts that see `out` and the models: each
        takes shards that nobody has taken, and the call returns when all are done, by whomever. In place of True: what
        decides which shards this process takes.
    io
        ``direct``: past the page cache, except for cached data; ``read``: through it; ``mmap``: copies from a memory map.
    profile
        A JSON file to write: the seconds of every stage, which show what limited the speed.
    report
        A file to write after the merge: one page on what the method did, which needs no network. The output is read back,
        and the models once more. It takes the extra ``pages``. If it fails, a warning tells so; the merge is complete.
    progress
        Whether to show a bar (on terminals and in notebooks) or, elsewhere, lines on stderr.
    on_event
        Receives every event, warnings included, in the calling thread, instead of the bar and Python's warnings.
    stop
        Set it, from a different thread, to stop cleanly after the running pieces.
    signal_received
        Returns the number of the signal that set `stop`.

    Returns
    -------
    Summary
        What was read and written, how long it took, and how much of each task vector survived.

    Raises
    ------
    InputError
        If the config, a model or the memory does not allow the merge; nothing was written.
    OutputError
        If `out` holds anything other than this merge.
    WorldError
        If the disk is full, or the machine fails otherwise; the same call resumes.
    Stopped
        If `stop` was set; the same call resumes.

    Warns
    -----
    StreammergeWarning
        On doubtful points of the config or the models.

    Examples
    --------
    >>> streammerge.merge("ties.yml", "merged", memory="4GiB")  # doctest: +SKIP
    Summary(out='merged', already_complete=False, tensors=291, ...)
    """
    if io not in get_args(IoMode):
        raise InputError(f"io {printable(io)!r} is not one of {', '.join(get_args(IoMode))}")
    if nonfinite not in get_args(NonFinite):
        raise InputError(f"nonfinite {printable(nonfinite)!r} is not one of {', '.join(get_args(NonFinite))}")
    how = Options(
        overwrite, io, Path(profile) if profile else None, nonfinite, hash_inputs=hash_inputs, join=bool(join)
    )
    if not isinstance(join, bool):
        how = replace(how, taking=join)

    if report is not None:
        reporting.check_report("report", local_path(report, "a page"), as_path(out))

    planned: dict[str, Any] = {
        "memory": memory,
        "threads": threads,
        "device": device,
        "shard_size": shard_size,
        "seed": seed,
        "methods": methods,
    }
    run: dict[str, Any] = {
        "progress": progress,
        "on_event": on_event,
        "stop": stop,
        "signal_received": signal_received,
    }
    settled = read_config(config, methods)
    if keep_stages is not None:
        kept = as_path(keep_stages)
        _refuse_early(settled, {**planned, "kernels": kernels})
        for stage, place in kept_stages(settled, kept):
            _merge_settled(stage, place, {**planned, "kernels": kernels}, replace(how, profile=None), run)
        settled = read_from(settled, kept)
    planned |= {
        "kernels": kernels,
        "copy_tokenizer": copy_tokenizer,
        "write_model_card": write_model_card,
        "max_reads": max_reads,
    }
    return _merge_settled(settled, as_path(out), planned, how, run, None if report is None else Path(report))


def _refuse_early(config: MergeConfig, planned: Mapping[str, Any]) -> None:
    """Refuse stages that cannot all be merged, before the first is written.

    They are planned in one pass, which takes more memory and reads than one after the other; neither counts here.

    Raises
    ------
    InputError
        If a config or a model does not allow one of them.
    """
    with suppress(BudgetError):
        plan(config, **planned, max_reads=math.inf)


def _merge_settled(
    config: MergeConfig,
    out: Path,
    planned: Mapping[str, Any],
    how: Options,
    run: Mapping[str, Any],
    report: Path | None = None,
) -> Summary:
    """Plan and merge a config that has been read; without kernels if they cannot be compiled."""

    def decide(memory: str | int | None, **changes: Any) -> MergePlan:
        decided = plan(config, out=out, **{**planned, "memory": memory, **changes})
        if report is not None:
            reporting.check_room(decided)
        return decided

    memory = planned["memory"]
    run_plan = to_store.merge_to_store if is_url(out) else joined.join if how.join else execute
    with (
        controlled(
            run["on_event"], run["progress"], "merging", run["stop"], run["signal_received"]
        ) as control,
        listening(control.warn, control.check),
    ):
        decided = with_enough(decide, memory)
        try:
            summary = run_plan(decided, out, how, control, model_card, supply_gates)
        except CannotCompileError as error:
            control.warn(SLOWER.format(error))
            decided = decide(memory, kernels=False)
            summary = run_plan(decided, out, how, control, model_card, supply_gates)
        if report is not None:
            reporting.write_report(decided, out, summary, report, control)
        return summary
