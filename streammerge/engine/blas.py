"""Limits BLAS to one thread, since the division of sums among threads changes their last bits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from streammerge.planning.job import Job


@contextmanager
def blas_in_one_thread(jobs: Sequence[Job]) -> Iterator[None]:
    """Limit BLAS to one thread if some of the jobs compute factors; workers run in parallel, so little speed is lost."""
    if not any(job.kind == "factor" for job in jobs):
        yield
        return
    import scipy.linalg  # noqa: F401  (its BLAS must be loaded to be limited)
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1, "blas"):
        yield
