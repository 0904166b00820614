"""What a merge on a Ray cluster decides without one: who does what, what each engine may use, which nodes are refused."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from streammerge.api import launching
from streammerge.api.launching import merge_on
from streammerge.engine.session import Options
from streammerge.errors import InputError, StreammergeError
from streammerge.events import Control
from streammerge.io.volumes import as_path
from streammerge.launch.base import Launcher, Needs, make_launcher
from streammerge.launch.handing_out import HandingOut
from streammerge.launch.on_ray.actor import Engine
from streammerge.launch.on_ray.marker import Marker
from streammerge.launch.on_ray.room import Room, room_for

GIB = 1 << 30


def test_a_unit_goes_to_one_worker_and_to_a_different_one_if_that_is_lost_or_silent() -> None:
    units = HandingOut()
    units.offer(0, ["a", "b"])
    units.offer(1, ["a", "b"])
    units.offer(2, ["a", "b"])
    assert list(units.next()) == [(0, "a"), (1, "b")]
    assert list(units.next()) == []
    units.lost(1)
    assert list(units.next()) == [(2, "b")]
    units.offer(1, ["a", "b"])
    assert list(units.next()) == []
    units.silent({0})
    assert list(units.next()) == [(1, "a")]
    units.offer(1, ["a", "b"])
    assert list(units.next()) == [], "one that lives does it already"
    units.recorded(1, "a")
    units.given_back(2, "b")
    assert list(units.next()) == [(1, "b")]
    units.recorded(1, "b")
    units.offer(2, ["a", "b"])
    assert list(units.next()) == [(2, "")], "it is told to look again"


def test_engines_are_spread_over_the_nodes() -> None:
    nodes = [{"CPU": 16.0, "memory": 64.0 * GIB}, {"CPU": 8.0, "memory": 32.0 * GIB}, {"memory": 9.0 * GIB}]
    room = room_for(Needs(None, None, None, "auto"), nodes)
    assert (room.count, room.threads, room.memory, room.gpu, room.fit) == (2, 8, 32 * GIB, False, 3)
    room = room_for(Needs(4, None, None, "cpu"), nodes)
    assert (room.count, room.threads, room.memory, room.fit) == (4, 4, 16 * GIB, 6)
    assert room.options == ["--threads", "4", "--memory", str(16 * GIB), "--device", "cpu"]
    gpus = [{"CPU": 8.0, "memory": 32.0 * GIB, "GPU": 2.0}, *nodes]
    room = room_for(Needs(None, GIB, 2, "cuda"), gpus)
    assert (room.count, room.fit, room.resources["num_gpus"]) == (2, 2, 1)
    assert room_for(Needs(2, GIB, 2, "auto"), gpus).gpu is False


@pytest.mark.parametrize(
    ("needs", "words"),
    [
        (Needs(1, GIB, 9, "cpu"), "no node of the cluster has 9 CPUs"),
        (Needs(1, 99 * GIB, 1, "cpu"), "the most are 8 and 32.0 GiB"),
        (Needs(1, GIB, 1, "cuda"), "no node of the cluster has a GPU"),
        (Needs(1, GIB, 1, "cuda:1"), "Ray chooses the GPU"),
    ],
)
def test_what_no_node_has_is_refused(needs: Needs, words: str) -> None:
    with pytest.raises(InputError, match=words):
        room_for(needs, [{"CPU": 8.0, "memory": 32.0 * GIB}])


def test_nodes_that_announce_no_memory_need_a_number() -> None:
    """Ray would not place an actor that asks for what no node announces."""
    silent = {"CPU": 8.0}
    with pytest.raises(InputError, match="announces no memory for Ray to give: give --memory"):
        room_for(Needs(1, None, 1, "cpu"), [silent, {"CPU": 8.0, "memory": 32.0 * GIB}])
    room = room_for(Needs(None, GIB, 1, "cpu"), [silent])
    assert (room.fit, room.resources["memory"], room.options[3]) == (8, 0, str(GIB))
    assert room_for(Needs(None, GIB, 1, "cpu"), [silent, {"CPU": 8.0, "memory": 2.0 * GIB}]).fit == 2


def test_the_driver_s_node_needs_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engines have the GPUs; what they are asked for here stays what it is."""
    pytest.importorskip("ray", reason="the extra `ray` is not installed")
    made: list[Needs] = []
    asked: list[tuple[Needs, str]] = []

    def refuse(config: Any, *, device: str = "auto", **options: Any) -> None:
        asked.append((made.pop(), device))
        raise InputError("that was enough")

    def make(name: str, needs: Needs) -> Launcher:
        made.append(needs)
        return make_launcher(name, needs)

    monkeypatch.setattr(launching, "plan", refuse)
    monkeypatch.setattr(launching, "make_launcher", make)
    for where, device in (("ray:2", "cpu"), ("processes:2", "cuda")):
        with pytest.raises(InputError, match="that was enough"):
            merge_on(where, "c.yml", tmp_path / "out", [], {"device": "cuda"}, Options(), Control())
        assert asked.pop() == (Needs(2, None, None, "cuda"), device)
    with pytest.raises(InputError, match="--device tpu with --on ray: choose auto, cpu or cuda"):
        make_launcher("ray", Needs(1, GIB, 1, "tpu"))


