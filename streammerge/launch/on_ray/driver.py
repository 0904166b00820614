"""The driver of a merge on a Ray cluster, in a process of its own; started by `streammerge.launch.launchers.ray`.

::

    connect ──> actors, placed by Ray ──> checked: versions, OUT is seen ──> each starts its engine
    an engine offers units ──> one is a task of its actor, named after it ──> recorded
    an actor is lost ──> its units go to the others at once; Ray restarts it, where there is room

It tells events on stdout, and ends when its stdin does.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import ActorDiedError, RayActorError, RayError

from streammerge.errors import InputError, Stopped, StreammergeError, WorldError, printable
from streammerge.io.volumes import as_path, is_url
from streammerge.launch.base import MOST_RESTARTS, Needs
from streammerge.launch.handing_out import HandingOut
from streammerge.launch.on_ray.actor import Engine
from streammerge.launch.on_ray.connecting import connect
from streammerge.launch.on_ray.marker import Marker
from streammerge.launch.on_ray.room import Room, room_for
from streammerge.output.heartbeat import signs_of, stale_seconds
from streammerge.output.place import place_of
from streammerge.output.working_files import working_files
from streammerge.records import dataclass

_POLL_SECONDS = 0.25
_LOOK_SECONDS = 5.0
_CALLS = 16
"""Calls of an actor that may run at once: it listens, does two units, and is told to look."""
_GRACE_SECONDS = 15.0
"""Seconds between the end of the first engine of a finished merge and the end of all."""
_PATIENCE = 25.0
"""Seconds in which engines stop cleanly."""
_WAITING_SECONDS = 30.0
"""Seconds after which the user is told that Ray has found no room yet."""


@dataclass
class _Actor:
    """An actor, and the calls of it that have not returned."""

    handle: Any
    host: str = ""
    heard: int = 0
    """Number of events that its engine has told."""
    token: str = ""
    """The token of its engine, which its sign of life has."""
    calls: dict[Any, tuple[Callable[[_Actor, Any], None], str]] = field(default_factory=dict)
    """What takes the result of each call, and the unit that it is about."""
    error: str = ""
    """The error that its engine has told; it says why the engine ends."""
    ended: bool = False


class Driver:
    """Runs one merge on the cluster that this process is connected to.

    Parameters
    ----------
    command
        The arguments of ``streammerge`` in each engine.
    out
        The output; its path is the same on all nodes.
    directory
        The directory that relative paths of the command start from.
    tell
        Receives the events for the user.
    """

    def __init__(
        self,
        command: Sequence[str],
        out: Path,
        directory: str,
        room: Room,
        tell: Callable[[Mapping[str, Any]], None],
        stop: threading.Event,
    ) -> None:
        self._command, self._out, self._directory, self._room = command, out, directory, room
        self._tell, self._stop = tell, stop
        self._units, self._marker = HandingOut(), Marker(out, tell)
        self._signs = working_files(place_of(out).state)
        remote = ray.remote(
            max_restarts=MOST_RESTARTS, max_concurrency=_CALLS, scheduling_strategy="SPREAD", **room.resources
        )(Engine)
        self._actors = [_Actor(remote.remote()) for _ in range(room.count)]
        self._last = "no engine has begun"
        self._done = {"bytes_read": 0, "bytes_written": 0}
        self._finished: float | None = None
        self._next_look = 0.0
        self._environment = {k: v for k, v in os.environ.items() if k.startswith("STREAMMERGE_")}

    def run(self) -> None:
        """Run until the merge is finished.

        Raises
        ------
        StreammergeError
            What one engine met and all would meet, or the last failure if no actor is left.
        """
        began = time.monotonic()
        for actor in self._actors[: 1 if self._began_alone() else None]:
            self._greet(actor)
        while not self._is_over():
            if self._stop.is_set():
                raise Stopped(signal.SIGTERM)
            self._take()
            self._give()
            if began and time.monotonic() - began > _WAITING_SECONDS:
                began = 0.0
                self._tell_of_room()
        self._tell({"event": "done", **self._done})

    def _began_alone(self) -> bool:
        """Return whether one process has begun the merge: then the first engine takes over what it has finished."""
        return not is_url(self._out) and place_of(self._out).journal.exists()

    def _is_over(self) -> bool:
        if all(actor.ended for actor in self._actors):
            if self._finished is None:
                raise WorldError(self._last)
            return True
        return self._finished is not None and time.monotonic() - self._finished > _GRACE_SECONDS

    def _tell_of_room(self) -> None:
        waiting = sum(not actor.host for actor in self._actors)
        if waiting:
            self._warn(
                f"{waiting} of {len(self._actors)} engines wait for room in the cluster: each takes {self._room.each}"
            )

    # --- calls

    def _call(self, actor: _Actor, ref: Any, then: Callable[[_Actor, Any], None], unit: str = "") -> None:
        actor.calls[ref] = (then, unit)

    def _take(self) -> None:
        """Take what has returned, and wait a moment for it."""
        by_ref = {ref: actor for actor in self._actors for ref in actor.calls}
        if not by_ref:
            self._stop.wait(_POLL_SECONDS)
            return
        ready, _ = ray.wait(list(by_ref), num_returns=len(by_ref), timeout=0)
        if not ready:
            ready, _ = ray.wait(list(by_ref), num_returns=1, timeout=_POLL_SECONDS)
        for ref in ready:
            actor = by_ref[ref]
            if ref not in actor.calls:
                continue
            then, _ = actor.calls.pop(ref)
            try:
                result = ray.get(ref)
            except RayActorError as error:
                self._lose(actor, error)
                continue
            then(actor, result)

    def _give(self) -> None:
        self._look_for_silent()
        for number, unit in self._units.next():
            actor = self._actors[number]
            if unit:
                name = unit.partition("/")[2]
                self._call(actor, actor.handle.do.options(name=name).remote(unit), self._did, unit)
            else:
                self._call(actor, actor.handle.look.remote(), lambda actor, result: None)

    def _did(self, actor: _Actor, how: str) -> None:
        """Nothing is left to do: the engine's events have told what became of the unit."""

    def _look_for_silent(self) -> None:
        """Take note of engines without a sign of life, at most as often as they give one."""
        if time.monotonic() < self._next_look:
            return
        self._next_look = time.monotonic() + min(_LOOK_SECONDS, stale_seconds() / 6)
        signs = {sign.worker: sign for sign in signs_of(self._signs)}
        self._units.silent(
            {
                number
                for number, actor in enumerate(self._actors)
                if actor.token in signs and not signs[actor.token].is_fresh
            }
        )

    # --- the life of an actor

    def _greet(self, actor: _Actor) -> None:
        self._marker.write()
        self._call(actor, actor.handle.hello.remote(self._marker.path), self._check)

    def _check(self, actor: _Actor, told: Mapping[str, Any]) -> None:
        """Start the engine of an actor whose node has the same versions and sees the output."""
        self._marker.check(told)
        actor.host = printable(told["host"], 80)
        if all(one.host or one.ended for one in self._actors):
            self._marker.remove()
        shown = [*self._command, *self._room.options, "--units-from-stdin"]
        self._call(actor, actor.handle.begin.remote(shown, self._environment, self._directory), self._listen)

    def _listen(self, actor: _Actor, _: object = None) -> None:
        self._call(actor, actor.handle.heard.remote(actor.heard), self._hear)

    def _hear(self, actor: _Actor, events: Sequence[Mapping[str, Any]]) -> None:
        actor.heard += len(events)
        number = self._actors.index(actor)
        for event in events:
            kind = event.get("event")
            if kind == "offer":
                actor.token = str(event["worker"])
                self._units.offer(number, [str(unit) for unit in event["units"]])
                self._greet_the_others()
            elif kind == "recorded":
                self._units.recorded(number, str(event["unit"]))
            elif kind == "declined":
                self._units.given_back(number, str(event["unit"]))
            elif kind == "warning":
                self._tell(event)
            elif kind == "done":
                for name in self._done:
                    self._done[name] += int(event[name])
            elif kind == "error":
                actor.error = str(event["message"])
            elif kind == "ended":
                self._end(actor, event)
                return
        self._listen(actor)

    def _greet_the_others(self) -> None:
        for actor in self._actors:
            if not (actor.host or actor.calls or actor.ended):
                self._greet(actor)

    def _end(self, actor: _Actor, event: Mapping[str, Any]) -> None:
        """Take note that an engine has ended; let Ray restart its actor if it failed."""
        code = event["code"]
        if code == 0:
            self._units.lost(self._actors.index(actor))
            actor.ended = True
            actor.calls.clear()
            self._finished = self._finished or time.monotonic()
            return
        told = actor.error or str(event["last"]) or f"exit code {code}"
        if code == 2:
            raise InputError(f"{told} (on node {actor.host})")
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else told
        self._last = f"{how} (on node {actor.host})"
        self._warn(f"the engine on node {actor.host} ended: {how}: its actor is restarted")
        ray.kill(actor.handle, no_restart=False)
        self._again(actor)

    def _lose(self, actor: _Actor, error: RayActorError) -> None:
        """Give the units of a lost actor to the others; it comes back if Ray finds a place for it."""
        if "No module named" in str(error):
            raise InputError(
                "a node of the cluster cannot import streammerge: install the same version on all nodes"
            )
        if isinstance(error, ActorDiedError) and not actor.host:
            actor.ended = True
            actor.calls.clear()
            self._warn(f"an actor is given up: {_first_line(error)}")
            return
        self._last = f"the actor on node {actor.host} was lost"
        if self._finished is None:
            self._warn(f"{self._last}: its shards go to the others, and Ray restarts it where there is room")
        self._again(actor)

    def _again(self, actor: _Actor) -> None:
        self._units.lost(self._actors.index(actor))
        actor.calls.clear()
        actor.host, actor.heard, actor.token, actor.error = "", 0, "", ""
        self._greet(actor)

    def _warn(self, message: str) -> None:
        self._tell({"event": "warning", "message": message})

    def end(self) -> None:
        """Stop all engines, cleanly if they can; with this process Ray ends their actors."""
        self._marker.remove()
        refs = [actor.handle.stop.remote() for actor in self._actors if actor.host and not actor.ended]
        with contextlib.suppress(RayError):
            if refs:
                ray.wait(refs, num_returns=len(refs), timeout=_PATIENCE)


