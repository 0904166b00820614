"""The first merge on a machine: it compiles what it needs and no more, or nothing; wherever kernels can be kept."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numba
import psutil
import pytest
import yaml

import streammerge
from streammerge.api import merge, plan
from streammerge.backends.cpu import compile as warm
from streammerge.backends.cpu.backend import CPU
from streammerge.backends.torch.backend import TORCH
from streammerge.errors import Stopped
from streammerge.events import Event
from streammerge.numerics import compiled, ready
from streammerge.planning import prepare
from streammerge.planning.needed_kernels import needed_kernels
from tests.conftest import config_for, output_bytes, write_models
from tests.laws.test_methods import VARIANTS
from tests.patience import PATIENCE
from tests.test_layers import ARROWS

Make = Callable[..., list[Path]]
Calls = set[tuple[str, tuple[str, ...]]]


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def cold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Have the process, and those it starts, find an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    forget()
    yield tmp_path / "cache"
    monkeypatch.undo()
    forget()


def forget() -> None:
    compiled.kernel_cache.cache_clear()
    compiled.look_again()


def marks(cache: Path) -> list[str]:
    return sorted(path.stem.rpartition("-")[0] for path in cache.glob("streammerge/kernels-*/*.compiled"))


# --- which kernels


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Record which kernels are called from Python, and with arguments of which types."""
    made: Calls = set()
    call = ready.Loop.__call__

    def record(loop: ready.Loop, *arguments: Any) -> Any:
        types = tuple(str(numba.typeof(argument)) for argument in arguments)
        made.add((f"{loop.module}.{loop.name}", types))
        return call(loop, *arguments)

    monkeypatch.setattr(ready.Loop, "__call__", record)
    return made


@pytest.mark.parametrize(("method", "parameters"), VARIANTS)
def test_what_a_plan_needs_is_all_that_its_merge_calls(
    method: str, parameters: dict[str, Any], paths: list[Path], calls: Calls, tmp_path: Path
) -> None:
    """Argument types included: another type would be compiled in the middle of the merge, beyond its memory."""
    config = config_for(method, paths, parameters=parameters)
    names = needed_kernels(plan(config))
    warm.compile_kernels(sorted(names))
    known = set(calls)
    calls.clear()
    merge(config, tmp_path / "out")
    assert calls <= known
    assert bool(calls) == bool(names)


def test_a_linear_merge_needs_one_kernel(paths: list[Path]) -> None:
    assert needed_kernels(plan(config_for("linear", paths))) == {"weighted_sum"}
    trimmed = config_for("ties", paths, parameters={"density": 0.5})
    assert needed_kernels(plan(trimmed)) == {"ranks", "task_vectors"}
    assert needed_kernels(plan(config_for("ties", paths), kernels=False)) == frozenset()


# --- a cold cache


