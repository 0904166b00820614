"""Merge on a Ray cluster from and into an object store, and see which GPU each engine is given.

    python tools/prove/ray_places.py [store] [gpus]

`store`: two engines on two nodes of this host merge from a SeaweedFS server into it (`--on ray:2`); the output must have the
bytes that one process gives, and the bucket no part of an upload. Needs the extras `ray` and `objects`, and `weed`.

`gpus`: a cluster whose node claims to have two GPUs, and `--device cuda`: each actor must ask Ray for one, and each engine must
see one of its own in CUDA_VISIBLE_DEVICES. A program that tells what it was given stands in for the engine, so no GPU is needed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from streammerge.api import merge
from streammerge.launch.base import Needs
from streammerge.testing.models import config_for, output_bytes, write_models
from tests.s3_server import Server

SHAPES = {f"model.layers.{i}.weight": (256, 512) for i in range(8)}
SHARD = 600_000
GIB = 1 << 30
STAND_IN = """
import json, os, sys, time
told = os.environ["STREAMMERGE_TOLD"]
own = {"gpu": os.environ.get("CUDA_VISIBLE_DEVICES"), "arguments": sys.argv[1:]}
with open(f"{told}/{os.getpid()}.json", "w") as file:
    json.dump(own, file)
until = time.monotonic() + 60
while len(os.listdir(told)) < 2 and time.monotonic() < until:
    time.sleep(0.05)
time.sleep(2)
"""
PROOFS: dict[str, Callable[[Path], Mapping[str, Any]]] = {}


def proof(function: Callable[[Path], Mapping[str, Any]]) -> Callable[[Path], Mapping[str, Any]]:
    """Register a proof under the name of its function."""
    PROOFS[function.__name__] = function
    return function


@contextmanager
def cluster(*nodes: Mapping[str, Any]) -> Iterator[Any]:
    """Run a cluster on this host: a head without CPUs, and some nodes."""
    from ray.cluster_utils import Cluster

    small = {"object_store_memory": 80 << 20, "include_dashboard": False}
    made = Cluster(True, head_node_args={"num_cpus": 0, **small})
    try:
        for node in nodes:
            made.add_node(memory=2 * GIB, **node, **small)
        yield made
    finally:
        made.shutdown()


@proof
def store(work: Path) -> Mapping[str, Any]:
    """Merge from a store into it by two engines."""
    (work / "server").mkdir()
    models = write_models(work, 2, shapes=SHAPES)
    server = Server(work / "server")
    server.start()
    try:
        os.environ.update(server.environment())  # nodes take their credentials from their own environment
        for model in models:
            server.copy_in(model, "bench", f"in/{model.name}")
        text = json.dumps(config_for("dare_linear", models, parameters={"density": 0.4}), default=str)
        config = work / "config.json"
        config.write_text(text.replace(str(work), "s3://bench/in"))
        merge(config, work / "alone", shard_size=SHARD, progress=False)
        command = [
            sys.executable,
            "-m",
            "streammerge",
            "merge",
            str(config),
            "s3://bench/out",
            "--on",
            "ray:2",
        ]
        command += ["--memory", "700MiB", "--threads", "1", "--shard-size", str(SHARD), "--json"]
        with cluster({"num_cpus": 1}, {"num_cpus": 1}) as made:
            done = subprocess.run(
                command,
                env={**os.environ, "RAY_ADDRESS": made.address},
                capture_output=True,
                text=True,
                timeout=300,
            )
        assert done.returncode == 0, done.stderr[-2000:] + done.stdout[-2000:]
        found, expected = server.keys("bench", "out"), output_bytes(work / "alone")
        assert sorted(found) == sorted(expected), sorted(found)
        assert found == expected
        assert server.parts("bench", "out/") == []
        return {"bytes": "equal", "files": len(found)}
    finally:
        server.kill()


@proof
def gpus(work: Path) -> Mapping[str, Any]:
    """Give each of two engines a GPU of its own."""
    import ray

    from streammerge.launch.on_ray.driver import Driver
    from streammerge.launch.on_ray.room import room_for

    (work / "told").mkdir()
    (work / "streammerge").mkdir()
    (work / "streammerge" / "__init__.py").touch()
    (work / "streammerge" / "__main__.py").write_text(STAND_IN)  # `python -m` looks in its directory first
    os.environ["STREAMMERGE_TOLD"] = str(work / "told")
    with cluster({"num_cpus": 4, "num_gpus": 2}) as made:
        ray.init(address=made.address, log_to_driver=False)
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        room = room_for(Needs(None, GIB, 1, "cuda"), nodes)
        free: list[float] = []

        def watch() -> None:
            until = time.monotonic() + 60
            while len(list((work / "told").iterdir())) < 2 and time.monotonic() < until:
                time.sleep(0.1)
            time.sleep(1.0)  # Ray tells what is free once in a while
            free.append(ray.available_resources().get("GPU", 0.0))

        watching = threading.Thread(target=watch)
        watching.start()
        command = ["merge", "config.yml", str(work / "out"), "--join", "--json"]
        driver = Driver(command, work / "out", str(work), room, lambda event: None, threading.Event())
        try:
            driver.run()
        finally:
            watching.join()
            driver.end()
            ray.shutdown()
    told = [json.loads(path.read_text()) for path in (work / "told").iterdir()]
    assert room.count == 2
    assert room.resources["num_gpus"] == 1
    assert free == [0.0], free
    assert sorted(one["gpu"] for one in told) == ["0", "1"], told
    assert all(one["arguments"][-3:-1] == ["--device", "cuda"] for one in told), told
    return {"of 2 GPUs free": free[0], "seen by the engines": sorted(one["gpu"] for one in told)}


def main() -> None:
    """Run the proofs and print what was seen as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("proofs", nargs="*", choices=sorted(PROOFS))
    args = parser.parse_args()
    for name in args.proofs or sorted(PROOFS, reverse=True):
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as place:
            seen = PROOFS[name](Path(place))
        print(json.dumps({name: seen, "seconds": round(time.monotonic() - began, 1)}), flush=True)


if __name__ == "__main__":
    main()
