"""`--device auto`: a GPU is taken only where it is expected to pay, and the reason is said."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from streammerge.api import plan
from streammerge.backends.gpu.backend import FUSED
from streammerge.backends.registry import BACKENDS
from streammerge.backends.torch.backend import CUDA
from streammerge.checkpoint.index import open_model
from streammerge.errors import BudgetError
from streammerge.io.disk import cached_share_of
from streammerge.machine import disk_rate, gpus, physical_cores
from streammerge.methods.catalog import load_builtin
from streammerge.methods.registry import all_methods
from streammerge.planning import backend as chosen
from streammerge.planning import prepare
from streammerge.planning.backend import CUDA_LEAST, RANKS_RATE, find_device, workload_of
from streammerge.planning.description import describe
from streammerge.planning.device import Host, Volume, Workload, host_of, volume_of, weigh
from streammerge.report.summary import device_lines
from tests.checkpoint.quantized.formats import write as write_quantised
from tests.conftest import config_for

PLAIN = Volume(1, 1)
TORCH_THERE = replace(CUDA, find=lambda number: f"cuda:{number}")
"""Torch where it finds a GPU, as it does not here."""
TIES, FAST = Workload("ties", 560 * 10**9, 1.5, 25.0), Host(16, 7.0)


@pytest.mark.parametrize(
    ("work", "host", "gpu", "reason"),
    [  # The cases of a 70B merge of three models and a base, 560 GB, computed by hand.
        (TIES, FAST, False, "16 cores merge ties at 10.7 GB/s; a GPU would wait for the disk"),
        (
            TIES,
            Host(4, 7.0),
            True,
            "4 cores merge ties at 2.7 GB/s; a GPU reaches 7.0, as the disk gives them",
        ),
        (TIES, Host(7, 30.0), True, "7 cores merge ties at 4.7 GB/s; a GPU reaches 25"),
        (TIES, Host(64, 30.0), False, "64 cores merge ties at 43 GB/s; a GPU would wait for the disk"),
        (TIES, Host(7, 1.9), False, "7 cores merge ties at 4.7 GB/s; a GPU would wait for the disk"),
        (TIES, Host(16, 30.0, "the page cache"), True, "16 cores merge ties at 10.7 GB/s; a GPU reaches 25"),
        (
            replace(TIES, gpu_rate=2.0),
            Host(4, 7.0),
            False,
            "4 cores merge ties at 2.7 GB/s; a GPU would reach 2.0",
        ),
        (replace(TIES, gpu_rate=None), Host(4, 7.0), False, "no kernel for GPUs computes ties"),
        (
            replace(TIES, nbytes=6 * 10**9),
            Host(1, 7.0),
            False,
            "1 core merges ties in about 9 s; a GPU would not repay its start",
        ),
        (Workload("linear", 560 * 10**9, 0.5, 25.0), Host(4, 7.0), False, None),
        (Workload("della", 560 * 10**9, 6.0, 25.0), FAST, True, None),
    ],
)
def test_a_gpu_is_taken_where_the_cpus_are_the_bound(
    work: Workload, host: Host, gpu: bool, reason: str | None
) -> None:
    choice = weigh(work, host)
    assert choice.gpu is gpu, choice
    assert reason in (None, choice.reason)


@pytest.fixture
def with_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a GPU be here, and torch find it."""
    monkeypatch.setattr(chosen, "gpus", lambda: ["0"])
    gpu = replace(FUSED, find=lambda number: f"cuda:{number}", lacks=lambda: None)
    monkeypatch.setitem(BACKENDS, "fused", gpu)


@pytest.mark.usefixtures("with_gpu")
def test_the_choice_is_weighed_only_where_there_is_one() -> None:
    def never() -> Host:
        raise AssertionError

    def few() -> Host:
        return Host(4, 7.0)

    assert find_device("auto", None, lambda: TIES, few).name == "cuda:0"
    assert find_device("auto", CUDA_LEAST, lambda: TIES, few).name == "cuda:0"
    small = find_device("auto", CUDA_LEAST - 1, lambda: TIES, never)
    assert small == ("cpu", "a GPU needs at least --memory 1636 MiB")
    assert find_device("cpu", None, lambda: TIES, never) == ("cpu", "asked for")


def test_without_a_gpu_nothing_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chosen, "gpus", list)
    assert find_device("auto", None, lambda: TIES, lambda: FAST) == ("cpu", "no GPU is here")


