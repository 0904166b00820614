"""How tensors of an output are stored, and the registry of what decides it: one function for each value of `quantize`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from streammerge.checkpoint.index import TensorIndex
from streammerge.config.schema import MergeConfig
from streammerge.planning.job import Job


@dataclass(frozen=True)
class Storage:
    """The jobs of a merge, each with what stores its tensor, and what config.json says of that."""

    jobs: tuple[Job, ...]
    declared: Mapping[str, Any] | None = None
    """The output's own `quantization_config`; None: it has none but what it keeps of the template model's."""
    notes: tuple[str, ...] = ()


Choose = Callable[[MergeConfig, Sequence[Job], TensorIndex], Storage]
_CHOICES: dict[str, Choose] = {}


def stores(quantize: str) -> Callable[[Choose], Choose]:
    """Register what decides how tensors are stored for a value of the key `quantize`."""

    def register(choose: Choose) -> Choose:
        _CHOICES[quantize] = choose
        return choose

    return register


def choice_of(quantize: str) -> Choose:
    """Return what is registered for a value of the key."""
    return _CHOICES[quantize]
