"""Statistics of Gram matrices, read from their stores one tensor at a time."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streammerge.backends.torch.returned import return_freed_matrices
from streammerge.checkpoint.companions import CompanionRef
from streammerge.io.reader import Reader
from streammerge.io.scratch import Scratch
from streammerge.planning.job import Job
from streammerge.planning.plan import MergePlan
from streammerge.statistics.base import A, Statistic
from streammerge.timing import Stages


@contextmanager
def torch_in_one_thread(plan: MergePlan) -> Iterator[None]:
    """Limit torch to one thread if the merge uses torch, since the division of sums among threads changes their last bits.

    This concerns matrix products, and users' formulas. The workers run in parallel, so little speed is lost.
    """
    if not any(map(_uses_products, (plan, *plan.stages))):
        yield
        return
    import torch

    if any(one.method.matrices for one in (plan, *plan.stages)):
        return_freed_matrices()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _uses_products(plan: MergePlan) -> bool:
    return bool(plan.grams) or plan.method.is_formula or plan.method.matrices


class GramCache:
    """Computes statistics of Gram matrices, and keeps those of the last tensor for its next pieces."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._of: int | None = None
        self._known: dict[Statistic[Any], Any] = {}

    def get(self, job: Job, statistic: Statistic[A], reader: Reader, stages: Stages) -> A:
        """Return the value of a statistic of the Gram matrices of a job's tensor.

        Raises
        ------
        ModelError
            If a chunk of a store is damaged.
        """
        with self._lock:
            if self._of != job.ordinal:
                self._of, self._known = job.ordinal, {}  # freed before the next matrices are allocated
            if statistic not in self._known:
                grams = [_read(ref, reader, stages) for ref in job.grams]
                with stages.time("statistics"):
                    self._known[statistic] = statistic.of_grams(grams)
            value: A = self._known[statistic]
            return value


def _read(ref: CompanionRef, reader: Reader, stages: Stages) -> NDArray[np.float32]:
    target = np.empty(ref.nbytes, np.uint8)
    ref.read_slot(reader, 0, ref.n_elements, target, Scratch(np.empty(ref.scratch_bytes, np.uint8)), stages)
    return target.view(np.float32).reshape(ref.shape)
