"""`verify`: check an output by reading and recomputing it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from streammerge.api.deciding import plan
from streammerge.api.feedback import OnEvent, controlled
from streammerge.api.gates import supply_gates
from streammerge.api.reading import ConfigLike
from streammerge.engine.recompute import check_contents, check_made_from, recompute
from streammerge.engine.recompute_adapter import recompute_adapter
from streammerge.engine.shared_verify import verify_together
from streammerge.errors import InputError
from streammerge.events import Control, Event
from streammerge.io.volumes import as_path
from streammerge.output.check import Verdict, manifest_of
from streammerge.output.check import verify as verify_files

DEFAULT_SAMPLE = 16
"""Default number of pieces that `verify` recomputes."""


def verify(
    out: str | os.PathLike[str],
    *,
    against: ConfigLike | None = None,
    sample: int | None = DEFAULT_SAMPLE,
    seed: int = 0,
    memory: str | int | None = None,
    methods: str | os.PathLike[str] | None = None,
    join: bool = False,
    progress: bool = True,
    on_event: OnEvent | None = None,
) -> Verdict:
    """Re-read a finished output and, on request, recompute a part of it from the inputs.

    Parameters
    ----------
    out
        The directory.
    against
        The config that `out` was made from: a sample of it is recomputed by the torch formulas and compared bit by bit.
    sample
        Number of pieces, of a million elements each if the method may be cut; None: the whole output, after checking the
        content hashes of the inputs if the manifest records them.
    seed
        Seed of the choice of the sample. (The merge's own seed is recorded in the manifest.)
    memory
        Bound of the process's peak resident memory during recomputation; default: half of what is free.
    methods
        A Python file with methods of your own.
    join
        Share the reading with other processes that make the same call, on any hosts that see `out`; each returns the whole
        verdict.
    progress
        Whether to show progress on stderr.
    on_event
        Receives every event, in the calling thread, instead.

    Returns
    -------
    Verdict
        Its ``problems``, one line each, are empty if the output is as it was written.

    Raises
    ------
    StreammergeError
        If there is no finished merge in `out`, if it was made from a different config or different inputs, or if the
        machine fails. Damage is reported in the verdict.

    Examples
    --------
    >>> streammerge.verify("merged", against="ties.yml").problems  # doctest: +SKIP
    ()
    """
    with controlled(on_event, progress, "verifying") as control:
        if join:
            if against is not None:
                raise InputError("--join shares out the reading of OUT; it does not go with --against")
            return verify_together(as_path(out), lambda n: control.emit(Event("verify", {"bytes_read": n})))
        return _verify(
            as_path(out),
            against,
            sample,
            seed,
            memory,
            methods,
            lambda nbytes: control.emit(Event("verify", {"bytes_read": nbytes})),
        )


def _verify(
    out: Path,
    against: ConfigLike | None,
    sample: int | None,
    seed: int,
    memory: str | int | None,
    methods: str | os.PathLike[str] | None,
    on_tick: Callable[[int], None],
) -> Verdict:
    if against is None:
        return verify_files(out, on_tick)
    manifest = manifest_of(out)
    decided = plan(
        against,
        memory=memory,
        device="cpu",
        seed=manifest["seed"],
        methods=methods,
        kernels=False,
        out=out,
    )
    name = "the config" if isinstance(against, Mapping) else str(against)
    check_made_from(decided, out, manifest, name)
    if sample is None:
        check_contents(decided, out, manifest, on_tick)
    verdict = verify_files(out, on_tick)
    try:
        supply_gates(decided, Control())
        again = recompute if decided.adapter is None else recompute_adapter
        done = again(decided, out, manifest, sample=sample, seed=seed, on_tick=on_tick)
    except InputError:
        if not verdict.problems:
            raise
        return verdict  # it says why the tensors cannot be found
    return replace(verdict, problems=(*verdict.problems, *done.problems), recomputed=done)
