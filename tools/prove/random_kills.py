"""Kill and signal merges at random, start several at once, and print figures.

    python tools/prove/random_kills.py [--kills 120] [--signals 40] [--rounds 5] [--seed 0]

Small merges of four methods, of one shard and of several, in forks of one warm process (`tests/laws/resume/forks.py`). Each
is killed one to three times in a row, at a random call that changes the file system (a write is left half done) or at
a random moment, examined for anything torn, then run to its end and compared byte for byte. Larger merges, with their
memory: tools/prove/kill_and_resume.py.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def main() -> None:
    """Run the proof."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=120)
    parser.add_argument("--signals", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=5, help="rounds of three merges started at once")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    numbers = {"kills": args.kills, "signals": args.signals, "starts": args.rounds}
    options = [word for name, number in numbers.items() for word in (f"--{name}", str(number))]
    with tempfile.TemporaryDirectory() as place:
        command = [sys.executable, "-m", "tests.laws.resume.forks", place, *options]
        subprocess.run([*command, "--seed", str(args.seed)], cwd=ROOT, check=True)


if __name__ == "__main__":
    main()