def test_kernels_of_another_installation_are_not_taken_for_this_ones(
    cold: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """numba finds a loop by the path of its source: marked for another one, all would be compiled amid the merge."""
    compiled.mark_compiled("weighted_sum")
    assert compiled.lacking(["weighted_sum"]) == []
    compiled.kernel_cache()
    monkeypatch.setattr(compiled, "_PACKAGE", Path("/opt/elsewhere/streammerge"))
    compiled.look_again()
    assert compiled.lacking(["weighted_sum"]) == ["weighted_sum"]


def test_a_small_merge_compiles_nothing_and_has_the_same_bytes(
    paths: list[Path], cold: Path, tmp_path: Path
) -> None:
    events: list[Event] = []
    config = config_for("ties", paths)
    assert plan(config).backend is TORCH
    summary = merge(config, tmp_path / "out", on_event=events.append)
    assert marks(cold) == []
    assert summary.compile_seconds == 0.0
    assert {event.kind for event in events} & {"compiling", "compiled", "warning"} == set()
    forget()
    merge(config, tmp_path / "kernels", kernels=False)
    assert output_bytes(tmp_path / "out") == output_bytes(tmp_path / "kernels")


def test_where_torch_would_not_fit_the_kernels_are_compiled(paths: list[Path], cold: Path) -> None:
    assert plan(config_for("linear", paths), memory="300MiB").backend is CPU


def test_a_large_merge_says_that_it_compiles_and_compiles_what_it_needs(
    paths: list[Path], cold: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "WORTH_COMPILING", 0)
    events: list[Event] = []
    summary = merge(config_for("linear", paths), tmp_path / "out", on_event=events.append)
    kinds = [event.kind for event in events]
    assert kinds[:4] == ["plan", "compiling", "compiled", "start"]
    assert events[1].values["kernels"] == 1
    assert marks(cold) == ["weighted_sum"]
    assert summary.compile_seconds > summary.seconds > 0
    again: list[Event] = []
    merge(config_for("linear", paths), tmp_path / "again", on_event=again.append)
    assert [event.kind for event in again][:2] == ["plan", "start"]


def test_compiling_is_stopped_at_once_and_leaves_nothing(
    paths: list[Path], cold: Path, tmp_path: Path
) -> None:
    stop = threading.Event()

    def on_event(event: Event) -> None:
        if event.kind == "compiling":
            stop.set()

    with pytest.raises(Stopped):
        merge(config_for("della", paths), tmp_path / "out", kernels=True, on_event=on_event, stop=stop)
    compiling = [c for c in psutil.Process().children() if "compile_kernels" in " ".join(c.cmdline())]
    assert not any(child.is_running() for child in compiling)
    assert marks(cold) == []
    assert not (tmp_path / "out").exists()


def test_where_compiling_fails_torch_serves_and_a_warning_says_so(
    paths: list[Path], cold: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "WORTH_COMPILING", 0)
    monkeypatch.setattr(warm, "_compile_in_child", lambda names, check_stop: None)
    events: list[Event] = []
    merge(config_for("linear", paths), tmp_path / "out", on_event=events.append)
    (warning,) = (event.values["message"] for event in events if event.kind == "warning")
    assert "compiling them failed" in warning
    assert "torch" in warning


# --- where kernels are kept


def _file(place: Path) -> None:
    place.write_text("")


def _open_to_all(place: Path) -> None:
    (place / "streammerge").mkdir(parents=True)
    (place / "streammerge").chmod(0o777)


def _of_another(place: Path) -> None:
    (place / "streammerge").mkdir(parents=True)
    if os.geteuid() != 0:
        pytest.skip("only root can give a folder away")
    os.chown(place / "streammerge", 12345, 12345)


def _kernel_file_system(place: Path) -> None:
    place.symlink_to("/proc")


def _full(place: Path) -> None:
    place.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16k", "none", place], capture_output=True
    ).returncode:
        pytest.skip("needs the right to mount")


BROKEN = [_file, _open_to_all, _of_another, _kernel_file_system, _full]


@pytest.mark.parametrize("spoil", BROKEN, ids=lambda spoil: spoil.__name__)
@pytest.mark.parametrize("kind", ["NUMBA_CACHE_DIR", "XDG_CACHE_HOME", "HOME"])
def test_a_place_that_does_not_serve_is_passed_over(
    spoil: Callable[[Path], None], kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cold: Path
) -> None:
    if kind != "NUMBA_CACHE_DIR":
        monkeypatch.delenv("XDG_CACHE_HOME")
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    bad = tmp_path / "bad"
    monkeypatch.setenv(kind, str(bad))
    if kind == "HOME":
        bad = bad / ".cache"
        bad.parent.mkdir()
    spoil(bad)
    try:
        found = compiled.kernel_cache()
    finally:
        if os.path.ismount(bad):
            subprocess.run(["umount", bad], check=True)
    expected = cold if kind == "NUMBA_CACHE_DIR" else tmp_path / "tmp"
    assert found.directory is not None
    assert found.directory.is_relative_to(expected)
    assert str(bad) in found.refused[0]


