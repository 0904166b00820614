"""One merge that the laws repeat: in other memory, other threads, interrupted, through torch."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from streammerge.api.deciding import plan
from streammerge.api.merging import merge
from streammerge.errors import BudgetError, Stopped
from streammerge.methods.registry import Method
from streammerge.planning.memory import budget as budgets
from streammerge.planning.memory import enough
from streammerge.planning.plan import MergePlan
from streammerge.records import dataclass
from streammerge.testing.models import output_bytes, read_tensors

PLENTY = 1 << 30
"""Bytes of buffers in which every tensor of the trial's models is held whole."""


class Fixed(budgets.Budget):
    """A budget whose buffers have a fixed size, whatever else takes memory: small tensors are handled as large ones."""

    def less(self, nbytes: int) -> budgets.Budget:
        """Return the same budget."""
        return self


@contextmanager
def capacity(nbytes: int, threads: int) -> Iterator[None]:
    """Give all merges in this context buffers of `nbytes` and a number of threads, whatever their --memory."""

    def make_budget(memory: int | None, n: int | None, reserve: int) -> budgets.Budget:
        return Fixed(reserve + nbytes, reserve, threads)

    # These budgets know no --memory, so no number would suffice for what they refuse.
    with (
        patch.object(budgets, "make_budget", make_budget),
        patch.object(enough, "asking_enough", lambda error, decide: error),
    ):
        yield


class StopsAfter(threading.Event):
    """An event that becomes set after a number of queries, so that it stops a merge at the same place each time."""

    def __init__(self, questions: int) -> None:
        super().__init__()
        self._left = questions

    def is_set(self) -> bool:
        """Return whether it has been queried often enough."""
        self._left -= 1
        return self._left < 0 or super().is_set()


@dataclass
class Trial:
    """A config and the folder in which its merges are written."""

    method: Method
    config: Mapping[str, Any]
    directory: Path
    """An empty folder, in which each merge makes a separate one."""
    methods: Path | None = None
    """The file that defines the method, if neither this program nor an installed package provides it."""
    _outputs: dict[str, dict[str, bytes]] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """Its name in messages: the method and its parameters."""
        parameters = ", ".join(
            f"{name}: {value}" for name, value in self.config.get("parameters", {}).items()
        )
        return f"method {self.method.name!r}" + (f" ({parameters})" if parameters else "")

    def plan(self, nbytes: int = PLENTY, threads: int = 1, **options: Any) -> MergePlan:
        """Return the plan with buffers of `nbytes` bytes."""
        with capacity(nbytes, threads):
            return plan(self.config, methods=self.methods, device="cpu", **options)

    def merge(self, name: str, nbytes: int = PLENTY, threads: int = 1, **options: Any) -> dict[str, bytes]:
        """Merge with buffers of `nbytes` bytes, and return the bytes of every file of the output by name."""
        out = self.directory / name
        with capacity(nbytes, threads):
            options = {"device": "cpu", "progress": False, **options}
            merge(self.config, out, methods=self.methods, on_event=lambda event: None, **options)
        return output_bytes(out)

    def expected(self) -> dict[str, bytes]:
        """Return the output with plenty of memory and one thread; it is merged once."""
        if "expected" not in self._outputs:
            self._outputs["expected"] = self.merge("expected")
        return self._outputs["expected"]

    def interrupted(self, name: str, questions: int, **options: Any) -> dict[str, bytes] | None:
        """Merge, stop midway, merge again; return the output, or None if the merge ended before the stop."""
        try:
            self.merge(name, stop=StopsAfter(questions), **options)
        except Stopped:
            return self.merge(name, **options)
        return None

    def least(self) -> int:
        """Return the least power of two, in bytes of buffers, that the planner accepts; it streams whatever it can."""
        for bits in range(12, 31):
            try:
                self.plan(1 << bits, 3)
            except BudgetError:
                continue
            return 1 << bits
        raise AssertionError(f"{self.title}: no plan fits 1 GiB of buffers, for tensors of less than 200 KiB")

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """Return the tensors of a finished merge."""
        return read_tensors(self.directory / name)


def difference(first: Mapping[str, torch.Tensor], second: Mapping[str, torch.Tensor]) -> str:
    """Return the first difference between two outputs as text; empty if no tensor differs."""
    for name, one in first.items():
        other = second.get(name)
        if other is None or one.shape != other.shape or one.dtype != other.dtype:
            found = "missing" if other is None else f"{tuple(other.shape)} {other.dtype}"
            return f"tensor {name!r}: {tuple(one.shape)} {one.dtype} in one, {found} in the other"
        bits, other_bits = (t.contiguous().view(-1).view(torch.uint8) for t in (one, other))
        if not torch.equal(bits, other_bits):
            place = int((bits != other_bits).nonzero()[0]) // one.element_size()
            values = (float(t.reshape(-1)[place]) for t in (one, other))
            return f"tensor {name!r}, element {place}: " + " is not ".join(f"{value!r}" for value in values)
    return ""
