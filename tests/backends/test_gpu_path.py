"""The way of bytes through a GPU, on one that a driver in memory plays: whole merges have the bytes of the CPUs'."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from streammerge.api import merge, plan, sweep, verify
from streammerge.backends.fused.launcher import KernelSpec
from streammerge.backends.gpu import backend as gpu
from streammerge.backends.gpu.arena import Space
from streammerge.backends.gpu.driver import DriverError
from streammerge.backends.gpu.lane import Lane, Sizes
from streammerge.backends.gpu.launcher import DriverLauncher
from streammerge.backends.gpu.ring import Ring
from streammerge.backends.registry import BACKENDS
from streammerge.backends.torch.backend import CUDA, TORCH
from streammerge.engine import on_device as merging
from streammerge.errors import InputError, ModelError, OutputError, Stopped, WorldError
from streammerge.output.journal import compare
from streammerge.planning import on_device
from tests.backends.fake_driver import FakeDriver, Twin
from tests.conftest import config_for, output_bytes, read_tensors, write_model, write_models

SHAPES = {
    "embed": (301, 67),
    "odd": (37, 53),
    "wide": (40, 4096),
    "norm": (64,),
    "scalar": (),
}
TINY = Sizes(slots_in=3, slots_out=2, slot_bytes=1 << 13, staging=1, staging_bytes=1 << 12)
"""Slots of two pages: every tensor wraps around the ring, and most parts end within a page."""
Fake = Callable[..., FakeDriver]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[Fake]:
    """Let a GPU be here that `FakeDriver` plays, with tiny rings; every tensor of 1 KB and more goes there.

    Returns a function that makes the next one.
    """
    drivers: list[FakeDriver] = []

    def make(nbytes: int = 1 << 24, scratch: int = 0, **how: Any) -> FakeDriver:
        drivers.append(FakeDriver(nbytes, **how))
        driver = drivers[-1]

        def open_lane(device: str) -> Lane:
            assert device == "cuda:0"
            return Lane(driver, partial(Twin, driver=driver, scratch=scratch), lambda spec: "", TINY)

        played = replace(
            gpu.FUSED,
            open_lane=open_lane,
            find=lambda number: f"cuda:{number}" if number < 1 else None,
            fuses=lambda rule, calls: True,
            lacks=lambda: None,
        )
        monkeypatch.setitem(BACKENDS, "fused", played)
        return driver

    monkeypatch.setattr(on_device, "DEVICE_BYTES", 1 << 10)
    yield make
    assert all(driver.closed and not driver.pinned for driver in drivers if driver.calls)


CASES = [
    ("linear", {}),
    ("ties", {"density": 0.3}),
    ("ties", {"density": 0.3, "trim_scope": "model", "ties": "index", "zero_sign": "majority"}),
    ("dare_ties", {"density": 0.4, "mask": "exact", "rescale": "l1"}),
    ("fisher", {}),
    ("slerp", {"t": 0.4}),
    ("della", {"density": 0.5}),
    ("model_stock", {"filter_wise": True}),
]
WAYS = {"whole": (1 << 24, 0), "little scratch": (1 << 24, 40), "streamed": (1 << 21, 8)}
"""Bytes of the device, and scratch bytes per element that a kernel takes."""


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_models(tmp_path_factory.mktemp("models"), shapes=SHAPES)


def run(config: Any, out: Path, **how: Any) -> dict[str, bytes]:
    """Merge on the GPU that is played, and return the bytes of the output."""
    merge(config, out, **{"device": "cuda", "memory": "2GiB", "threads": 2, "progress": False, **how})
    return output_bytes(out)


@pytest.fixture(scope="module")
def on_cpus(paths: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return what gives the bytes of a merge on CPUs, each made once."""
    known: dict[str, dict[str, bytes]] = {}

    def get(method: str, **parameters: Any) -> dict[str, bytes]:
        key = repr((method, parameters))
        if key not in known:
            config = config_for(method, paths, parameters=parameters, seed=7)
            known[key] = run(config, tmp_path_factory.mktemp("cpus") / "out", device="cpu")
        return known[key]

    return get


@pytest.mark.parametrize(("method", "parameters"), CASES)
def test_a_merge_through_the_ring_has_the_bytes_of_the_cpus(
    method: str, parameters: dict[str, Any], paths: list[Path], on_cpus: Any, tmp_path: Path, fake: Fake
) -> None:
    config = config_for(method, paths, parameters=parameters, seed=7)
    expected = on_cpus(method, **parameters)
    brought = {}
    for way, (nbytes, scratch) in WAYS.items():
        driver = fake(nbytes, scratch)
        assert run(config, tmp_path / way, overwrite=True) == expected, way
        brought[way] = sum(call[2] for call in driver.calls if call[0] == "copy_in")
        assert driver.counts["launch"] >= 3
        assert driver.counts["copy_out"] > 20
    assert brought["whole"] <= brought["little scratch"] <= brought["streamed"]
    if method == "dare_ties":  # statistics find what is held; what is not is read again
        assert brought["streamed"] > 1.5 * brought["whole"]


