"""Share merges between two mounts of one networked file system, which neither locks nor sees what the other does at once.

    python tools/prove/two_mounts.py [--rounds 3]

Needs SeaweedFS (`weed`, in the extra `dev`), FUSE and the right to mount. A server's file tree is mounted twice, as two hosts
would mount it. In each round two processes on each mount share a merge with `--join`; in every second round one process of
each mount is killed on the way. Seen from both mounts, the output must have the bytes, the index and the manifest of one
process, and nothing besides.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from streammerge.api import merge
from streammerge.backends.cpu.compile import ensure_compiled
from streammerge.testing.models import config_for, output_bytes, write_models
from tests.s3_server import Server, program

SHAPES = {f"model.layers.{i}.weight": (400, 500) for i in range(12)}
SHARD = 500_000
STALE = 3.0
CASES = (
    ("dare_linear", {"density": 0.4}),
    ("ties", {"density": 0.3, "trim_scope": "model"}),
)


@contextmanager
def mounted(server: Server, place: Path) -> Iterator[Path]:
    """Mount the server's file tree."""
    place.mkdir()
    cache = place.with_name(f"{place.name}-cache")
    cache.mkdir()
    command = [
        *(program(), "mount", f"-filer={server.filer}", f"-dir={place}", "-filer.path=/shared"),
        *(f"-cacheDir={cache}", f"-localSocket={place}.sock", "-dirAutoCreate"),
    ]
    with (place.with_name(f"{place.name}.log")).open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        until = time.monotonic() + 30
        while not os.path.ismount(place):
            if time.monotonic() > until or process.poll() is not None:
                raise SystemExit(f"cannot mount: {place.with_name(f'{place.name}.log').read_text()[-500:]}")
            time.sleep(0.1)
        yield place
    finally:
        process.terminate()
        process.wait(20)


def start(config: Path, out: Path, told: Path) -> subprocess.Popen[bytes]:
    """Start one process that takes part."""
    command = [
        sys.executable,
        "-m",
        "streammerge",
        "merge",
        str(config),
        str(out),
        "--join",
        "--memory",
        "600MiB",
    ]
    with told.open("wb") as log:
        return subprocess.Popen(
            [*command, "--threads", "1", "--shard-size", str(SHARD)], stdout=log, stderr=log
        )


def one_round(number: int, mounts: list[Path], work: Path, chance: random.Random) -> int:
    """Share one merge; return the number of processes that were killed."""
    method, parameters = CASES[number % len(CASES)]
    models = [work / name for name in ("base", "m1", "m2")]
    config = work / f"{number}.json"
    config.write_text(json.dumps(config_for(method, models, parameters=parameters, seed=number), default=str))
    name, kills = f"out{number}", number % 4 >= 2
    alone = work / f"alone{number}"
    merge(config, alone, shard_size=SHARD, threads=1, progress=False)
    running = [
        start(config, place / name, work / f"{number}-{place.name}-{i}.log")
        for place in mounts
        for i in range(2)
    ]
    killed = 0
    if kills:
        time.sleep(chance.uniform(2.0, 5.0))
        for victim in (running[0], running[2]):
            if victim.poll() is None:
                victim.kill()
                killed += 1
    codes = [process.wait(180) for process in running]
    expected = {0, -signal.SIGKILL} if kills else {0}
    said = [path.read_text()[-500:] for path in sorted(work.glob(f"{number}-*.log"))]
    assert set(codes) <= expected, (codes, said)
    assert 0 in codes, (codes, said)
    time.sleep(1.5)  # what a mount remembers of a directory goes stale
    for place in mounts:
        found = output_bytes(place / name)
        assert found == output_bytes(alone), (place.name, sorted(found))
        left = [path.name for path in (place / name).iterdir() if path.name.endswith(".partial")]
        assert not left, left
        assert not (place / name / ".streammerge").exists()
    return killed


def main() -> None:
    """Run the proof and print figures as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    os.environ["STREAMMERGE_STALE_SECONDS"] = str(STALE)
    ensure_compiled()
    began, killed, chance = time.monotonic(), 0, random.Random(args.seed)
    with tempfile.TemporaryDirectory() as place:
        work = Path(place)
        write_models(work, 2, shapes=SHAPES)
        (work / "server").mkdir()
        server = Server(work / "server")
        server.start()
        try:
            with mounted(server, work / "a") as first, mounted(server, work / "b") as second:
                for number in range(args.rounds):
                    killed += one_round(number, [first, second], work, chance)
        finally:
            server.kill()
    seconds = round(time.monotonic() - began, 1)
    print(json.dumps({"rounds": args.rounds, "killed": killed, "seconds": seconds}))


if __name__ == "__main__":
    main()
