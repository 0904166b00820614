"""The backend of fused kernels on a GPU: whole tensors there, everything small by compiled kernels on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache

from streammerge.algebra.block import Block, BlockMath, Call
from streammerge.algebra.rules import Rule
from streammerge.backends.cpu.backend import CPU
from streammerge.backends.cpu.math import KernelMath
from streammerge.backends.fused.launcher import Launcher, Residence
from streammerge.backends.fused.math import FusedMath, fused_call, fused_rule
from streammerge.backends.fused.specs import ptx
from streammerge.backends.fused.triton_launcher import why_not_amd
from streammerge.backends.gpu import core_driver, torch_driver
from streammerge.backends.gpu.driver import Driver
from streammerge.backends.gpu.lane import Lane, Sizes
from streammerge.backends.torch.backend import CUDA
from streammerge.errors import InputError

EAGER = (
    "no library here loads kernels on a GPU, so torch merges there in many small steps, with the same bits but slower: "
    "pip install 'streammerge[gpu]'"
)
FOR_AMD = "Triton compiles the kernels for this GPU when they are first used, which takes some seconds each"
OLDEST = (7, 5)
"""The compute capability that the shipped PTX is for; drivers refuse to compile it for older GPUs."""
_CONTEXT = 512 << 20
"""Resident bytes of a CUDA context."""


@cache
def loader() -> str | None:
    """Return the name of what can load the shipped kernels here, ``cuda-core`` or ``torch``; None if nothing can."""
    if core_driver.is_installed():
        return "cuda-core"
    return "torch" if torch_driver.is_usable() else None


def find_gpu(number: int) -> str | None:
    """Return the device of a GPU; None if there is none of this number. Torch is imported only without cuda-core.

    Raises
    ------
    InputError
        If the GPU is too old for the shipped kernels, or its driver does not start.
    """
    if core_driver.is_installed():
        found = f"cuda:{number}" if number < core_driver.count_gpus() else None
        capability, title = core_driver.capability, core_driver.title
    else:
        assert CUDA.find is not None
        found, capability, title = CUDA.find(number), torch_driver.capability, torch_driver.title
    if found is not None and loader() is not None and (has := capability(number)) < OLDEST:
        old, least = (".".join(map(str, one)) for one in (has, OLDEST))
        raise InputError(
            f"the GPU {found} ({title(number)}) has compute capability {old}, and the kernels need {least} (Turing) or newer: "
            "leave it out of CUDA_VISIBLE_DEVICES, or use --device cpu"
        )
    return found


def open_driver(device: str) -> Driver:
    """Open a GPU by what can load kernels."""
    number = int(device.partition(":")[2] or 0)
    if loader() == "cuda-core":
        return core_driver.CoreDriver(number)
    return torch_driver.TorchDriver(number)


def fused_math(block: Block, launcher: Launcher, residence: Residence) -> BlockMath:
    """Return the arithmetic of a block on the device."""
    return FusedMath(block, launcher, residence, KernelMath)


def open_lane(device: str) -> Lane:
    """Open a GPU for the threads of this process."""
    return Lane(open_driver(device), fused_math, ptx)


def fuses(rule: Rule, calls: Sequence[Call]) -> bool:
    """Return whether fused kernels compute a rule and all calls of the statistics before it."""
    return fused_rule(rule) and all(map(fused_call, calls))


def lacks() -> str | None:
    """Return what the user is told if nothing here can load the kernels."""
    if loader():
        return None
    return FOR_AMD if why_not_amd() is None else EAGER


FUSED = replace(
    CPU,
    name="fused",
    reserve=CPU.reserve + _CONTEXT + Sizes().nbytes,
    device="cuda",
    find=find_gpu,
    open_lane=open_lane,
    fuses=fuses,
    rest=CUDA,
    lacks=lacks,
    rate=20.0,
)
"""The reserve: that of `cpu`, a CUDA context, and the pinned rings. The rate: PCIe 4; it has not been measured."""