def _first_line(error: Exception) -> str:
    return printable((str(error).splitlines() or [type(error).__name__])[0], 300)


def _last_line(error: Exception) -> str:
    """Return what went wrong: an exception in an actor has its traceback before it."""
    told = str(error).splitlines() or [""]
    return printable(f"{type(error).__name__}: {told[-1]}", 300)


def tell(event: Mapping[str, Any]) -> None:
    """Tell an event to the process that started this one."""
    print(json.dumps(event), flush=True)


def stop_with_stdin(connected: threading.Event) -> threading.Event:
    """Return an event that the end of stdin sets; before the cluster is connected, it ends this process."""
    stop = threading.Event()

    def wait() -> None:
        while os.read(0, 1):
            pass
        if not connected.is_set():
            os._exit(1)
        stop.set()

    threading.Thread(target=wait, name="stdin", daemon=True).start()
    return stop


def main() -> int:
    """Run the driver; return its exit code."""
    told = json.loads(sys.argv[1])
    connected = threading.Event()
    stop = stop_with_stdin(connected)
    try:
        with connect(Needs(**told["needs"]), tell) as nodes:
            connected.set()
            room = room_for(Needs(**told["needs"]), nodes)
            if room.fit < room.count:
                tell(
                    {
                        "event": "warning",
                        "message": f"the cluster has room for {room.fit} of {room.count} engines: the others wait until Ray finds some",
                    }
                )
            command = told["command"]
            out = as_path(command[2])
            if not is_url(out):
                out = Path(os.path.abspath(out))
            driver = Driver([*command[:2], str(out), *command[3:]], out, told["directory"], room, tell, stop)
            try:
                driver.run()
            finally:
                driver.end()
    except StreammergeError as error:
        tell({"event": "error", "message": str(error)})
        return error.exit_code
    except Exception as error:  # else it would look like a lost cluster, since nobody sees stderr
        tell({"event": "error", "message": f"the driver of the merge on Ray failed: {_last_line(error)}"})
        raise
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # threads of Ray have nothing left to do
