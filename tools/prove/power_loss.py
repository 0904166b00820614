"""Cut the power of small merges at every file operation, in every way POSIX allows, and run them again.

    python tools/prove/power_loss.py [--seeds 1] [--random 8] [--chains 6]

Each merge's changes to the file system are recorded; for every cut of that log, every different directory that may be
found afterwards is laid out (`tests/laws/resume/power_loss.py` says which), examined for anything torn, and merged again to
the same bytes. Also after earlier kills in the same boot, after earlier power losses, after each sync failed once, and
while a finished merge is replaced. Prints a line for each; exits 1 with what was on the disk if any fails.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.laws.resume.power_loss import build, pending
from tests.laws.resume.scene import CASES, make_scene
from tests.laws.resume.trials import Trials


def plain(trials: Trials, chains: int) -> None:
    """Cut a merge that nothing else disturbs."""
    disk = trials.disk("disk")
    assert trials.run(disk)
    trials.try_all(disk, disk.begin)


def after_kills(trials: Trials, chains: int) -> None:
    """Cut a merge that was killed two or three times before in the same boot."""
    disk = trials.disk("disk")
    trials.run(disk)
    n_ops = len(disk.log) - disk.begin
    for number in range(chains):
        disk = trials.disk("disk")
        for _ in range(2 + number % 2):
            begin = trials.killed_at_random(disk, n_ops)
        assert trials.run(disk)
        trials.try_all(disk, begin)


def after_power_losses(trials: Trials, chains: int) -> None:
    """Cut a merge that resumes after the power was lost, and one that resumes after that."""
    first = trials.disk("disk")
    trials.run(first)
    losses = trials.losses(first, first.begin)
    for _ in range(chains):
        tree = trials.chance.choice(losses).tree(first.log)
        for _ in range(2):
            disk = trials.disk("disk", tree)
            assert trials.run(disk)
            trials.try_all(disk, disk.begin)
            tree = trials.chance.choice(trials.losses(disk, disk.begin)).tree(disk.log)


def after_failed_syncs(trials: Trials, chains: int) -> None:
    """Let each sync fail once, run again in the same boot, and cut that run."""
    limit, trials.limit = trials.limit, 40
    number = 0
    while True:
        disk = trials.disk("disk")
        disk.fail_sync = number
        if trials.run(disk):
            break
        begin = len(disk.log)
        assert trials.run(disk)
        trials.try_all(disk, begin)
        trials.try_one(build(disk.log, set(pending(disk.log)), {}), ended=True)
        number += 1
    trials.counts["syncs failed"] += number
    trials.limit = limit


def replaced(trials: Trials, chains: int) -> None:
    """Cut a merge with --overwrite over the merge of another config, finished or not."""
    with pytest.MonkeyPatch.context() as patch:
        case = "ties" if trials.scene.options == {} else "dare"
        old = make_scene(case, trials.scene.directory / "old", patch)
    for finished in (True, False):
        trials.try_replaced(trials.replacing(old, finished=finished), old)


KINDS: list[Callable[[Trials, int], None]] = [
    plain,
    after_kills,
    after_power_losses,
    after_failed_syncs,
    replaced,
]


def main() -> None:
    """Run the proof."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=1, help="how often, with other random choices")
    parser.add_argument(
        "--random", type=int, default=8, help="random losses at each cut, beside the systematic"
    )
    parser.add_argument("--chains", type=int, default=6, help="chains of interruptions before the power loss")
    parser.add_argument("--limit", type=int, help="most states of one log; default: all")
    args = parser.parse_args()
    total: Counter[str] = Counter()
    began = time.monotonic()
    for seed in range(args.seeds):
        for case in CASES:
            for kind in KINDS:
                with tempfile.TemporaryDirectory() as place, pytest.MonkeyPatch.context() as patch:
                    scene = make_scene(case, Path(place), patch)
                    trials = Trials(scene, random.Random(seed), limit=args.limit, n_random=args.random)
                    try:
                        kind(trials, args.chains)
                    except BaseException as error:
                        print(f"{case}, {kind.__name__}: FAILED", *getattr(error, "__notes__", []), sep="\n")
                        raise
                total.update(trials.counts)
                figures = ", ".join(f"{count} {what}" for what, count in trials.counts.items())
                print(f"{case}, {kind.__name__.replace('_', ' ')}: {figures}: all right", flush=True)
    figures = ", ".join(f"{count} {what}" for what, count in total.items())
    print(f"{figures}: nothing torn, no byte differs, nothing left over; {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
