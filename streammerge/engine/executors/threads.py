"""Run chunks on the threads of this process.

There are more threads than CPUs, so that reading and writing overlap with arithmetic. A thread holds a buffer only while
it runs a chunk; the pool grants buffers in order, and never more than the budget.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, wait
from queue import Empty, SimpleQueue

from streammerge.engine.executors.base import executor
from streammerge.engine.first_use import load_ahead
from streammerge.engine.in_flight import finished
from streammerge.engine.loading import prefetch
from streammerge.engine.task import run_chunk
from streammerge.engine.turns import Turns
from streammerge.engine.worker import RunSpec, Worker
from streammerge.output.journal import Receipt
from streammerge.planning.schedule import Chunk


@executor("threads")
class Threads:
    """Runs chunks on the driver's threads, while two more threads prefetch the bytes of later chunks."""

    durable = False

    def run(
        self, spec: RunSpec, chunks: Iterable[Chunk | None], driver: Worker
    ) -> Generator[list[Receipt], None, None]:
        """See `Executor`."""
        driver.prefetchers.submit(load_ahead, driver.plan)  # what fails there fails again where it is used
        written: SimpleQueue[list[Receipt]] = SimpleQueue()
        pending: set[Future[None]] = set()

        turns = Turns(driver.stop)

        def do(number: int, chunk: Chunk) -> None:
            if chunk.rehearsal:
                run_chunk(driver.rehearsing(), chunk, turns.of(number))
            else:
                written.put(run_chunk(driver, chunk, turns.of(number)))

        def submitted() -> Iterator[Future[None] | None]:
            number = 0
            for chunk in chunks:
                if chunk is None:
                    yield None
                    continue
                driver.prefetchers.submit(prefetch, driver, chunk)
                future = driver.threads.submit(do, number, chunk)
                number += 1
                pending.add(future)
                yield future

        try:
            for some in finished(submitted(), 2 * driver.plan.budget.workers):
                pending.difference_update(some)
                for future in some:
                    future.result()
                yield _all_of(written)
        except GeneratorExit:
            raise
        except BaseException:
            driver.stop.set()
            wait(pending)
            yield _all_of(written)  # written elements need not be computed again
            raise


def _all_of(written: SimpleQueue[list[Receipt]]) -> list[Receipt]:
    receipts: list[Receipt] = []
    while True:
        try:
            receipts += written.get_nowait()
        except Empty:
            return receipts
