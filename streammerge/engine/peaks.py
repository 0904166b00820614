"""The largest magnitude of a merged tensor, for formats whose scale depends on the whole tensor.

The scale must be known before the first code is written. A tensor in memory is scanned in place. A streamed tensor is
merged twice: once for the maximum, piece by piece, and once to be written. A maximum does not depend on the order of
the elements or on the pieces.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from streammerge.engine.worker import Answers, Worker
from streammerge.numerics.encoding import block_peaks
from streammerge.planning.job import Job
from streammerge.records import dataclass


@dataclass(frozen=True)
class Peak:
    """The last answer of a streamed tensor, behind those of its method's statistics; alone in its round."""

    value: float


def without_peak(known: Answers) -> Answers:
    """Return the answers of statistics."""
    return [values for values in known if not (values and isinstance(values[0], Peak))]


def known_peak(worker: Worker, job: Job) -> float | None:
    """Return the largest magnitude that a pass has found; None if there was none."""
    found = [values[0] for values in worker.answers.get(job.ordinal, []) if values]
    return next((value.value for value in found if isinstance(value, Peak)), None)


def largest(values: NDArray[np.float32]) -> float:
    """Return the largest magnitude of finite values, (n,)."""
    if not values.size:
        return 0.0
    return float(block_peaks(values.reshape(1, -1), (1, values.size))[0, 0])