def test_a_tensor_of_more_elements_than_a_launch_counts_is_computed_in_parts(
    paths: list[Path], on_cpus: Any, tmp_path: Path, fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_for("ties", paths, parameters={"density": 0.3}, seed=7)
    launches = []
    for most in (1 << 30, 1 << 12):
        monkeypatch.setattr(merging, "_MOST_AT_ONCE", most)
        driver = fake()
        assert run(config, tmp_path / "gpu", overwrite=True) == on_cpus("ties", density=0.3)
        launches.append(driver.counts["launch"])
    assert launches[1] > 3 * launches[0]


@pytest.mark.parametrize("ignored", ["wait", "synchronize"])
def test_what_does_not_wait_for_its_events_is_noticed(
    ignored: str, paths: list[Path], on_cpus: Any, tmp_path: Path, fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, expected = config_for("linear", paths, parameters={}, seed=7), on_cpus("linear")
    monkeypatch.setattr(FakeDriver, ignored, lambda *arguments: None)
    fake()
    try:
        found = run(config, tmp_path / "gpu", nonfinite="warn")
    except (WorldError, IndexError):
        return
    assert found != expected


CALLS = {
    "memory": 0, "allocate": 0, "stream": 2, "copy_in": 5, "record": 7, "wait": 2, "launch": 3, "synchronize": 4, "copy_out": 3
}  # fmt: skip
"""Calls of the driver, each with the number of the one that fails."""


@pytest.mark.parametrize(("call", "number"), CALLS.items())
def test_each_call_that_fails_is_told_in_one_line_and_the_merge_resumes(
    call: str, number: int, paths: list[Path], on_cpus: Any, tmp_path: Path, fake: Fake
) -> None:
    config = config_for("ties", paths, parameters={"density": 0.3}, seed=7)
    failing = fake(fails=(call, number))
    with pytest.raises(
        DriverError, match=rf"^the GPU's driver failed at {call} \(planted\): .*--device cpu$"
    ):
        run(config, tmp_path / "out")
    assert failing.counts[call] > number
    fake()
    resumed = run(config, tmp_path / "out", device="cpu" if number % 2 else "cuda")
    assert resumed == on_cpus("ties", density=0.3)


@pytest.mark.parametrize("nbytes", [1 << 24, 1 << 21], ids=["whole", "streamed"])
def test_a_merge_that_is_stopped_amid_its_copies_resumes(
    nbytes: int, paths: list[Path], on_cpus: Any, tmp_path: Path, fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, stop = config_for("ties", paths, parameters={"density": 0.3}, seed=7), threading.Event()
    driver, copy_in = fake(nbytes), FakeDriver.copy_in

    def stopping(self: FakeDriver, *arguments: Any) -> None:
        copy_in(self, *arguments)
        if self.counts["copy_in"] == 30:
            stop.set()

    monkeypatch.setattr(FakeDriver, "copy_in", stopping)
    with pytest.raises(Stopped):
        run(config, tmp_path / "out", stop=stop)
    assert driver.closed
    monkeypatch.setattr(FakeDriver, "copy_in", copy_in)
    fake(nbytes)
    assert run(config, tmp_path / "out") == on_cpus("ties", density=0.3)


def test_the_points_of_a_sweep_share_what_the_device_holds(
    paths: list[Path], tmp_path: Path, fake: Fake
) -> None:
    config = {**config_for("task_arithmetic", paths, seed=7), "sweep": {"lambda": [0.5, 0.7, 1.0]}}
    driver = fake()
    for device in ("cuda", "cpu"):
        how = {"device": device, "memory": "2GiB", "threads": 2, "progress": False}
        sweep(config, tmp_path / device, **how)
    files = sorted(path.relative_to(tmp_path / "cpu") for path in (tmp_path / "cpu").rglob("*.safetensors"))
    assert len(files) == 3
    for file in files:
        assert (tmp_path / "cuda" / file).read_bytes() == (tmp_path / "cpu" / file).read_bytes()
    inputs = sum(path.stat().st_size for one in paths for path in one.glob("*.safetensors"))
    assert sum(call[2] for call in driver.calls if call[0] == "copy_in") < inputs


def test_memory_that_is_not_pinned_is_told_and_serves(
    paths: list[Path], on_cpus: Any, tmp_path: Path, fake: Fake
) -> None:
    fake(fails=("pin", 0))
    told: list[Any] = []
    found = run(config_for("linear", paths, parameters={}, seed=7), tmp_path / "gpu", on_event=told.append)
    assert [e.values["message"] for e in told if e.kind == "warning" and "pin" in e.values["message"]] == [
        "the GPU's driver does not pin 44.0 KiB of memory (planted), so that copies are slower: leave more of the machine's "
        "memory free; WSL and some virtual machines let little be pinned"
    ]
    assert found == on_cpus("linear")


def test_out_of_memory_halves_the_residence_and_says_so_once(
    paths: list[Path], on_cpus: Any, tmp_path: Path, fake: Fake
) -> None:
    config = config_for("ties", paths, parameters={"density": 0.3}, seed=7)
    driver = fake(1 << 23, room=3 << 20)
    told: list[Any] = []
    found = run(config, tmp_path / "gpu", on_event=told.append)
    asked = [call[1] for call in driver.calls if call[0] == "allocate"]
    assert asked == [asked[0], asked[0] // 2 // 256 * 256]
    lines = [e.values["message"] for e in told if e.kind == "warning"]
    assert [
        line for line in lines if line.startswith("the GPU ran out of memory: tensors of more than 2.1 MiB")
    ]
    assert len(lines) == 1
    assert found == on_cpus("ties", density=0.3)


def test_a_gpu_without_memory_is_refused_in_one_line(paths: list[Path], tmp_path: Path, fake: Fake) -> None:
    fake(room=0)
    with pytest.raises(WorldError, match=r"^the GPU has only .* to spare: .*--device cpu$"):
        run(config_for("linear", paths), tmp_path / "gpu")


@pytest.mark.parametrize("nbytes", [1 << 24, 1 << 21])
def test_experts_in_different_layouts_are_brought_part_by_part(
    nbytes: int, tmp_path: Path, fake: Fake
) -> None:
    parent, shape = "model.layers.0.mlp.experts", (3, 40, 1024)
    paths = [tmp_path / "stacked", tmp_path / "single", tmp_path / "base"]
    for seed, path in enumerate(paths):
        generator = torch.Generator().manual_seed(seed)
        whole = {
            "gate_up_proj": torch.randn((shape[0], 2 * shape[1], shape[2]), generator=generator).bfloat16(),
            "down_proj": torch.randn((shape[0], shape[2], shape[1]), generator=generator).bfloat16(),
        }
        tensors = {f"{parent}.{name}": value for name, value in whole.items()}
        if path.name == "single":
            halves = whole["gate_up_proj"].chunk(2, 1)
            some = {"gate_proj": halves[0], "up_proj": halves[1], "down_proj": whole["down_proj"]}
            tensors = {
                f"{parent}.{i}.{name}.weight": value[i].contiguous()
                for name, value in some.items()
                for i in range(shape[0])
            }
        write_model(path, tensors)
    inputs = sum(value.nbytes for path in paths[:2] for value in read_tensors(path).values())
    for first in (0, 1):
        models = [{"model": str(paths[i]), "parameters": {"weight": 0.5}} for i in (first, 1 - first)]
        config = {"merge_method": "linear", "models": models, "dtype": "bfloat16"}
        driver = fake(nbytes)
        found = [run(config, tmp_path / f"{device} {first}", device=device) for device in ("cuda", "cpu")]
        assert found[0] == found[1]
        assert sum(call[2] for call in driver.calls if call[0] == "copy_in") == inputs


@pytest.mark.parametrize("method", ["linear", "ties"])
def test_what_is_not_finite_is_named_as_on_cpus(method: str, tmp_path: Path, fake: Fake) -> None:
    paths = write_models(tmp_path, shapes={"w": (40, 4096)}, dtype=torch.float16)
    tensors = read_tensors(paths[1])
    tensors["w"][3, 5] = float("inf")
    write_model(paths[1], tensors)
    config = config_for(method, paths)
    fake()
    said = []
    for device in ("cuda", "cpu"):
        with pytest.raises(ModelError) as caught:
            run(config, tmp_path / device, device=device)
        said.append(str(caught.value))
    assert said[0] == said[1]
    assert "element 12293" in said[0]
    fake()
    tolerant = [run(config, tmp_path / device, device=device, nonfinite="warn") for device in ("cuda", "cpu")]
    assert tolerant[0] == tolerant[1]


# --- the parts


def test_space_is_given_out_without_overlap_and_again() -> None:
    space = Space(1000, 4096)
    first, second = space.allocate(1), space.allocate(1000)
    assert (first, second) == (1024, 1280)
    space.free(first)
    assert space.allocate(256) == first
    with pytest.raises(MemoryError):
        space.allocate(4096)


def test_a_slot_is_free_when_its_copy_is_done() -> None:
    driver = FakeDriver(1 << 16)
    ring, stop, stream = Ring(driver, 2, 4096), threading.Event(), driver.stream()
    for value in range(6):
        taken = ring.take(stop)
        assert taken is not None
        taken[1][:] = value
        driver.copy_in(taken[1], driver.base + (value << 12), stream)
        ring.give(taken[0], driver.record(stream))
    driver.synchronize(driver.record(stream))
    assert [int(driver.memory_bytes[value << 12]) for value in range(6)] == list(range(6))
    held = [ring.take(stop), ring.take(stop)]
    assert ring.take(stop, wait=False) is None
    stop.set()
    assert ring.take(stop) is None
    for one in held:
        assert one is not None
        ring.give(one[0])
    ring.close()
    assert not driver.pinned


def test_slots_are_unpinned_though_a_copy_failed() -> None:
    driver = FakeDriver(1 << 16, fails=("synchronize", 0))
    ring, stream = Ring(driver, 2, 4096), driver.stream()
    taken = ring.take(threading.Event())
    assert taken is not None
    ring.give(taken[0], driver.record(stream))
    with pytest.raises(DriverError):
        ring.close()
    assert not driver.pinned


def test_the_launcher_sends_tables_in_parts_and_adds_the_null_pointers() -> None:
    driver = FakeDriver(1 << 20)
    stream, staging = driver.stream(), Ring(driver, 1, 4096)
    launcher = DriverLauncher(driver, stream, Space(driver.base, 1 << 19), staging, lambda spec: "ptx of it")
    values = np.arange(3000, dtype=np.int64)
    place = launcher.allocate(values.nbytes)
    launcher.send(values, place)
    spec = KernelSpec(
        "sum", "sum.ptx", "sum_0", ("i64", "i32"), nulls=2, threads=128, shared=32, elements=1024
    )
    launcher.launch(spec, (7, 2), [place, 3])
    launcher.launch(spec, (1, 1), [place, 4])
    values[:] = 0
    launcher.fetch(place, values)
    assert values.tolist() == list(range(3000))
    assert driver.counts["load"] == 1
    entry, grid, threads, shared, parameters = driver.launched[0]
    assert (entry, grid, threads, shared) == (("ptx of it", "sum_0"), (7, 2), 128, 32)
    assert parameters == [place, 3, 0, 0]
    assert [one.nbytes for one in parameters] == [8, 4, 8, 8]
    staging.close()


# --- the record


def test_the_identity_names_a_device_where_bits_may_be_its_own(
    paths: list[Path], tmp_path: Path, fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake()
    torch_there = replace(CUDA, find=lambda number: f"cuda:{number}")
    monkeypatch.setitem(BACKENDS, "fused", replace(BACKENDS["fused"], rest=torch_there))
    own = tmp_path / "own.py"
    own.write_text(
        "import streammerge\n@streammerge.method('half_way', base='required', models=(1, 1))\n"
        "def half_way(models, base):\n    return base + 0.5 * (models[0] - base)\n"
    )
    formula = config_for("half_way", paths[:2])
    identities = [
        plan(config, device=device, methods=own, memory="4GiB").identity().get("device")
        for config in (config_for("ties", paths), formula)
        for device in ("cuda", "cpu")
    ]
    assert identities == [None, None, "cuda", None]


def test_what_a_device_may_have_rounded_is_neither_resumed_nor_compared_on_a_different_one(
    paths: list[Path], tmp_path: Path, fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake()

    def on_cpu(block: Any, device: str, sees: Any) -> Any:
        return TORCH.math(block, "cpu", sees)

    torch_there = replace(CUDA, math=on_cpu, turn=None, find=lambda number: f"cuda:{number}")
    monkeypatch.setitem(BACKENDS, "fused", replace(BACKENDS["fused"], rest=torch_there))
    own = tmp_path / "own.py"
    own.write_text(
        "import streammerge\n@streammerge.method('part_way', base='required', models=(1, 1))\n"
        "def part_way(models, base):\n    return base + 0.25 * (models[0] - base)\n"
    )
    config, out = config_for("part_way", paths[:2]), tmp_path / "out"
    run(config, out, methods=own, memory="4GiB")
    assert verify(out).problems == ()
    with pytest.raises(InputError, match=r"was made with a different device than .*cannot be compared"):
        verify(out, against=config, methods=own)
    with pytest.raises(OutputError, match="holds a finished merge with a different device: choose"):
        run(config, out, methods=own, device="cpu")
    with pytest.raises(OutputError, match="holds an unfinished merge with a different device: rerun"):
        compare({"seed": "0"}, {"seed": "0", "device": "cuda"}, out)
