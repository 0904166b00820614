"""The driver by cuda-core, on a libcuda of C that this test compiles: what it is asked, in which order, with what."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.patience import PATIENCE

SOURCE = Path(__file__).with_name("fake_libcuda.c")
pytestmark = pytest.mark.skipif(
    shutil.which("gcc") is None or importlib.util.find_spec("cuda") is None, reason="needs gcc and cuda-core"
)
PROGRAM = """
import ctypes, json, os, sys, threading
from contextlib import nullcontext
from types import SimpleNamespace
import numpy as np
from streammerge.backends.gpu.backend import find_gpu, loader
from streammerge.backends.gpu.core_driver import CoreDriver, capability, count_gpus
from streammerge.backends.gpu.driver import DriverError
from streammerge.backends.gpu.lane import Lane, Sizes
from streammerge.backends.gpu.torch_driver import TorchDriver
from streammerge.errors import InputError

found = {"gpus": count_gpus(), "loader": loader(), "capability": capability(0), "device": find_gpu(0), "none": find_gpu(1)}
os.environ["FAKE_CUDA_CAPABILITY"] = "7.0"
try:
    find_gpu(0)
except InputError as error:
    found["too old"] = str(error)
os.environ["FAKE_CUDA_CAPABILITY"] = "9.0"
for number in (100, 802, 304):
    os.environ.update(FAKE_CUDA_FAILS="cuInit", FAKE_CUDA_ERROR=str(number))
    try:
        found[f"start {number}"] = find_gpu(0)
    except InputError as error:
        found[f"start {number}"] = str(error)
del os.environ["FAKE_CUDA_FAILS"], os.environ["FAKE_CUDA_ERROR"]
from cuda.bindings import driver as bindings
found["bindings"] = bindings.CUDA_VERSION // 1000
os.environ["FAKE_CUDA_VERSION"] = str(1000 * found["bindings"] - 960)
try:
    find_gpu(0)
except InputError as error:
    found["old driver"] = str(error)
del os.environ["FAKE_CUDA_VERSION"]
driver = CoreDriver(0)
found["memory"] = driver.memory()
try:
    driver.allocate(1 << 30)
except MemoryError:
    found["out of memory"] = True
address, data = driver.allocate(1000), np.arange(256, dtype=np.uint8)
driver.pin(data)
first, second = driver.stream(), driver.stream()
driver.copy_in(data, address, first)
driver.wait(second, driver.record(first))
kernel = driver.load(".version 7.0", "sum_0")
driver.load(".version 7.0", "other_0")
driver.launch(kernel, (7, 2), 128, 32, [np.int64(2**40 + 1), np.int32(-5), np.int64(0), np.int64(0)], second)
back = np.zeros(256, np.uint8)
driver.clear(address, 16, second)
driver.copy_out(address, back, second)
driver.synchronize(driver.record(second))
found["copied"] = bool((back[16:] == data[16:]).all() and not back[:16].any())
driver.unpin(data)
driver.free(address)

lane = Lane(CoreDriver(0), None, None, Sizes(3, 2, 8192, 1, 4096))
source, target, stop = np.random.default_rng(0).bytes(50_001), bytearray(50_001), threading.Event()
with lane.arena.lease(len(source), stop) as place:
    def there():
        for start in range(0, len(source), 4096):
            def read(slot):
                part = source[start : start + 4096]
                slot[5 : 5 + len(part)] = np.frombuffer(part, np.uint8)
                half = len(part) // 2
                return [(place + start, slot[5 : 5 + half]), (place + start + half, slot[5 + half : 5 + len(part)])]
            event = lane.bring(read, stop)
        with lane.computing(event):
            pass
        lane.deliver(place, len(source), 777, lambda at, part: target.__setitem__(slice(at, at + part.size), part.tobytes()), stop)
    thread = threading.Thread(target=there)  # which has no device yet
    thread.start()
    thread.join()
found["through the rings"] = bytes(target) == source
lane.close()

ctypes.CDLL("libcuda.so.1").cuCtxSetCurrent(ctypes.c_void_p(0x99))  # as torch does after its work on another GPU
found["after a foreign context"] = driver.memory()

# What torch's driver asks of libcuda itself; torch is not needed for that.
by_torch = TorchDriver.__new__(TorchDriver)
by_torch._cuda, by_torch._device = ctypes.CDLL("libcuda.so.1"), None
by_torch._torch = SimpleNamespace(cuda=SimpleNamespace(device=lambda device: nullcontext()))
stream, address = SimpleNamespace(cuda_stream=0x40), driver.allocate(256)
by_torch.copy_in(data, address, stream)
by_torch.clear(address, 16, stream)
by_torch.copy_out(address, back, stream)
found["by torch"] = bool((back[16:] == data[16:]).all() and not back[:16].any())
parameters = [np.int64(2**41 + 3), np.int32(-7), np.int64(0), np.int64(0)]
by_torch.launch(SimpleNamespace(func=ctypes.c_void_p(5)), (9, 4), 64, 16, parameters, stream)

