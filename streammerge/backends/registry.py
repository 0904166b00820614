"""The registry of backends: each is one value, under its name."""

from __future__ import annotations

from streammerge.backends.base import Backend
from streammerge.backends.cpu.backend import CPU
from streammerge.backends.torch.backend import CUDA, TORCH

BACKENDS: dict[str, Backend] = {backend.name: backend for backend in (CPU, TORCH, CUDA)}


def register_backend(backend: Backend) -> None:
    """Add a backend, which ``device=NAME`` then chooses.

    Raises
    ------
    ValueError
        If its name is taken.
    """
    if backend.name in BACKENDS:
        raise ValueError(f"backend {backend.name!r} exists already: choose a different name")
    BACKENDS[backend.name] = backend