@pytest.mark.usefixtures("with_gpu")
def test_the_plan_tells_the_reason_and_a_merge_says_it_once(make_models: Callable[..., list[Path]]) -> None:
    decided = describe(plan(config_for("ties", make_models())))
    assert decided["device"] == "cpu"
    (line,) = device_lines(decided)
    assert line.startswith("device: CPUs (")
    assert line.endswith("merge ties in less than a second; a GPU would not repay its start)")
    assert device_lines(describe(plan(config_for("ties", make_models()), device="cpu"))) == []


@pytest.mark.usefixtures("with_gpu")
def test_a_gpu_that_auto_takes_never_makes_a_merge_too_large(
    make_models: Callable[..., list[Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "host_of", lambda paths, threads, cold: Host(1, 7.0))
    monkeypatch.setattr(prepare, "workload_of", lambda *facts: TIES)
    config = config_for("ties", make_models())
    assert plan(config, memory="4GiB").device == "cuda:0"
    monkeypatch.setattr(chosen, "CUDA_LEAST", 0)
    small = plan(config, memory="700MiB")
    assert (small.device, small.device_reason) == ("cpu", "--memory leaves no room for a GPU's libraries")
    with pytest.raises(BudgetError):
        plan(config, memory="700MiB", device="cuda")


@pytest.mark.usefixtures("with_gpu")
def test_a_gpu_that_computes_nothing_is_told(make_models: Callable[..., list[Path]]) -> None:
    config = config_for("ties", make_models())
    (told,) = [one for one in plan(config, device="cuda", memory="4GiB").warnings if "cuda:0" in one]
    assert told.startswith("nothing of this merge is computed on cuda:0: ")
    large = config_for("ties", make_models(shapes={"w": (400, 512)}))
    decided = plan(large, device="cuda", memory="4GiB")
    assert not [one for one in decided.warnings if "cuda:0" in one]
    assert [work.on_device for work in decided.work].count(True) == 1


@pytest.mark.usefixtures("with_gpu")
def test_what_a_first_run_has_read_changes_no_device_that_the_output_names(
    make_models: Callable[..., list[Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a merge by `auto` that was killed would be refused by the same command."""
    asked: list[bool] = []

    def host(paths: object, threads: object, *, cold: bool) -> Host:
        asked.append(cold)
        return Host(1, 7.0)

    monkeypatch.setattr(prepare, "host_of", host)
    config = config_for("ties", make_models())
    plan(config)
    monkeypatch.setattr(prepare, "has_bits_of_device", lambda method: True)
    plan(config)
    assert asked == [False, True]


def test_every_builtin_method_has_a_cost() -> None:
    load_builtin()
    builtin = [one for one in all_methods().values() if one.origin == "built in"]
    assert [one.name for one in builtin if not one.cost] == []


@pytest.mark.parametrize("fused", [True, False])
def test_the_rate_of_a_gpu_is_that_of_what_computes_the_method_there(
    fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = replace(FUSED, lacks=lambda: None, fuses=lambda rule, calls: fused, rest=TORCH_THERE)
    monkeypatch.setitem(BACKENDS, "fused", gpu)
    load_builtin()
    rates = {
        name: workload_of(one, one.n_models[1] or 2, PLAIN).gpu_rate
        for name, one in all_methods().items()
        if one.origin == "built in"
    }
    assert rates["iso_c"] is None  # decompositions there have not been measured
    assert rates["regmean"] == CUDA.rate  # torch's products
    assert rates["della"] == (RANKS_RATE if fused else None)
    assert rates["ties"] == rates["linear"] == rates["fisher"] == (FUSED.rate if fused else None)
    monkeypatch.setitem(BACKENDS, "fused", replace(gpu, lacks=lambda: "what to install"))
    assert workload_of(all_methods()["ties"], 2, PLAIN).gpu_rate == CUDA.rate
    monkeypatch.setitem(BACKENDS, "fused", replace(gpu, rest=replace(CUDA, find=lambda number: None)))
    assert workload_of(all_methods()["regmean"], 2, PLAIN).gpu_rate is None  # torch's CPU build


def test_codes_count_by_the_bytes_that_are_read_and_by_the_values_that_they_stand_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_quantised(tmp_path, "fp8 blocks F32", rows=256, columns=512, modules=("layers.0.q_proj",))
    volume = volume_of(open_model(str(tmp_path)).values())
    n, plain = 256 * 512, 2 * 24
    assert n + plain < volume.nbytes < 1.02 * n
    assert volume[1:] == (2 * n + plain, n)

    monkeypatch.setitem(BACKENDS, "fused", replace(FUSED, lacks=lambda: None, rest=TORCH_THERE))
    load_builtin()
    of_codes, of_values = Volume(10**9, 4 * 10**9, 2 * 10**9), Volume(10**9, 10**9)
    ties, linear = all_methods()["ties"], all_methods()["linear"]
    assert ties.cost is not None
    for size, cost in ((of_values, ties.cost), (of_codes, 4 * ties.cost + 2.4)):
        work = workload_of(ties, 3, size)
        assert (work.nbytes, work.cost, work.gpu_rate) == (10**9, pytest.approx(cost), FUSED.rate)
    assert workload_of(all_methods()["della"], 3, of_codes).gpu_rate == RANKS_RATE / 4
    assert workload_of(all_methods()["regmean"], 3, of_codes).gpu_rate == CUDA.rate / 4
    many = Volume(280 * 10**9, 560 * 10**9, 280 * 10**9)  # a base and three models of 70B in FP8
    assert not weigh(workload_of(linear, 3, many), Host(8, 2.0)).gpu
    assert weigh(workload_of(linear, 3, many), Host(8, 7.0)).gpu


# --- the machine


def test_cores_are_counted_once_for_all_their_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 5})
    for cpu, siblings in {0: "0,4", 1: "1,5", 5: "1,5"}.items():
        topology = tmp_path / f"cpu{cpu}" / "topology"
        topology.mkdir(parents=True)
        (topology / "thread_siblings_list").write_text(siblings)
    assert physical_cores(tmp_path) == 3


def test_gpus_are_those_that_the_environment_allows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, nodes = tmp_path / "nvidia" / "gpus", tmp_path / "dev"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert gpus(folder, nodes) == []
    for minor in range(3):
        (folder / f"0000:0{minor}:00.0").mkdir(parents=True)
        (folder / f"0000:0{minor}:00.0" / "information").write_text(
            f"Model: \t H100\nDevice Minor: \t {minor}\n"
        )
    assert gpus(folder, nodes) == ["0", "1", "2"]  # no device file before the driver's first use
    nodes.mkdir()
    for name in ("nvidia1", "nvidia2", "nvidiactl"):  # a container with two of three
        (nodes / name).touch()
    assert gpus(folder, nodes) == ["0", "1"]
    (folder.parent / "capabilities" / "gpu1" / "mig" / "gi1").mkdir(parents=True)
    assert gpus(folder, nodes) == ["0"]
    for visible, names in {
        "-1": [],
        "": [],
        "NoDevFiles": [],
        "2, 0": ["2", "0"],
        "1,-1,0": ["1"],  # the driver stops at the first that names none
        "GPU-8c6,MIG-3f1": ["GPU-8c6", "MIG-3f1"],
    }.items():
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert gpus(folder, nodes) == names


@pytest.mark.parametrize(
    ("name", "rotational", "rate"),
    [("nvme0n1", "0", 7.0), ("sda", "0", 0.5), ("sdb", "1", 0.2), ("vda", "1", 2.0), ("nbd0", "0", 7.0)],
)
def test_the_kind_of_a_disk_tells_its_rate(tmp_path: Path, name: str, rotational: str, rate: float) -> None:
    devices, file = tmp_path / "devices", tmp_path / "file"
    file.touch()
    disk = tmp_path / name
    (disk / "queue").mkdir(parents=True)
    (disk / "queue" / "rotational").write_text(rotational)
    (disk / "part" / "x").mkdir(parents=True)
    (disk / "part" / "partition").write_text("1")
    devices.mkdir()
    number = os.stat(file).st_dev
    (devices / f"{os.major(number)}:{os.minor(number)}").symlink_to(disk / "part")
    assert disk_rate(str(file), devices) == rate


@pytest.mark.parametrize(("level", "rate"), [("raid0", 14.0), ("raid1", 7.0)])
def test_striped_disks_add_up(tmp_path: Path, level: str, rate: float) -> None:
    devices, file, array = tmp_path / "devices", tmp_path / "file", tmp_path / "md0"
    file.touch()
    for folder in (devices, array / "slaves", array / "md"):
        folder.mkdir(parents=True)
    (array / "md" / "level").write_text(level)
    for name in ("nvme0n1", "nvme1n1"):
        (tmp_path / name).mkdir()
        (array / "slaves" / name).symlink_to(tmp_path / name)
    number = os.stat(file).st_dev
    (devices / f"{os.major(number)}:{os.minor(number)}").symlink_to(array)
    assert disk_rate(str(file), devices) == rate


def test_what_lies_in_the_page_cache_is_found(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(1 << 20))
    file.read_bytes()
    assert cached_share_of([str(file), str(tmp_path / "missing")]) > 0.9
    assert cached_share_of([]) == cached_share_of([str(tmp_path / "missing")]) == 0.0
    assert host_of([str(file)], 1).source == "the page cache"
    assert host_of([str(file)], 1, cold=True).source == "the disk"
    assert host_of(["s3://bucket/model.safetensors"], 1) == Host(1, 1.0, "the store")
