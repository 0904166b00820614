"""Let engines, actors, nodes, the command and the head of a Ray cluster die in a merge, and compare the bytes at the end.

    python tools/prove/ray_kills.py [--methods 4] [--moments 1 5 11] [--what engine actor sleep node stop head]

Each case is one merge by three engines on three nodes of this host, held at a number of records while something dies: one
engine or one actor is killed with SIGKILL; one engine is stopped past the time after which it counts as dead, and woken when
the others have finished; a node is removed without a word; the command is stopped as by Ctrl-C; the head of the cluster is
killed. After the last two the same command goes on, on a new cluster after a lost head. The output must have the bytes that
one process gives, and nothing besides. Needs the extra `ray`; a case takes 10 to 30 seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from streammerge.errors import Stopped, StreammergeError, WorldError
from streammerge.output.status import status_of
from tests.launch.test_ray import DARE, WHOLE, Case, parent_of, processes, start_cluster, wait

STALE = 3.0
METHODS: list[tuple[str, dict[str, Any]]] = [
    DARE,
    WHOLE,
    ("ties", {"density": 0.4, "zero_sign": "majority", "ties": "drop", "weight": 0.3}),
    ("linear", {}),
]
"""Per tensor, over the whole model, of each tensor and then of the whole model, and without statistics."""
EVENTS: dict[str, Callable[[Any, Case], None]] = {}


def event(function: Callable[[Any, Case], None]) -> Callable[[Any, Case], None]:
    """Register what dies, and how the merge goes on, under the name of the function."""
    EVENTS[function.__name__] = function
    return function


def engine_of(one: Case) -> int:
    """Return one engine of a merge."""
    return processes("--units-from-stdin", one.out)[0]


def ended_well(one: Case) -> None:
    """Let the merge go on to its end, which must be a good one."""
    summary = one.end()
    assert not isinstance(summary, Exception), (summary, one.warnings())


@event
def engine(cluster: Any, one: Case) -> None:
    """An engine is killed."""
    os.kill(engine_of(one), signal.SIGKILL)
    ended_well(one)


@event
def actor(cluster: Any, one: Case) -> None:
    """The actor of an engine is killed."""
    os.kill(parent_of(engine_of(one)), signal.SIGKILL)
    ended_well(one)


@event
def sleep(cluster: Any, one: Case) -> None:
    """An engine stops, and wakes up when the merge is finished."""
    number = engine_of(one)
    os.kill(number, signal.SIGSTOP)
    try:
        time.sleep(STALE)
        one.allow(1000)
        wait(lambda: not one.is_running or is_finished(one))
    finally:
        os.kill(number, signal.SIGCONT)
    ended_well(one)


def is_finished(one: Case) -> bool:
    """Return whether a merge is committed."""
    try:
        return status_of(one.out).finished
    except StreammergeError:
        return False


@event
def node(cluster: Any, one: Case) -> None:
    """A node is lost, and a new one comes."""
    cluster.remove_node(cluster.nodes.pop(), allow_graceful=False)
    ended_well(one)
    cluster.more()


@event
def stop(cluster: Any, one: Case) -> None:
    """The command is stopped, and runs again."""
    one.stop.set()
    one.allow(1000)
    result = one.end()
    assert isinstance(result, Stopped), result
    one.stop.clear()
    one.start("ray:3", 0)
    ended_well(one)


@event
def head(cluster: Any, one: Case) -> None:
    """The head of the cluster is killed; the command runs again on a new one."""
    cluster.remove_node(cluster.head_node, allow_graceful=False)
    wait(lambda: not one.is_running)
    assert isinstance(one.result, WorldError), one.result
    one.allow(1000)
    wait(lambda: not processes("--units-from-stdin", one.out))
    cluster.shutdown()
    again = start_cluster()
    try:
        os.environ["RAY_ADDRESS"] = again.address
        one.start("ray:3", 0)
        ended_well(one)
    finally:
        again.shutdown()


def main() -> None:
    """Run the cases and print figures as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", type=int, default=len(METHODS), help="only so many methods")
    parser.add_argument(
        "--moments", type=int, nargs="+", default=[1, 5, 11], help="records at which something dies"
    )
    parser.add_argument("--what", nargs="+", choices=sorted(EVENTS), default=sorted(EVENTS))
    args = parser.parse_args()
    os.environ["STREAMMERGE_STALE_SECONDS"] = str(STALE)
    figures, began = Counter[str](), time.monotonic()
    cluster = start_cluster()
    try:
        for what in args.what:
            for case in METHODS[: args.methods]:
                for moment in args.moments:
                    with tempfile.TemporaryDirectory() as place:
                        os.environ["RAY_ADDRESS"] = cluster.address
                        one = Case(Path(place), case)
                        if moment > one.records:
                            continue
                        os.environ["STREAMMERGE_GATE"] = str(one.gate)
                        one.start("ray:3", moment)
                        EVENTS[what](cluster, one)
                        one.check()
                        figures[what] += 1
                        print(f"{what} at {moment} of {case}: well", file=sys.stderr, flush=True)
                    if what == "head":
                        cluster = start_cluster()
    finally:
        cluster.shutdown()
    print(json.dumps({**figures, "seconds": round(time.monotonic() - began, 1)}))


if __name__ == "__main__":
    main()
