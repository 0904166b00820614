"""Which processor a run takes, and what sizes a user may write."""

from __future__ import annotations

import os

from streammerge.errors import InputError, printable
from streammerge.planning.memory import budget as budgets
from streammerge.units import parse_size

GPU_DRIVER = "/dev/nvidiactl"
WORTH_A_GPU = 8_000_000_000
"""Bytes of inputs; starting a GPU takes as long as merging these without it."""


def choose_device(device: str, memory: int | None, nbytes: int) -> str:
    """Return ``cpu`` or ``cuda:N`` for what a user asked for.

    ``auto`` is the GPU where there is one, `memory` has room for its libraries, and `nbytes` of inputs are worth
    the seconds that it takes to start. Torch is imported only then.
    """
    if device == "cpu":
        return "cpu"
    small = nbytes < WORTH_A_GPU or (memory is not None and memory < budgets.CUDA_LEAST)
    if device == "auto" and (small or not os.path.exists(GPU_DRIVER)):
        return "cpu"
    kind, _, number = device.partition(":")
    if kind not in ("auto", "cuda") or (number and not number.isdecimal()):
        raise InputError(f"device {printable(device)!r} is none of auto, cpu, cuda, cuda:N")
    import torch

    if not torch.cuda.is_available() or int(number or 0) >= torch.cuda.device_count():
        if device == "auto":
            return "cpu"
        raise InputError(f"device {printable(device)!r}: torch finds no such GPU here; use --device cpu")
    return f"cuda:{int(number or 0)}"


def nbytes_of(size: str | int | None) -> int | None:
    """Return a size that a user gave as text or a number in bytes; None where none was given."""
    return parse_size(size) if isinstance(size, str) else size
