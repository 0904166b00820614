"""Keep a limited number of futures in flight."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import TypeVar

T = TypeVar("T")
_SECONDS = 0.25


def finished(
    futures: Iterable[Future[T] | None], limit: int, *, in_order: bool = False
) -> Iterator[list[Future[T]]]:
    """Yield finished futures at least four times a second; take new ones from `futures` as others finish.

    Parameters
    ----------
    futures
        Iterating submits the work; None means that there is nothing to submit at the moment.
    limit
        Most futures in flight.
    in_order
        Whether a finished future counts as in flight until all earlier ones have finished.
    """
    in_flight: list[Future[T]] = []

    def take(seconds: float) -> list[Future[T]]:
        done, _ = wait(in_flight[:1] if in_order else in_flight, timeout=seconds, return_when=FIRST_COMPLETED)
        in_flight[:] = [future for future in in_flight if future not in done]
        return list(done)

    for future in futures:
        if future is None:
            yield take(0) if in_flight else []
            continue
        in_flight.append(future)
        while len(in_flight) >= limit:
            yield take(_SECONDS)
    while in_flight:
        yield take(_SECONDS)
