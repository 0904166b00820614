"""Run as many passes over the data as the reducers need."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from streammerge.statistics.base import Range, Reducer


def collect(
    reducers: Sequence[Reducer[Any]],
    run_pass: Callable[[Sequence[Reducer[Any]], Range | None], None],
    run_sample: Callable[[Sequence[Reducer[Any]]], None] | None,
) -> list[Any]:
    """Run as many passes as the reducers need and return their values.

    Parameters
    ----------
    run_pass
        Function that feeds every block of the tensors (or of the range) to the given reducers.
    run_sample
        Function that feeds some blocks spread over the tensors; None if the tensors are too small to sample.
    """
    pending = [reducer for reducer in reducers if not reducer.known]
    sampled = [reducer for reducer in pending if reducer.samples]
    if run_sample is not None and sampled:
        run_sample(sampled)
        for reducer in sampled:
            reducer.narrow_by_sample()
    while pending:
        everything = [reducer for reducer in pending if reducer.wants is None]
        if everything:
            run_pass(everything, None)
        for reducer in pending:
            if reducer.wants is not None:
                run_pass([reducer], reducer.wants)
        pending = [reducer for reducer in pending if not reducer.end()]
    return [reducer.value for reducer in reducers]
