"""Interrupted at any moment and run again: the same bytes as if nothing had happened."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from streammerge.api import merge
from streammerge.engine import commit, journal, output, writer
from streammerge.engine.journal import NAME, STATE
from streammerge.engine.session import Event, Summary
from streammerge.engine.verify import verify
from streammerge.engine.writer import ShardWriter
from streammerge.errors import InputError, OutputError, Stopped, StreammergeError, WorldError
from tests.conftest import config_for, output_bytes

SHAPES: dict[str, tuple[int, ...]] = {
    "embed.weight": (300, 64),
    "layers.0.weight": (64, 130),
    "layers.1.weight": (64, 130),
    "norm": (64,),
}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "ties": ("ties", {"density": 0.2, "trim_scope": "model"}, {"shard_size": 30_000}),
    "dare": ("dare_linear", {"density": 0.4}, {}),
    "fisher": ("fisher", {}, {}),
}


class SimulatedKill(BaseException):
    """Ends a merge as nothing in it expects."""


class Scene:
    """One merge and what it gives when nothing interrupts it."""

    def __init__(self, case: str, paths: list[Path], directory: Path) -> None:
        method, parameters, self.options = CASES[case]
        self.paths = paths
        self.config = config_for(method, paths, parameters=parameters, seed=3)
        self.directory = directory
        self.merge(directory / "expected")
        self.expected = output_bytes(directory / "expected")

    def merge(self, out: Path, **options: Any) -> Summary:
        config = options.pop("config", self.config)
        return merge(config, out, **{**self.options, **options})

    def assert_finished(self, out: Path) -> None:
        """Every file is there, byte for byte, and nothing else."""
        assert sorted(p.name for p in out.iterdir()) == sorted(self.expected)
        assert output_bytes(out) == self.expected

    def assert_nothing_torn(self, out: Path) -> None:
        """A final name means a finished file; what loads is a finished model."""
        if not out.exists():
            return
        files = {p.name: p.read_bytes() for p in out.iterdir() if p.is_file()}
        loads = {"model.safetensors", "model.safetensors.index.json"} & set(files)
        final = {name for name in files if not name.endswith(".partial")}
        assert final <= set(self.expected)
        assert all(files[name] == self.expected[name] for name in final)
        if loads:
            assert final == set(self.expected)


@pytest.fixture(params=list(CASES))
def scene(
    request: pytest.FixtureRequest,
    make_models: Callable[..., list[Path]],
    small_capacity: Callable[[int, int], None],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> Scene:
    small_capacity(1 << 17, 1)
    # Nothing here cuts the power, and waiting for the disk is most of the time of a small merge.
    for name in ("fsync", "fdatasync"):
        monkeypatch.setattr(os, name, lambda descriptor: None)
    return Scene(request.param, make_models(n_models=2, shapes=SHAPES), tmp_path)


class Trap:
    """Counts calls and fails from the `at`-th on, or at it alone."""

    def __init__(self, error: BaseException, at: int, *, once: bool) -> None:
        self.error, self.at, self.once = error, at, once
        self.calls = 0
        self._lock = threading.Lock()

    def __call__(self) -> None:
        with self._lock:
            self.calls += 1
            if self.calls == self.at or (self.calls > self.at and not self.once):
                raise self.error

    @property
    def sprung(self) -> bool:
        return self.calls >= self.at


def guarded(function: Callable[..., Any], trap: Trap) -> Callable[..., Any]:
    def call(*arguments: Any, **options: Any) -> Any:
        if isinstance(trap.error, OSError) and function is not writer.fsync_directory:
            with writer.world_errors("a file"):
                trap()
        else:
            trap()
        return function(*arguments, **options)

    return call


def set_trap(monkeypatch: pytest.MonkeyPatch, operation: str, trap: Trap) -> None:
    owner: Any
    if operation.startswith("os."):
        name = operation.removeprefix("os.")
        real = getattr(os, name)

        def call(*arguments: Any, **options: Any) -> Any:
            trap()
            return real(*arguments, **options)

        monkeypatch.setattr(os, name, call)
    elif operation.startswith(("ShardWriter.", "Journal.")):
        kind, name = operation.split(".")
        owner = ShardWriter if kind == "ShardWriter" else journal.Journal
        monkeypatch.setattr(owner, name, guarded(getattr(owner, name), trap))
    else:
        function = guarded(getattr(writer, operation), trap)
        for module in (writer, journal, output, commit):
            if hasattr(module, operation):
                monkeypatch.setattr(module, operation, function)


ERRORS: dict[str, Callable[[], BaseException]] = {
    "disk full": lambda: OSError(errno.ENOSPC, "No space left on device"),
    "I/O error": lambda: OSError(errno.EIO, "Input/output error"),
    "kill": SimulatedKill,
}
OPERATIONS = [
    "ShardWriter.write",
    "ShardWriter.sync",
    "Journal._append",
    "write_file",
    "ShardWriter.publish",
    "fsync_directory",
]
SYSTEM_CALLS = [
    "os.posix_fallocate",
    "os.pwrite",
    "os.write",
    "os.fsync",
    "os.fdatasync",
    "os.replace",
    "os.ftruncate",
    "os.unlink",
    "os.rmdir",
    "os.mkdir",
]


@pytest.mark.parametrize("error", list(ERRORS))
@pytest.mark.parametrize("operation", [*OPERATIONS, *SYSTEM_CALLS])
def test_a_failure_at_any_call_of_an_operation_leaves_nothing_torn_and_is_resumed_to_the_same_bytes(
    operation: str, error: str, scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    for at in range(1, 200):
        out = scene.directory / f"out{at}"
        trap = Trap(ERRORS[error](), at, once=error == "I/O error")
        with monkeypatch.context() as patch:
            set_trap(patch, operation, trap)
            try:
                scene.merge(out)
            except (WorldError, SimulatedKill) as caught:
                right = isinstance(caught, SimulatedKill) == (error == "kill")
                if not right or not trap.sprung:
                    raise
            else:
                if not trap.sprung:
                    break
        scene.assert_nothing_torn(out)
        scene.merge(out)
        scene.assert_finished(out)
        shutil.rmtree(out)
    else:
        pytest.fail("the merge never passed")
    assert at > 1 or operation in ("ShardWriter.publish", "os.unlink")


def test_one_directory_survives_a_failure_at_every_write_in_turn(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = scene.directory / "out"
    for runs in range(1, 100):
        with monkeypatch.context() as patch:
            set_trap(patch, "ShardWriter.write", Trap(SimulatedKill(), runs, once=True))
            try:
                scene.merge(out)
                break
            except SimulatedKill:
                scene.assert_nothing_torn(out)
    assert 3 < runs < 99
    scene.assert_finished(out)


# --- an interruption in mid-work, and what may have changed since


def interrupt(scene: Scene, out: Path, monkeypatch: pytest.MonkeyPatch, *, after: int = 4) -> None:
    """Leave an unfinished merge in `out`, some of it done and recorded."""
    with monkeypatch.context() as patch:
        set_trap(patch, "ShardWriter.write", Trap(OSError(errno.ENOSPC, "full"), after, once=False))
        with pytest.raises(WorldError, match="run the same command again"):
            scene.merge(out)
    assert (out / STATE / NAME).exists()


def test_finished_work_is_not_done_twice(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    out = scene.directory / "out"
    total = scene.merge(scene.directory / "whole").bytes_written
    interrupt(scene, out, monkeypatch, after=5)
    summary = scene.merge(out)
    assert summary.bytes_resumed > 0
    assert summary.bytes_written + summary.bytes_resumed == total
    scene.assert_finished(out)


@pytest.mark.parametrize(("capacity", "threads"), [(1 << 30, 1), (1 << 16, 3), (1 << 20, 2)])
def test_a_merge_is_resumed_with_other_memory_and_threads_to_the_same_bytes(
    capacity: int, threads: int, scene: Scene, small_capacity: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = scene.directory / "out"
    interrupt(scene, out, monkeypatch)
    small_capacity(capacity, threads)
    assert scene.merge(out, io="mmap").bytes_resumed > 0
    scene.assert_finished(out)


def flip(path: Path, position: int, bit: int = 0) -> None:
    """Change one bit of a file in place."""
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ (1 << bit)]))


def flip_middle_of_a_tensor(path: Path) -> None:
    """Change a bit of an exponent-free byte in the middle of the largest tensor."""
    length = int.from_bytes(path.read_bytes()[:8], "little")
    header = json.loads(path.read_bytes()[8 : 8 + length])
    first, last = header["embed.weight"]["data_offsets"]
    flip(path, 8 + length + (first + last) // 4 * 2)


def changed_parameter(scene: Scene) -> dict[str, Any]:
    other = {"normalize": False} if scene.config["merge_method"] == "fisher" else {"density": 0.5}
    return {"config": {**scene.config, "parameters": {**scene.config["parameters"], **other}}}


def changed_model_order(scene: Scene) -> dict[str, Any]:
    return {"config": {**scene.config, "models": scene.config["models"][::-1]}}


def changed_method(scene: Scene) -> dict[str, Any]:
    method = "dare_fisher" if scene.config["merge_method"] == "fisher" else "dare_ties"
    return {"config": {**scene.config, "merge_method": method, "parameters": {"density": 0.5}}}


def changed_seed(scene: Scene) -> dict[str, Any]:
    return {"seed": 4}


def changed_shard_size(scene: Scene) -> dict[str, Any]:
    return {"shard_size": 9_000}


def changed_input(scene: Scene) -> dict[str, Any]:
    flip_middle_of_a_tensor(scene.paths[1] / "model.safetensors")
    return {}


def changed_base_with_its_time_restored(scene: Scene) -> dict[str, Any]:
    path = scene.paths[0] / "model.safetensors"
    before = path.stat()
    flip_middle_of_a_tensor(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = path.stat()
    assert (before.st_size, before.st_mtime_ns) == (after.st_size, after.st_mtime_ns)
    return {}


def swapped_inputs(scene: Scene) -> dict[str, Any]:
    one, two = (path / "model.safetensors" for path in scene.paths[1:3])
    one.rename(one.with_name("x"))
    two.rename(one)
    one.with_name("x").rename(two)
    return {}


CHANGES: list[tuple[Callable[[Scene], dict[str, Any]], str]] = [
    (changed_parameter, "config"),
    (changed_model_order, "config"),
    (changed_method, "method"),
    (changed_seed, "seed"),
    (changed_shard_size, "shard size"),
    (changed_input, "m1"),
    (changed_base_with_its_time_restored, "base"),
    (swapped_inputs, "m1"),
]


@pytest.mark.parametrize(("change", "named"), CHANGES)
@pytest.mark.parametrize("finished", [False, True], ids=["unfinished", "finished"])
def test_a_merge_that_changed_is_refused_by_name_and_overwrite_starts_over(
    finished: bool, change: Any, named: str, scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = scene.directory / "out"
    if finished:
        scene.merge(out)
    else:
        interrupt(scene, out, monkeypatch)
    options = change(scene)
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    with pytest.raises(OutputError, match=rf"with another .*{named}.*--overwrite") as caught:
        scene.merge(out, **options)
    assert caught.value.exit_code == 2
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before
    assert scene.merge(out, overwrite=True, **options).bytes_resumed == 0
    scene.merge(scene.directory / "fresh", **options)
    assert output_bytes(out) == output_bytes(scene.directory / "fresh")


def test_the_same_content_under_a_new_date_is_resumed(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    out = scene.directory / "out"
    interrupt(scene, out, monkeypatch)
    os.utime(scene.paths[1] / "model.safetensors", ns=(1, 1))
    try:
        scene.merge(out)
    except OutputError as error:
        assert "m1" in str(error)  # noqa: PT017 - refusing it by name is as good
    else:
        scene.assert_finished(out)


# --- damage to the unfinished directory


def torn_tail(out: Path) -> None:
    path = out / STATE / NAME
    os.truncate(path, path.stat().st_size - 7)


def half_a_journal(out: Path) -> None:
    path = out / STATE / NAME
    os.truncate(path, path.stat().st_size // 2)


def rubbish_after_the_journal(out: Path) -> None:
    with (out / STATE / NAME).open("ab") as file:
        file.write(b"\x00\xff{]\n" + b"0" * 5000)


def empty_journal(out: Path) -> None:
    os.truncate(out / STATE / NAME, 0)


def zeroed_journal(out: Path) -> None:
    path = out / STATE / NAME
    path.write_bytes(bytes(path.stat().st_size))


def deleted_journal(out: Path) -> None:
    (out / STATE / NAME).unlink()


def partials(out: Path) -> list[Path]:
    return sorted(out.glob("model*.partial"))


def damaged_shard(out: Path) -> None:
    for path in partials(out):
        size = path.stat().st_size
        for position in range(size // 100, size, size // 20):
            flip(path, position, 3)


def damaged_shard_header(out: Path) -> None:
    for path in partials(out):
        flip(path, 20)


def zeroed_shard(out: Path) -> None:
    for path in partials(out):
        path.write_bytes(bytes(path.stat().st_size))


def truncated_shard(out: Path) -> None:
    for path in partials(out):
        os.truncate(path, path.stat().st_size // 2)


def longer_shard(out: Path) -> None:
    for path in partials(out):
        os.truncate(path, path.stat().st_size + 1)


def deleted_shard(out: Path) -> None:
    for path in partials(out):
        path.unlink()


DAMAGES = [
    torn_tail,
    half_a_journal,
    rubbish_after_the_journal,
    empty_journal,
    zeroed_journal,
    deleted_journal,
    damaged_shard,
    damaged_shard_header,
    zeroed_shard,
    truncated_shard,
    longer_shard,
    deleted_shard,
]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("when", ["in the merge", "in the commit"])
def test_damage_to_an_unfinished_directory_is_done_again(
    when: str, damage: Callable[[Path], None], scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = scene.directory / "out"
    if when == "in the merge":
        interrupt(scene, out, monkeypatch, after=6)
    else:
        with monkeypatch.context() as patch:
            set_trap(patch, "ShardWriter.publish", Trap(SimulatedKill(), 1, once=True))
            with pytest.raises(SimulatedKill):
                scene.merge(out)
    damage(out)
    scene.merge(out)
    scene.assert_finished(out)
    assert verify(out).problems == ()


def test_a_flipped_bit_anywhere_in_the_journal_is_never_believed(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved, out = scene.directory / "saved", scene.directory / "out"
    interrupt(scene, saved, monkeypatch, after=6)
    size = (saved / STATE / NAME).stat().st_size
    for position in [*range(12), *range(12, size, size // 25), size - 1]:
        shutil.copytree(saved, out)
        flip(out / STATE / NAME, position, position % 8)
        scene.merge(out)
        scene.assert_finished(out)
        shutil.rmtree(out)


def test_a_journal_of_another_version_is_refused_by_name(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = scene.directory / "out"
    with monkeypatch.context() as patch:
        patch.setattr("streammerge.engine.session.__version__", "0.0.9")
        interrupt(scene, out, monkeypatch)
    with pytest.raises(OutputError, match=r"another version.*--overwrite"):
        scene.merge(out)
    scene.merge(out, overwrite=True)
    scene.assert_finished(out)


def test_partial_shards_without_any_journal_are_refused(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = scene.directory / "out"
    interrupt(scene, out, monkeypatch)
    shutil.rmtree(out / STATE)
    with pytest.raises(OutputError, match="did not make"):
        scene.merge(out)


@pytest.mark.parametrize("name", [NAME, "model.safetensors.partial"])
def test_a_link_planted_in_the_output_is_not_followed(
    name: str, scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, victim = scene.directory / "out", scene.directory / "victim"
    interrupt(scene, out, monkeypatch)
    victim.write_bytes(b"precious")
    place = out / STATE / NAME if name == NAME else out / name
    place.unlink(missing_ok=True)
    place.symlink_to(victim)
    with contextlib.suppress(StreammergeError):
        scene.merge(out)
    assert victim.read_bytes() == b"precious"


# --- finished merges


def test_a_finished_merge_run_again_reads_and_writes_nothing(scene: Scene) -> None:
    out = scene.directory / "expected"
    before = {p.name: (p.stat().st_mtime_ns, p.stat().st_ctime_ns, p.stat().st_ino) for p in out.iterdir()}
    directory = out.stat().st_mtime_ns
    summary = scene.merge(out)
    assert summary.already_complete
    assert (summary.bytes_read, summary.bytes_written) == (0, 0)
    after = {p.name: (p.stat().st_mtime_ns, p.stat().st_ctime_ns, p.stat().st_ino) for p in out.iterdir()}
    assert after == before
    assert out.stat().st_mtime_ns == directory


def test_a_finished_merge_that_lost_a_file_is_refused_and_started_over_on_request(scene: Scene) -> None:
    out = scene.directory / "expected"
    (out / "config.json").unlink()
    with pytest.raises(OutputError, match=r"missing or cut short.*--overwrite"):
        scene.merge(out)
    scene.merge(out, overwrite=True)
    scene.assert_finished(out)


# --- inputs that change while they are merged


def shorten(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def touch(path: Path) -> None:
    os.utime(path, ns=(1, 1))


@pytest.mark.parametrize("change", [flip_middle_of_a_tensor, shorten, Path.unlink, touch])
@pytest.mark.parametrize("moment", ["start", "progress"])
@pytest.mark.parametrize("io", ["read", "mmap"])
def test_an_input_that_changes_during_the_merge_is_never_a_success(
    io: str, moment: str, change: Callable[[Path], None], scene: Scene
) -> None:
    out = scene.directory / "out"
    changed = []

    def on_event(event: Event) -> None:
        if event.kind == moment and not changed:
            changed.append(moment)
            change(scene.paths[2] / "model.safetensors")

    with pytest.raises(StreammergeError, match="m2") as caught:
        scene.merge(out, on_event=on_event, io=io)
    assert caught.value.exit_code in (1, 2)
    assert "\n" not in str(caught.value)
    scene.assert_nothing_torn(out)
    assert not (out / "model.safetensors").exists()
    assert not (out / "model.safetensors.index.json").exists()


# --- one writer


def test_a_directory_that_is_locked_is_refused(scene: Scene) -> None:
    out = scene.directory / "out"
    out.mkdir()
    descriptor = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        with pytest.raises(OutputError, match="another merge is writing there"):
            scene.merge(out)
        assert list(out.iterdir()) == []
    finally:
        os.close(descriptor)
    scene.merge(out)
    scene.assert_finished(out)


def test_a_stop_that_was_asked_for_is_clean_and_resumable(scene: Scene) -> None:
    out = scene.directory / "out"
    stop = threading.Event()

    def on_event(event: Event) -> None:
        if event.kind == "progress" and event.values["elements"]:
            stop.set()

    with pytest.raises(Stopped) as caught:
        scene.merge(out, stop=stop, on_event=on_event, signal_received=lambda: signal.SIGTERM)
    assert caught.value.exit_code == 143
    scene.assert_nothing_torn(out)
    scene.merge(out)
    scene.assert_finished(out)


# --- processes

_SLOW = """
import itertools, os, signal, sys, time
from streammerge.engine import run, writer
run._SYNC_SECONDS = 0.02
kill_at, slow_from = (int(number) for number in sys.argv[1:3])
del sys.argv[1:3]
calls = itertools.count(1)
real = os.pwrite
def pwrite(descriptor, data, offset):
    half = len(data) // 2
    real(descriptor, data[:half], offset)
    call = next(calls)
    if call == kill_at:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.25 if call >= slow_from else 0.01)
    return half + real(descriptor, data[half:], offset + half)