@pytest.mark.parametrize("kind", ["NUMBA_CACHE_DIR", "XDG_CACHE_HOME"])
def test_the_place_that_the_environment_names_is_taken(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cold: Path
) -> None:
    monkeypatch.setenv(kind, str(tmp_path / "mine"))
    found = compiled.kernel_cache().directory
    assert found is not None
    assert found.is_relative_to(tmp_path / "mine")
    assert found.stat().st_mode & 0o777 == 0o700


def test_in_a_shared_temporary_folder_only_a_folder_of_ones_own_serves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cold: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    own = tmp_path / f"streammerge-{os.geteuid()}"
    (tmp_path / "elsewhere").mkdir()
    own.symlink_to(tmp_path / "elsewhere")
    assert compiled.kernel_cache().directory is None
    own.unlink()
    own.mkdir(mode=0o755)
    compiled.kernel_cache.cache_clear()
    assert compiled.kernel_cache().directory is None
    own.chmod(0o700)
    compiled.kernel_cache.cache_clear()
    assert compiled.kernel_cache().directory is not None


def test_without_any_place_torch_serves_with_a_warning_and_nothing_is_left_anywhere(
    paths: list[Path], tmp_path: Path
) -> None:
    package = Path(streammerge.__file__).parent
    before = set(package.rglob("*.nb[ic]"))
    config = tmp_path / "config.yml"
    config.write_text(yaml.safe_dump(config_for("linear", paths)))
    environment = {
        **{key: value for key, value in os.environ.items() if key != "HOME"},
        "XDG_CACHE_HOME": "/proc/nowhere",
        "TMPDIR": "/proc/nowhere",
        "PYTHONPATH": str(package.parent),
    }
    code = "import tempfile; tempfile.tempdir = '/proc/nowhere'; from streammerge.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "merge", str(config), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if not line.startswith("after ")]
    assert line.startswith("warning: the compiled kernels cannot be used (no cache directory is writable (")
    assert "set XDG_CACHE_HOME" in line
    assert set(package.rglob("*.nb[ic]")) == before
    assert not list((tmp_path / "out").glob("*.partial"))


def test_kernels_compiled_ahead_in_a_folder_that_cannot_be_written_are_taken_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cold: Path
) -> None:
    ahead = compiled.kernel_cache().directory
    assert ahead is not None
    compiled.mark_compiled("weighted_sum")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    prepare = compiled._prepare

    def read_only(directory: Path, private: bool) -> None:
        if directory == ahead:
            raise PermissionError(0, "read-only")
        prepare(directory, private)

    monkeypatch.setattr(compiled, "_prepare", read_only)
    forget()
    directory = compiled.kernel_cache().directory
    assert directory is not None
    assert directory != ahead
    assert compiled.lacking(["weighted_sum", "ranks"]) == ["ranks"]


def test_kernels_are_kept_by_the_content_of_every_file_they_are_compiled_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = Path(streammerge.__file__).parent
    loops = {
        module: names
        for module, names in ARROWS.items()
        if module.startswith("streammerge.kernels") or "streammerge.numerics.jit" in names
    }
    how = ARROWS["streammerge.numerics.jit"]  # what the compiler itself is made of
    compiled_in = set(loops).union(how, *loops.values()) - {
        "streammerge.numerics.compiled",
        "streammerge.kernels",
    }
    compiled_in |= {"streammerge.numerics.exporting", "streammerge.numerics.ready"}
    files = {package.joinpath(*name.split(".")[1:]).with_suffix(".py") for name in compiled_in}
    assert files | {package / "kernels" / "__init__.py"} == set(compiled._sources(package))
    shutil.copytree(
        package, tmp_path / "copy", ignore=lambda where, names: [n for n in names if n == "__pycache__"]
    )
    monkeypatch.setattr(compiled, "_PACKAGE", tmp_path / "copy")
    found = {compiled._digest()}
    for path in compiled._sources(tmp_path / "copy"):
        path.write_text(path.read_text() + "\n")
        found.add(compiled._digest())
    assert len(found) == 1 + len(files) + 1
