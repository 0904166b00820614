"""A few futures in flight at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import TypeVar

T = TypeVar("T")
_SECONDS = 0.25


def finished(
    futures: Iterable[Future[T] | None], limit: int, *, in_order: bool = False
) -> Iterator[list[Future[T]]]:
    """Yield futures that have finished, at least four times a second; others wait to be taken from `futures`.

    Parameters
    ----------
    futures
        Taken one by one, which submits the work; None where there is nothing to submit for the moment.
    limit
        How many are in flight before a further one is taken.
    in_order
        One that has finished counts as in flight until all before it have.
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
