"""The storage of an output's tensors, and the registry of functions that choose it, one per value of `quantize`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from streammerge.checkpoint.index import TensorIndex
from streammerge.config.schema import MergeConfig
from streammerge.methods.registry import Method
from streammerge.planning.job import Job
from streammerge.planning.low_rank.adapter import AdapterPlan
from streammerge.planning.resolve.assemble import Indexes
from streammerge.planning.resolve.jobs import Lender, Resolved
from streammerge.records import dataclass


@dataclass(frozen=True)
class Material:
    """The facts that decide how tensors are stored."""

    config: MergeConfig
    method: Method
    template: TensorIndex
    indexes: Indexes
    resolved: Resolved
    merged: TensorIndex | None = None
    """The merge itself as a model, in fp64, if an adapter is made of it."""

    @property
    def jobs(self) -> tuple[Job, ...]:
        """One for each tensor of the output."""
        return self.resolved.jobs

    @property
    def lenders(self) -> tuple[Lender, ...]:
        """For each job, the tensor whose dtype and shape its own tensor has."""
        return self.resolved.lenders


@dataclass(frozen=True)
class Storage:
    """The jobs of a merge, each with an encoder if its tensor needs one, and the declaration for config.json."""

    jobs: tuple[Job, ...]
    declared: Mapping[str, Any] | None = None
    """The output's own `quantization_config`; None: the output has only what it keeps of the template model's."""
    keeps: bool = False
    """Whether the output is quantised as the template model declares."""
    notes: tuple[str, ...] = ()
    adapter: AdapterPlan | None = None
    """The adapter that the jobs compute; None: they write a model."""


Choose = Callable[[Material], Storage]
_CHOICES: dict[str, Choose] = {}


def stores(quantize: str) -> Callable[[Choose], Choose]:
    """Register the function that decides how tensors are stored for a value of the key `quantize`."""

    def register(choose: Choose) -> Choose:
        _CHOICES[quantize] = choose
        return choose

    return register


def choice_of(quantize: str) -> Choose:
    """Return the function that is registered for a value of the key."""
    return _CHOICES[quantize]