failures = found["failures"] = {}
buffer = np.zeros(16, np.uint8)
calls = {
    "cuMemGetInfo": driver.memory, "cuMemAlloc": lambda: driver.allocate(16), "cuMemHostRegister": lambda: driver.pin(buffer),
    "cuStreamCreateWithPriority": driver.stream, "cuMemcpyHtoDAsync": lambda: driver.copy_in(buffer, place, first),
    "cuMemcpyDtoHAsync": lambda: driver.copy_out(place, buffer, first), "cuMemsetD8Async": lambda: driver.clear(place, 1, first),
    "cuEventRecord": lambda: driver.record(first), "cuStreamWaitEvent": lambda: driver.wait(first, event),
    "cuEventSynchronize": lambda: driver.synchronize(event), "cuLibraryLoadData": lambda: driver.load("x", "y"),
    "cuLaunchKernel": lambda: driver.launch(kernel, (1, 1), 128, 0, [np.int64(1), np.int32(2), np.int64(0), np.int64(0)], first),
}
event, place = driver.record(first), driver.allocate(16)
for name, call in calls.items():
    os.environ["FAKE_CUDA_FAILS"] = name
    try:
        call()
    except DriverError as error:
        failures[name] = str(error)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], list[str]]:
    """Run the program over the library of C; return what it found, and the calls."""
    folder = tmp_path_factory.mktemp("cuda")
    command = ["gcc", "-w", "-O1", "-shared", "-fPIC", "-o", str(folder / "libcuda.so.1"), str(SOURCE)]
    subprocess.run(command, check=True, timeout=PATIENCE)
    log = folder / "log"
    environment = {
        **os.environ,
        "LD_LIBRARY_PATH": str(folder),
        "FAKE_CUDA_LOG": str(log),
        "FAKE_CUDA_TYPES": "8488",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=PATIENCE, env=environment
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), log.read_text().splitlines()


def test_bytes_go_there_and_back_through_cuda_core(ran: tuple[dict[str, Any], list[str]]) -> None:
    found, _ = ran
    assert found["gpus"] == 1
    assert found["loader"] == "cuda-core"
    assert found["memory"] == 1 << 24
    assert found["out of memory"]
    assert found["copied"]
    assert found["through the rings"]


def test_a_gpu_is_found_if_it_is_new_enough_for_the_kernels(ran: tuple[dict[str, Any], list[str]]) -> None:
    found, _ = ran
    assert (found["capability"], found["device"], found["none"]) == ([9, 0], "cuda:0", None)
    assert found["too old"] == (
        "the GPU cuda:0 (NVIDIA V100, bus ID 0000:3B:00.0) has compute capability 7.0, and the kernels need 7.5 (Turing) or "
        "newer: leave it out of CUDA_VISIBLE_DEVICES, or use --device cpu"
    )


def test_a_driver_that_does_not_start_says_why(ran: tuple[dict[str, Any], list[str]]) -> None:
    found, _ = ran
    assert found["start 100"] is None  # no GPU is here
    assert found["start 802"] == (
        "the GPU's driver does not start (CUDA_ERROR_SYSTEM_NOT_READY): start nvidia-fabricmanager, or use --device cpu"
    )
    assert (
        found["start 304"]
        == "the GPU's driver does not start (CUDA_ERROR_OPERATING_SYSTEM): use --device cpu"
    )


def test_bindings_that_are_newer_than_the_driver_are_refused(ran: tuple[dict[str, Any], list[str]]) -> None:
    found, _ = ran
    major = found["bindings"]
    assert found["old driver"] == (
        f"cuda-bindings is for CUDA {major}, and the GPU's driver for CUDA {major - 1}.4: "
        f"pip install 'cuda-bindings<{major}', or use --device cpu"
    )


def test_the_context_is_made_current_again_after_a_library_left_its_own(
    ran: tuple[dict[str, Any], list[str]],
) -> None:
    assert ran[0]["after a foreign context"] == ran[0]["memory"]


def test_events_order_two_streams_and_a_launch_has_its_parameters(
    ran: tuple[dict[str, Any], list[str]],
) -> None:
    lines = [line.split() for line in ran[1]]
    calls = [line[0] for line in lines]
    start = calls.index("cuMemcpyHtoDAsync")
    assert calls[start : start + 7] == [
        "cuMemcpyHtoDAsync", "cuEventCreate", "cuEventRecord", "cuStreamWaitEvent", "cuLibraryLoadData",
        "cuLibraryGetKernel", "cuLibraryGetKernel",
    ]  # fmt: skip
    copy, _, record, wait, load, one, other, launch = lines[start : start + 8]
    assert record[2] == copy[2]  # the stream of the copy
    assert wait[2] == record[1]  # the event
    assert wait[1] != copy[2]
    assert (load[1], one[1], other[1]) == (".version", "sum_0", "other_0")
    size, parameters = launch[1:8], launch[9:]
    assert launch[0] == "cuLaunchKernel"
    assert size == ["7", "2", "1", "128", "1", "1", "32"]
    assert launch[8] == f"{wait[1]}:"
    assert parameters == [str(2**40 + 1), "-5", "0", "0"]


def test_the_driver_by_torch_asks_libcuda_the_same(ran: tuple[dict[str, Any], list[str]]) -> None:
    found, lines = ran
    assert found["by torch"]
    launches = [line.split() for line in lines if line.startswith("cuLaunchKernel")]
    assert launches[1][1:] == ["9", "4", "1", "64", "1", "1", "16", "0x40:", str(2**41 + 3), "-7", "0", "0"]


def test_each_call_that_fails_is_told_in_one_line(ran: tuple[dict[str, Any], list[str]]) -> None:
    failures = ran[0]["failures"]
    assert len(failures) == 12
    for name, text in failures.items():
        assert text.startswith("the GPU's driver failed at "), name
        assert text.endswith("run the same command again, or with --device cpu")
        assert "\n" not in text
