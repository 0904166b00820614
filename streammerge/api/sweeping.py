"""`sweep`: from one config to an output for every point of a grid."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Literal, get_args

from streammerge.api.deciding import options_of
from streammerge.api.feedback import OnEvent, controlled
from streammerge.api.reading import ConfigLike, read_config
from streammerge.api.sweep_run import SweepRun, Wishes
from streammerge.engine.first_use import CannotCompileError
from streammerge.engine.scoring import check_command
from streammerge.engine.session import NonFinite, Options
from streammerge.errors import ConfigError, InputError, printable
from streammerge.io.reader import IoMode
from streammerge.io.volumes import local_path
from streammerge.output.sweep_record import Row
from streammerge.planning.options import DEFAULT_SHARD_SIZE, MAX_READS
from streammerge.planning.prepare import SLOWER
from streammerge.records import dataclass
from streammerge.units import nbytes_of

Keep = Literal["all", "best"] | int


@dataclass(frozen=True)
class Sweep:
    """The result of a sweep."""

    out: str
    points: Mapping[str, Row]
    """What became of each point, by the name of its directory, in the order of the grid."""
    best: str | None
    """The first point with the highest score; None without scores."""
    bytes_read: int
    bytes_written: int
    seconds: float

    @property
    def failed(self) -> tuple[str, ...]:
        """The points that could not be merged, or whose command gave no score."""
        return tuple(name for name, row in self.points.items() if row.reason)


def sweep(
    config: ConfigLike,
    out: str | os.PathLike[str],
    *,
    score: str | None = None,
    score_timeout: float | None = None,
    keep: Keep = "all",
    disk: str | int | None = None,
    memory: str | int | None = None,
    threads: int | None = None,
    device: str = "auto",
    shard_size: str | int = DEFAULT_SHARD_SIZE,
    seed: int | None = None,
    methods: str | os.PathLike[str] | None = None,
    kernels: bool | None = None,
    copy_tokenizer: bool = True,
    write_model_card: bool = True,
    max_reads: float = MAX_READS,
    overwrite: bool = False,
    nonfinite: NonFinite = "error",
    hash_inputs: bool = False,
    io: IoMode = "direct",
    progress: bool = True,
    on_event: OnEvent | None = None,
    stop: threading.Event | None = None,
    signal_received: Callable[[], int | None] = lambda: None,
) -> Sweep:
    """Merge every point of a config's `sweep:` into a directory of its own below `out`; the same call resumes.

    Every point has the bytes that `merge` gives with its values. The inputs are read once for as many points as memory
    and disk have room for.

    Parameters
    ----------
    config
        Path of a YAML file, its text (more than one line), or the equivalent mapping; it has the key `sweep`.
    out
        The directory of all points.
    score
        A shell command that is run for each finished point, with ``{}`` replaced by its directory. The last line that it
        prints is a number; higher is better.
    score_timeout
        Seconds after which the command is ended; the point then has no score. Default: never.
    keep
        ``all``, ``best``, or a number of best points; the others are removed once they are scored.
    disk
        Most bytes of all outputs together, ``"200GB"`` or a number; default: what is free.
    overwrite
        Discard what an earlier sweep left in `out`.
    memory, threads, device, shard_size, seed, methods, kernels, copy_tokenizer, write_model_card, max_reads
        As `merge`; `memory` holds for all points together.
    nonfinite, hash_inputs, io, progress, on_event, stop, signal_received
        As `merge`.

    Returns
    -------
    Sweep
        Score, seconds and reason of each point, and the best; ``sweep.csv`` in `out` has the same.

    Raises
    ------
    InputError
        If the config, a value, a model, the memory or `disk` does not allow it; nothing was written.
    OutputError
        If `out` holds anything other than this sweep.
    WorldError
        If the disk is full, or the machine fails otherwise; the same call resumes.
    Stopped
        If `stop` was set; the same call resumes.

    Examples
    --------
    >>> streammerge.sweep("ties.yml", "swept", score="python score.py {}").best  # doctest: +SKIP
    'lambda=0.7,density=0.2'
    """
    began = time.monotonic()
    for name, value, kinds in (("io", io, IoMode), ("nonfinite", nonfinite, NonFinite)):
        if value not in get_args(kinds):
            raise InputError(f"{name} {printable(value)!r} is not one of {', '.join(get_args(kinds))}")
    wishes = Wishes(score, _seconds(score_timeout, score), _kept(keep, score), nbytes_of(disk))
    if score is not None:
        check_command(score)
    parsed = read_config(config, methods)
    if not parsed.sweep:
        raise ConfigError(
            f"{parsed.where}: no key 'sweep', so there is one merge: run `streammerge merge`, or add "
            "sweep: {lambda: [0.3, 0.5]}"
        )
    planning = options_of(
        memory=memory,
        threads=threads,
        device=device,
        kernels=kernels,
        shard_size=shard_size,
        seed=seed,
        max_reads=max_reads,
        copy_tokenizer=copy_tokenizer,
        write_model_card=write_model_card,
    )
    how = Options(overwrite, io, None, nonfinite, hash_inputs=hash_inputs)
    with controlled(on_event, progress, "sweeping", stop, signal_received) as control:
        run = SweepRun(parsed, local_path(out, "a sweep"), planning, how, wishes, control)
        try:
            record = run.run()
        except CannotCompileError as error:
            control.warn(SLOWER.format(error))
            run = SweepRun(
                parsed, local_path(out, "a sweep"), replace(planning, kernels=False), how, wishes, control
            )
            record = run.run()
    return Sweep(
        str(out),
        dict(record.rows),
        record.best,
        run.bytes_read,
        run.bytes_written,
        time.monotonic() - began,
    )


def _kept(keep: Keep, command: str | None) -> int | None:
    """Return the number of points to keep; None: all."""
    if keep == "all":
        return None
    number = 1 if keep == "best" else keep
    if isinstance(number, bool) or not isinstance(number, int) or number < 1:
        raise InputError(f"--keep {printable(keep)!r}: give all, best, or a whole number of 1 or more")
    if command is None:
        raise InputError(f"--keep {keep} keeps the points with the best scores: give a command with --score")
    return number


def _seconds(timeout: float | None, command: str | None) -> float | None:
    if timeout is None:
        return None
    if command is None:
        raise InputError("--score-timeout goes with --score")
    if isinstance(timeout, bool) or not timeout > 0:
        raise InputError(f"--score-timeout {printable(timeout)!r}: give a number of seconds above 0")
    return float(timeout)
