"""`verify`: an output read again, and computed again."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from streammerge.api.deciding import ConfigLike, plan
from streammerge.engine.recompute import check_contents, check_made_from, recompute
from streammerge.engine.session import Event
from streammerge.engine.verify import Verdict, manifest_of
from streammerge.engine.verify import verify as verify_files
from streammerge.errors import InputError

DEFAULT_SAMPLE = 16
"""Pieces that `verify` recomputes."""


def verify(
    out: str | os.PathLike[str],
    *,
    against: ConfigLike | None = None,
    sample: int | None = DEFAULT_SAMPLE,
    seed: int = 0,
    memory: str | int | None = None,
    methods: str | os.PathLike[str] | None = None,
    on_event: Callable[[Event], None] = lambda event: None,
) -> Verdict:
    """Re-read a finished output and, on request, compute some of it once more from the inputs.

    Parameters
    ----------
    against
        The config that `out` was made from: a sample of it is recomputed by the torch formulas and compared bit by bit.
    sample
        How many pieces, of a million elements where the method may be cut; None: all of the output, and first the
        content hashes of the inputs, where the manifest records them.
    seed
        Of the choice of the sample; the same pieces for the same seed. (The merge's own seed is the manifest's.)
    memory
        Bound of the process's peak resident memory while it recomputes; default: half of what is free.
    methods
        A Python file with methods of your own.
    on_event
        Called from the calling thread with progress.

    Raises
    ------
    StreammergeError
        If there is no finished merge in `out`, or it was made from another config or other inputs, or the machine
        fails. What is damaged is in the verdict.
    """
    out = Path(out)

    def on_tick(nbytes: int) -> None:
        on_event(Event("verify", {"bytes_read": nbytes}))

    if against is None:
        return verify_files(out, on_tick)
    manifest = manifest_of(out)
    decided = plan(
        against, memory=memory, device="cpu", seed=manifest["seed"], methods=methods, kernels=False
    )
    name = "the config" if isinstance(against, Mapping) else str(against)
    check_made_from(decided, out, manifest, name)
    if sample is None:
        check_contents(decided, out, manifest, on_tick)
    verdict = verify_files(out, on_tick)
    try:
        done = recompute(decided, out, manifest, sample=sample, seed=seed, on_tick=on_tick)
    except InputError:
        if not verdict.problems:
            raise
        return verdict  # which says why the tensors cannot be found
    return replace(verdict, problems=(*verdict.problems, *done.problems), recomputed=done)