def test_what_an_engine_takes_is_told_in_words() -> None:
    assert Room(1, 1, GIB, False, 1).each == "1 CPU and 1.0 GiB"
    assert Room(1, 2, GIB, True, 1).each == "2 CPUs, 1.0 GiB and 1 GPU"


def test_an_engine_that_refuses_says_its_own_error_and_not_that_of_a_different_one() -> None:
    pytest.importorskip("ray", reason="the extra `ray` is not installed")
    from streammerge.launch.on_ray.driver import Driver, _Actor

    driver = Driver.__new__(Driver)
    driver._last = "killed by SIGKILL (on node first)"
    driver._actors = [_Actor(None, "first", error="no space"), _Actor(None, "second")]
    ended = {"event": "ended", "code": 2, "last": "the last line"}
    with pytest.raises(InputError, match=r"^the last line \(on node second\)$"):
        driver._hear(driver._actors[1], [ended])
    with pytest.raises(InputError, match=r"^NaN in layers\.1 \(on node second\)$"):
        driver._hear(driver._actors[1], [{"event": "error", "message": "NaN in layers.1"}, ended])


def test_a_cluster_without_cpus_is_refused() -> None:
    with pytest.raises(InputError, match="no node with a CPU"):
        room_for(Needs(1, GIB, 1, "cpu"), [{"memory": 1.0 * GIB}])


def test_other_versions_and_an_output_that_a_node_does_not_see_are_refused(tmp_path: Path) -> None:
    told: list[Mapping[str, Any]] = []
    marker = Marker(tmp_path / "not" / "yet", told.append)
    assert told == [{"event": "marker", "path": marker.path}]
    marker.write()
    seen = Engine().hello(marker.path)
    marker.check(seen)
    with pytest.raises(InputError, match=r"has streammerge 0\.0, and here it is .*: install the same"):
        marker.check({**seen, "versions": {"streammerge": "0.0"}})
    marker.remove()
    assert not list(tmp_path.iterdir())
    with pytest.raises(InputError, match="does not see what is written there: give an OUT"):
        marker.check(Engine().hello(marker.path))


def test_an_engine_that_is_begun_anew_tells_nothing_of_the_one_before() -> None:
    """A driver that could not reach an actor for a moment begins its engine again, and counts events from 0."""
    engine = Engine()
    for _ in range(2):
        engine.begin(["--version"], {}, "/")
        (ended,) = engine.heard(0)
        assert (ended["event"], ended["code"]) == ("ended", 0)


def test_a_store_is_the_same_on_all_nodes(tmp_path: Path) -> None:
    marker = Marker(as_path("s3://bucket/merged"), lambda event: None)
    marker.write()
    marker.check(Engine().hello(marker.path))


@pytest.mark.parametrize(
    ("address", "code", "words"),
    [
        ("127.0.0.1:1", 1, "Ray at 127.0.0.1:1 does not answer"),
        ("ray://host:10001", 2, "--on ray does not go through Ray's client"),
    ],
)
def test_an_address_that_leads_to_no_cluster_is_refused_at_once(
    address: str, code: int, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray", reason="the extra `ray` is not installed")
    from streammerge.launch.on_ray.connecting import connect

    monkeypatch.setenv("RAY_ADDRESS", address)
    with (
        pytest.raises(StreammergeError, match=re.escape(words)) as refused,
        connect(Needs(1, GIB, 1, "cpu"), lambda event: None),
    ):
        pass
    assert refused.value.exit_code == code
