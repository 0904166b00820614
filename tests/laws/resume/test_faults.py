"""A machine that fails: full, limited, read-only, unreadable, poor in features. One line with the cure, and resumable."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from streammerge.errors import WorldError
from streammerge.io import allocate
from tests.conftest import output_bytes
from tests.laws.resume.fault_scenes import (
    one_scene,
)
from tests.laws.resume.scene import Scene
from tests.laws.resume.traps import Trap, cannot_allocate, interrupt, set_trap

sharded_scene = pytest.mark.parametrize("scene", ["ties"], indirect=True)


def failed(scene: Scene, out: Path, cure: str, **options: Any) -> str:
    """Merge, see it fail in one line with a cure and nothing torn; return the line."""
    with pytest.raises(WorldError, match=cure) as caught:
        scene.merge(out, **options)
    assert caught.value.exit_code == 1
    assert "\n" not in str(caught.value)
    scene.assert_nothing_torn(out)
    return str(caught.value)


def finishes(scene: Scene, out: Path) -> None:
    scene.merge(out)
    scene.assert_finished(out)


# --- errors of single calls


@one_scene
@pytest.mark.parametrize("operation", ["fallocate", "os.pwrite", "os.write", "os.ftruncate", "os.mkdir"])
@pytest.mark.parametrize(
    ("number", "cure"),
    [
        (errno.EDQUOT, "free some space and run"),
        (errno.EFBIG, "ulimit -f.*--shard-size"),
        (errno.EROFS, "make it writable"),
    ],
)
def test_a_quota_a_limit_and_a_file_system_gone_read_only_are_named_with_their_cure(
    number: int, cure: str, operation: str, scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    for at in range(1, 100):
        out = scene.directory / f"out{at}"
        trap = Trap(OSError(number, os.strerror(number)), at, once=False)
        with monkeypatch.context() as patch:
            set_trap(patch, operation, trap)
            try:
                scene.merge(out)
            except WorldError:
                shutil.rmtree(out, ignore_errors=True)
                trap.calls = 0
                failed(scene, out, cure)
        if not trap.sprung:
            break
        finishes(scene, out)
        shutil.rmtree(out)
    assert 1 < at < 99


@one_scene
@pytest.mark.parametrize(
    ("io", "operation"), [("read", "os.preadv"), ("mmap", "os.pread"), ("read", "os.pread")]
)
def test_an_input_that_cannot_be_read_is_named_with_the_cure(
    io: str, operation: str, scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = scene.directory / "out"
    sprung = 0
    for at in range(1, 300):
        trap = Trap(OSError(errno.EIO, "Input/output error"), at, once=True)
        with monkeypatch.context() as patch:
            set_trap(patch, operation, trap)
            with contextlib.suppress(WorldError):
                scene.merge(out, io=io)
                if not trap.sprung:
                    break
                shutil.rmtree(out)  # a byte of our own was not to be had, and made again
                continue
            sprung += 1
            shutil.rmtree(out, ignore_errors=True)
            trap.calls = 0
            said = failed(scene, out, r"(base|m1|m2).*Input/output error", io=io)
            if operation == "os.preadv":
                assert "check the disk; finished work is kept; run the same command again" in said
        finishes(scene, out)
        shutil.rmtree(out)
    assert sprung > 2


@one_scene
@pytest.mark.parametrize("name", ["tokenizer.json", "config.json"])
def test_a_file_beside_the_weights_that_cannot_be_read_is_no_success(
    name: str, scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was once left out, without a word."""
    out = scene.directory / "out"
    real = os.pread

    def pread(descriptor: int, nbytes: int, offset: int) -> bytes:
        if os.readlink(f"/proc/self/fd/{descriptor}") == str(scene.paths[0] / name) and nbytes == 1 << 20:
            raise OSError(errno.EIO, "Input/output error")
        return real(descriptor, nbytes, offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pread", pread)
        failed(scene, out, f"base/{name}: cannot read: Input/output error")
    finishes(scene, out)


@pytest.mark.parametrize("part", ["header", "tensors"])
def test_own_partial_shards_that_cannot_be_read_are_made_again(
    part: str, scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = scene.directory / "out"
    interrupt(scene, out, monkeypatch, after=6)
    real = os.pread

    def pread(descriptor: int, nbytes: int, offset: int) -> bytes:
        ours = str(out) in os.readlink(f"/proc/self/fd/{descriptor}")
        if ours and nbytes and (offset == 0) == (part == "header"):
            raise OSError(errno.EIO, "Input/output error")
        return real(descriptor, nbytes, offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pread", pread)
        assert scene.merge(out).bytes_resumed == 0
    scene.assert_finished(out)


@one_scene
def test_a_journal_that_cannot_be_read_is_an_error_and_loses_nothing(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = scene.directory / "out"
    interrupt(scene, out, monkeypatch, after=6)
    real = Path.read_bytes

    def read_bytes(path: Path) -> bytes:
        if path.name == "journal.jsonl":
            raise OSError(errno.EIO, "Input/output error")
        return real(path)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", read_bytes)
        failed(scene, out, "journal.jsonl: Input/output error; check the disk")
    assert scene.merge(out).bytes_resumed > 0
    scene.assert_finished(out)


# --- file systems that have less


def test_without_preallocation_and_without_direct_io_the_bytes_are_the_same(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = scene.directory / "out"
    real = os.open

    def buffered_only(path: Any, flags: int, *rest: Any, **options: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(path, flags, *rest, **options)

    monkeypatch.setattr(allocate, "fallocate", cannot_allocate)
    monkeypatch.setattr(os, "open", buffered_only)
    interrupt(scene, out, monkeypatch)
    finishes(scene, out)


@one_scene
def test_a_directory_that_cannot_be_synced_as_on_some_network_file_systems_is_taken_as_it_is(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fsync(descriptor: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", fsync)
    finishes(scene, scene.directory / "out")


@one_scene
def test_a_clock_that_goes_backwards_changes_nothing(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    out = scene.directory / "out"
    interrupt(scene, out, monkeypatch, after=6)
    for place in (out, *out.rglob("*")):
        os.utime(place, ns=(4 * 10**18, 4 * 10**18))  # written in the year 2096, by today's clock
    now = time.time_ns()
    monkeypatch.setattr(time, "time_ns", lambda: now - 10**18)
    monkeypatch.setattr(time, "time", lambda: (now - 10**18) / 10**9)
    assert scene.merge(out).bytes_resumed > 0
    scene.assert_finished(out)


@one_scene
def test_what_could_not_be_allocated_does_not_stay_on_the_full_disk(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = scene.directory / "out"
    with monkeypatch.context() as patch:
        set_trap(patch, "fallocate", Trap(OSError(errno.ENOSPC, "No space left on device"), 1, once=False))
        failed(scene, out, "free some space")
    assert not list(out.glob("*.partial"))


# --- real limits and real file systems


@contextlib.contextmanager
def limit_of_file_size(nbytes: int) -> Iterator[None]:
    """Have the kernel refuse this process larger files."""
    before, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, most))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before, most))


@one_scene
@pytest.mark.parametrize("allocates", [True, False], ids=["preallocated", "not preallocated"])
def test_a_limit_of_file_size_stops_it_in_one_line_and_it_goes_on_without(
    allocates: bool, scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At 2, 50 and 99 % of the shard, in a process that the kernel limits."""
    config, out = scene.directory / "c.yml", scene.directory / "out"
    config.write_text(yaml.safe_dump(scene.config))
    nbytes = len(scene.expected["model.safetensors"])
    with monkeypatch.context() as patch:
        if not allocates:
            patch.setattr(allocate, "fallocate", cannot_allocate)
            patch.setattr(os, "ftruncate", lambda descriptor, nbytes: None)
        for share in (0.02, 0.5, 0.99):
            with limit_of_file_size(int(share * nbytes)):
                failed(scene, out, r"File too large; raise the limit \(`ulimit -f`", config=config)
            assert not (out / "model.safetensors").exists()
    for place in (out, scene.directory / "reference"):
        scene.merge(place, config=config)
    assert output_bytes(out) == output_bytes(scene.directory / "reference")


def test_a_file_system_that_is_full_is_named_and_the_merge_goes_on_when_there_is_space(
    scene: Scene, tmpfs: Callable[[str], Path]
) -> None:
    """From no space at all to all but the last file: full at every page in turn."""
    place = tmpfs("size=4m")
    out, filler = place / "out", place / "filler"
    free = os.statvfs(place).f_bavail * 4096
    needed = sum(-(-len(data) // 4096) * 4096 for data in scene.expected.values())
    failures = 0
    for left in (0, 4096, needed // 3, needed // 2, *range(needed - 8 * 4096, needed + 8 * 4096, 4096)):
        with filler.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, free - left)
        try:
            scene.merge(out)
        except WorldError as error:
            assert "No space left on device; free some space and run the same command again" in str(error)  # noqa: PT017
            scene.assert_nothing_torn(out)
            failures += 1
        filler.unlink()
        finishes(scene, out)
        shutil.rmtree(out)
    assert failures > 5


def test_a_read_only_file_system_is_named_and_the_merge_goes_on_when_it_can_be_written(
    scene: Scene, tmpfs: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmpfs("size=4m") / "out"
    tmpfs("ro")
    assert "mounted/out: Read-only file system; make it writable" in failed(scene, out, "Read-only")
    tmpfs("rw")
    interrupt(scene, out, monkeypatch)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    tmpfs("ro")
    failed(scene, out, "make it writable and run the same command again")
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    tmpfs("rw")
    assert scene.merge(out).bytes_resumed > 0
    scene.assert_finished(out)


@one_scene
def test_a_file_system_that_goes_read_only_during_the_merge_stops_it_and_it_goes_on(
    scene: Scene, tmpfs: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmpfs("size=4m") / "out"
    for name in ("replace", "unlink", "mkdir"):
        with monkeypatch.context() as patch:
            set_trap(patch, f"os.{name}", Trap(OSError(errno.EROFS, "Read-only file system"), 2, once=False))
            with contextlib.suppress(WorldError):
                scene.merge(out)
        scene.assert_nothing_torn(out)
        finishes(scene, out)
        shutil.rmtree(out)
