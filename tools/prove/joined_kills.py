"""Kill processes that share a merge at random moments, start others in their place, and compare the bytes at the end.

    python tools/prove/joined_kills.py [--rounds 50] [--seed 0]

Each round: three forks of a warm process share a small merge (DARE, TIES with two rounds over the whole model, TIES with
statistics of each tensor before one of the model); one to four times one of them is killed with SIGKILL, or stopped past
the time after which it counts as dead and woken later. In place of a killed one a new one starts. At the end the output must
have the bytes that one process gives, and nothing besides.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # a process of one thread may be forked
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.laws.joined.maker import DARE, MAJORITY, WHOLE, Maker, prepare
from tests.laws.joined.scene import LATE, Scene
from tests.laws.resume.forks import kill_at, wait


def one_round(one: Scene, chance: random.Random, figures: Counter[str]) -> None:
    """Share one merge between processes that die."""
    names = iter(range(1000))

    def start() -> int:
        return one.start(lambda: kill_at(None, slow=0.02), str(next(names)))

    running = [start() for _ in range(3)]
    for _ in range(chance.randint(1, 4)):
        time.sleep(chance.uniform(0.05, 0.6))
        victim = running.pop(chance.randrange(len(running)))
        asleep = chance.random() < 0.3
        try:
            os.kill(victim, signal.SIGSTOP if asleep else signal.SIGKILL)
        except ProcessLookupError:
            continue
        if asleep:
            time.sleep(LATE)
            os.kill(victim, signal.SIGCONT)
            running.append(victim)
            figures["stopped and woken"] += 1
            continue
        landed = wait(victim) == -signal.SIGKILL
        figures["killed"] += landed
        running.append(start())
    codes = [wait(number, 120) for number in running]
    said = [path.read_text() for path in sorted(one.directory.glob("*.told"))]
    assert codes == [0] * len(running), (codes, said)
    one.finished()
    figures["rounds"] += 1


def main() -> None:
    """Run the proof and print figures as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    chance, figures, began = random.Random(args.seed), Counter[str](), time.monotonic()
    prepare()
    with tempfile.TemporaryDirectory() as place:
        scenes = []
        for number, case in enumerate((DARE, WHOLE, MAJORITY)):
            directory = Path(place) / str(number)
            directory.mkdir()
            scenes.append(Maker(directory)(*case))
        for turn in range(args.rounds):
            one_round(scenes[turn % len(scenes)], chance, figures)
    print(json.dumps({**figures, "seconds": round(time.monotonic() - began, 1)}))


if __name__ == "__main__":
    main()