os.pwrite = pwrite
for name in ("replace", "fsync", "fdatasync"):
    def slowly(*arguments, real=getattr(os, name)):
        if next(calls) == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments)
    setattr(os, name, slowly)
from streammerge.plan import budget
budget.make_budget = lambda memory, n, reserve: budget.Budget(reserve + (2 << 20), reserve, 1)
from streammerge.cli import main
main()
"""
_OPTIONS = ["--shard-size", "700KB"]


NEVER = 10**9


class Slow:
    """A merge in processes that can be stopped while it writes, because each write takes its time."""

    def __init__(self, paths: list[Path], directory: Path) -> None:
        self.config = directory / "config.yml"
        parameters = {"density": 0.3, "trim_scope": "model"}
        self.config.write_text(yaml.safe_dump(config_for("ties", paths, parameters=parameters)))
        self.out = directory / "out"
        self.running: list[subprocess.Popen[str]] = []

    def start(self, *options: str, kill_at: int = NEVER, slow_from: int = NEVER) -> subprocess.Popen[str]:
        """Start a merge that kills itself at a given call to the system, or dawdles from one on."""
        numbers = [str(kill_at), str(slow_from)]
        arguments = [*numbers, "merge", str(self.config), str(self.out), *_OPTIONS, *options]
        process = subprocess.Popen(
            [sys.executable, "-c", _SLOW, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.running.append(process)
        return process

    def start_and_wait_for_work(self) -> subprocess.Popen[str]:
        """Start, and return when some elements are finished and recorded; the rest takes seconds."""
        path = self.out / STATE / NAME
        process = self.start(slow_from=15)
        for _ in range(2000):
            if process.poll() is not None or (path.exists() and path.read_bytes().count(b'"done"') >= 3):
                break
            time.sleep(0.01)
        return process

    def expected(self) -> dict[str, bytes]:
        reference = self.out.with_name("reference")
        merge(self.config, reference, shard_size=700_000)
        return output_bytes(reference)

    def finish(self) -> None:
        """Run it to the end and compare."""
        process = self.start("--quiet")
        out, err = process.communicate(timeout=60)
        assert (process.returncode, out, err) == (0, "", "")
        assert output_bytes(self.out) == self.expected()


@pytest.fixture
def slow(make_models: Callable[..., list[Path]], tmp_path: Path) -> Iterator[Slow]:
    shapes = {f"layers.{i}.weight": (512, 256) for i in range(20)} | {"norm": (256,)}
    slow = Slow(make_models(n_models=2, shapes=shapes), tmp_path)
    yield slow
    for process in slow.running:
        if process.poll() is None:
            process.kill()
        process.communicate()


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_in_the_same_bytes(slow: Slow) -> None:
    chance = random.Random(20)
    expected = slow.expected()
    killed = 0
    while killed < 8:
        # The first runs die early, the later ones near the end and in the commit, or they end by themselves.
        code = slow.start(kill_at=chance.randint(1, 20)).wait(timeout=60)
        assert code in (0, -signal.SIGKILL)
        killed += code == -signal.SIGKILL
        names = {p.name for p in slow.out.iterdir()}
        if "model.safetensors.index.json" in names:
            assert {p.name: p.read_bytes() for p in slow.out.iterdir() if p.is_file()} == expected
        assert all(
            (slow.out / name).read_bytes() == expected[name]
            for name in names - {STATE}
            if not name.endswith(".partial")
        )
        if code == 0:
            shutil.rmtree(slow.out)
    slow.finish()


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_it_in_one_line_and_it_goes_on(number: int, code: int, slow: Slow) -> None:
    process = slow.start_and_wait_for_work()
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == code, err
    assert len(err.splitlines()) == 1
    assert "run the same command again" in err
    assert not (slow.out / "model.safetensors.index.json").exists()
    slow.finish()


@pytest.mark.slow
def test_a_signal_before_any_work_stops_it_without_a_traceback(slow: Slow) -> None:
    process = slow.start()
    time.sleep(0.25)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert process.returncode in (143, -signal.SIGTERM)
    assert "Traceback" not in err
    slow.finish()


@pytest.mark.slow
def test_a_second_merge_is_refused_while_the_first_is_stopped_in_mid_work(slow: Slow) -> None:
    first = slow.start_and_wait_for_work()
    first.send_signal(signal.SIGSTOP)
    try:
        before = {p.name: p.stat().st_mtime_ns for p in slow.out.iterdir()}
        second = slow.start("--overwrite")
        out, err = second.communicate(timeout=30)
        assert (second.returncode, out) == (2, "")
        assert len(err.splitlines()) == 1
        assert "another merge is writing there" in err
        assert {p.name: p.stat().st_mtime_ns for p in slow.out.iterdir()} == before
    finally:
        first.send_signal(signal.SIGCONT)
    assert first.wait(timeout=30) == 0
    assert output_bytes(slow.out) == slow.expected()


@pytest.mark.slow
def test_a_kill_leaves_no_lock_behind(slow: Slow) -> None:
    first = slow.start_and_wait_for_work()
    first.kill()
    first.wait()
    slow.finish()


def test_a_value_that_is_not_finite_stops_a_resumed_merge_too(
    make_models: Callable[..., list[Path]], tmp_path: Path, small_capacity: Callable[[int, int], None]
) -> None:
    from safetensors.torch import load_file, save_file

    small_capacity(1 << 16, 1)
    paths = make_models(shapes=SHAPES)
    file = paths[2] / "model.safetensors"
    tensors = load_file(file)
    tensors["norm"][7] = torch.nan
    save_file(tensors, file, metadata={"format": "pt"})
    for _ in range(2):
        with pytest.raises(InputError, match=r"m2.*norm.*element 7"):
            merge(config_for("linear", paths), tmp_path / "out")
        assert not (tmp_path / "out" / "model.safetensors").exists()


def test_a_stop_during_streamed_statistics_ends_and_concludes_nothing(scene: Scene, tmp_path: Path) -> None:
    stop = threading.Event()
    stop.set()
    out = tmp_path / "stopped"
    with pytest.raises(Stopped):
        scene.merge(out, stop=stop, signal_received=lambda: 15)
    with pytest.raises(Stopped):
        scene.merge(out, stop=stop)  # without a signal too
    scene.merge(out)
    assert output_bytes(out) == scene.expected


def test_overwrite_starts_over_after_an_interruption_in_the_commit(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        set_trap(patch, "ShardWriter.publish", Trap(SimulatedKill(), 1, once=True))
        with pytest.raises(SimulatedKill):
            scene.merge(out)
    scene.merge(out, overwrite=True)
    assert output_bytes(out) == scene.expected


def test_overwrite_leaves_files_of_others_alone(scene: Scene, tmp_path: Path) -> None:
    out = tmp_path / "out"
    scene.merge(out)
    (out / "notes.txt").write_text("mine")
    scene.merge(out, overwrite=True)
    assert (out / "notes.txt").read_text() == "mine"
    (out / "notes.txt").unlink()
    assert output_bytes(out) == scene.expected


def test_a_changed_bit_outside_the_fingerprint_is_noticed_by_the_files_stamp(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    interrupt(scene, out, monkeypatch)
    path = scene.paths[1] / "model.safetensors"
    before = path.stat()
    flip(path, before.st_size - 1)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(OutputError, match="version of the files"):
        scene.merge(out)
