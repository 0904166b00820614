"""The matrices by which RegMean mixes the rows of one tensor: from the Gram matrices of its models, one tensor at a time."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

from streammerge.algebra.rules import Mixers
from streammerge.checkpoint.companions import CompanionRef
from streammerge.io.reader import Reader
from streammerge.io.scratch import Scratch
from streammerge.planning.job import Job
from streammerge.planning.plan import MergePlan
from streammerge.statistics.kinds import Mixing
from streammerge.timing import Stages

_SINGLE = float(np.finfo(np.float32).eps)


@contextmanager
def torch_in_one_thread(plan: MergePlan) -> Iterator[None]:
    """Have torch add up in one thread meanwhile, where a merge lets it: how sums are cut changes their last bits.

    That is where matrices are multiplied, and in formulas, whose sums are their own affair. Workers run beside each
    other, so little is lost.
    """
    if not plan.grams and not plan.method.is_formula:
        yield
        return
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class MixerCache:
    """Computes mixers, and keeps those of the last tensor: its pieces come one after the other."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last: tuple[int, Mixers] | None = None

    def get(self, job: Job, statistic: Mixing, reader: Reader, stages: Stages) -> Mixers:
        """Return the mixers of a job's tensor.

        Raises
        ------
        ModelError
            If a chunk of a store is damaged.
        """
        with self._lock:
            if self._last is None or self._last[0] != job.ordinal:
                self._last = None  # given up before as much is taken again
                grams = (_read(ref, reader, stages) for ref in job.grams)
                with stages.time("statistics"):
                    self._last = job.ordinal, mixers_of(list(grams), statistic)
            return self._last[1]


def mixers_of(grams: list[NDArray[np.float32]], statistic: Mixing) -> Mixers:
    """Return P_i = G_i (sum G)^+ of each model: by Cholesky, or by eigenvalues where directions have no data.

    A direction has data if its share of the largest is above what fp32 matrices of this size can tell from 0.
    """
    import torch

    n = len(grams[0])
    scaled: list[torch.Tensor] = []
    while grams:
        gram = torch.from_numpy(grams.pop(0)).double()
        diagonal = gram.diagonal().clone()
        gram.mul_(statistic.alpha * statistic.weights[len(scaled)])
        gram.diagonal().copy_(diagonal * statistic.weights[len(scaled)])
        scaled.append(gram)
    total = torch.zeros(n, n, dtype=torch.float64)
    for gram in scaled:
        total += gram
    root, info = torch.linalg.cholesky_ex(total)
    pivots = root.diagonal()
    if int(info) == 0 and float((pivots.min() / pivots.max()) ** 2) > n * _SINGLE:
        for i, gram in enumerate(scaled):
            scaled[i] = torch.cholesky_solve(gram, root).T.contiguous()
        return Mixers(tuple(scaled))
    values, vectors = torch.linalg.eigh(total)
    kept = values > n * _SINGLE * values[-1].clamp(min=0.0)
    inverse = vectors[:, kept] / values[kept] @ vectors[:, kept].T
    for i, gram in enumerate(scaled):
        scaled[i] = gram @ inverse
    return Mixers(tuple(scaled))


def _read(ref: CompanionRef, reader: Reader, stages: Stages) -> NDArray[np.float32]:
    target = np.empty(ref.nbytes, np.uint8)
    ref.read_slot(reader, 0, ref.n_elements, target, Scratch(np.empty(ref.scratch_bytes, np.uint8)), stages)
    return target.view(np.float32).reshape(ref.shape)
