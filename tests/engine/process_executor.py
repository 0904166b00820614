"""A second executor: processes of their own, each with a worker that opens its inputs and the output by itself.

It is here to prove by count: an executor is one file. A run specification goes in, chunks go over, receipts come back.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import ExitStack
from multiprocessing import get_context

from streammerge.engine.executors.base import executor
from streammerge.engine.in_flight import finished
from streammerge.engine.opening import open_worker
from streammerge.engine.task import run_chunk
from streammerge.engine.worker import Knowledge, RunSpec, Worker
from streammerge.output.journal import Receipt
from streammerge.planning.schedule import Chunk

_PROCESSES = 2
_held = ExitStack()
_worker: Worker | None = None
"""That of this process, once it is one of the pool's."""


def _begin(spec: RunSpec) -> None:
    global _worker
    _worker = _held.enter_context(open_worker(spec))


def _do(chunk: Chunk, answers: Knowledge) -> list[Receipt]:
    assert _worker is not None
    _worker.learn(answers)
    receipts = run_chunk(_worker, chunk)
    slots = _worker.plan.layout.slots
    _worker.writer.sync({slot.shard for receipt in receipts for slot in slots[receipt.job]})
    return receipts


@executor("processes")
class Processes:
    """Runs chunks in two processes."""

    durable = True

    def run(
        self, spec: RunSpec, chunks: Iterable[Chunk | None], driver: Worker
    ) -> Generator[list[Receipt], None, None]:
        """See `Executor`."""
        with ProcessPoolExecutor(_PROCESSES, get_context("spawn"), _begin, (spec,)) as pool:

            def submitted() -> Iterator[Future[list[Receipt]] | None]:
                for chunk in chunks:
                    if driver.stop.is_set():
                        return
                    yield None if chunk is None else pool.submit(_do, chunk, driver.known(chunk))

            for some in finished(submitted(), 2 * _PROCESSES):
                yield [receipt for future in some for receipt in future.result()]
