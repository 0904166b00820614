"""Compute statistics from a tensor in memory, and follow a method through its rounds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from streammerge.algebra.block import Block, BlockMath, Operand
from streammerge.algebra.extent import Extent
from streammerge.algebra.rules import Rule, WeightedSum
from streammerge.dtypes import itemsize
from streammerge.engine.peaks import without_peak
from streammerge.engine.worker import Answers, Worker, math_of
from streammerge.numerics.ordered_sum import BLOCK
from streammerge.planning.job import Job, measured
from streammerge.planning.needs import tensor_context_of
from streammerge.statistics.base import A, Measurement, Range, Reducer, Source, Statistic
from streammerge.statistics.passes import collect

_SAMPLE_ABOVE = 1 << 19
"""Number of elements; for smaller tensors a full pass costs no more than sampling."""
_SAMPLE_BLOCKS = 64
"""Most blocks in a sample; with many models it has fewer."""
_SAMPLE_BYTES = 1 << 22
"""Most bytes of a sample, over all models."""
_COUNTED_AT_ONCE = 1 << 30
"""Number of elements; a piece counts in 32 bits."""

Shared = dict[Statistic[Any], Any]
"""Values of statistics of the same elements, for all outputs that ask for them."""


def follow(worker: Worker, job: Job, known: Answers | None = None) -> Rule | list[Statistic[Any]]:
    """Return a job's rule, or the statistics it asks for after the values `known` (default: all so far).

    Statistics of Gram matrices are computed immediately and are not kept among the values.
    """
    if job.kind != "merge":
        return WeightedSum((1.0,))
    if known is None:
        known = without_peak(worker.answers.get(job.ordinal, []))
    start, tensor = worker.plan.method.start, tensor_context_of(job)
    if not job.grams:
        return start(tensor, job.parameters, known)
    answers: Answers = []
    waiting = list(known)
    while isinstance(wanted := start(tensor, job.parameters, answers), list):
        if all(statistic.source is Source.GRAMS for statistic in wanted):
            answers.append([worker.grams.get(job, one, worker.reader, worker.stages) for one in wanted])
        elif waiting:
            answers.append(waiting.pop(0))
        else:
            return wanted
    return wanted


def reducer_of(
    worker: Worker,
    statistic: Statistic[A],
    jobs: Sequence[Job],
    versions: Mapping[int, Statistic[Any]],
    bins: int | None = None,
) -> Reducer[A]:
    """Return the reducer of a statistic over the tensors of some jobs.

    Parameters
    ----------
    versions
        Each job's own form of the statistic, by ordinal.
    bins
        The most bins in a window; default: as many as the plan has room for.
    """
    bins = worker.plan.statistics_memory.bins if bins is None else bins
    tensors = [measured(job) for job in jobs]
    return statistic.reducer(Measurement(tensors, worker.keys, versions, worker.tolerant, bins))


def resolve_in_memory(
    worker: Worker, job: Job, loaded: Block, math: BlockMath, shared: Shared, *, until_model: bool
) -> Rule | list[Statistic[Any]]:
    """Compute a job's per-tensor statistics from the tensor in memory.

    `shared` has the values that other outputs have asked of these elements, and receives new ones.

    Returns its rule or, with `until_model`, the whole-model statistics that come next.
    """

    # One after the other: the tensor is in memory, and with many models each needs its own counts.
    def answer(wanted: Sequence[Statistic[Any]]) -> list[Any]:
        return [_answer_in_memory(worker, job, loaded, math, statistic) for statistic in wanted]

    return resolve(worker, job, answer, shared, until_model=until_model)


def resolve(
    worker: Worker,
    job: Job,
    answer: Callable[[Sequence[Statistic[Any]]], Sequence[Any]],
    shared: Shared,
    *,
    until_model: bool,
) -> Rule | list[Statistic[Any]]:
    """Follow a job to its rule or, with `until_model`, to the whole-model statistics that come next.

    `answer` returns the values of statistics of the tensor, each asked once for all outputs that share `shared`.
    """
    while isinstance(wanted := follow(worker, job), list):
        if wanted[0].extent == Extent.MODEL:
            assert until_model, "whole-model statistics come before the merge"
            return wanted
        missing = [statistic for statistic in dict.fromkeys(wanted) if statistic not in shared]
        shared.update(zip(missing, answer(missing), strict=True))
        worker.answers.setdefault(job.ordinal, []).append([shared[statistic] for statistic in wanted])
    return wanted


def _answer_in_memory(
    worker: Worker, job: Job, loaded: Block, math: BlockMath, statistic: Statistic[Any]
) -> Any:
    """Compute one statistic from the tensor in memory."""
    room, row = worker.plan.statistics_memory, worker.plan.work[job.ordinal].row
    most = room.elements if statistic.cost.partials else _COUNTED_AT_ONCE
    step = max(row, most // row * row)

    def run_pass(some: Sequence[Reducer[Any]], only: Range | None) -> None:
        first, last = (0, loaded.n) if only is None else (only[1], min(only[2], loaded.n))
        for start in range(first, last, step):
            stop = min(last, start + step)
            whole = stop - start == loaded.n
            part = loaded if whole else slice_of(loaded, start, stop)
            its_math = math if whole else math_of(worker, job, part)
            for reducer in some:
                reducer.add(job.ordinal, part.start, part.n, its_math)

    def run_sample(some: Sequence[Reducer[Any]]) -> None:
        for reducer in some:
            part = sample_of(loaded, reducer.sampled_model)
            reducer.add(job.ordinal, 0, part.n, math_of(worker, job, part))

    reducer = reducer_of(worker, statistic, [job], {job.ordinal: statistic})
    return collect([reducer], run_pass, run_sample if loaded.n > _SAMPLE_ABOVE else None)[0]


def slice_of(loaded: Block, start: int, stop: int) -> Block:
    """Return elements `start` to `stop` of a loaded block as a block, without copying."""

    def moved(operand: Operand) -> Operand:
        return replace(operand, offset=operand.offset + start * itemsize(operand.dtype))

    line = loaded.row_length if len(loaded.shape) == 2 else 0
    shape = ((stop - start) // line, line) if line else (stop - start,)
    return replace(
        loaded,
        start=loaded.start + start,
        n=stop - start,
        shape=shape,
        models=tuple(moved(operand) for operand in loaded.models),
        base=None if loaded.base is None else moved(loaded.base),
        fishers=tuple(moved(operand) for operand in loaded.fishers),
    )


def sample_of(loaded: Block, model: int | None) -> Block:
    """Return a copy of runs of 4096 elements spread over a block, one after the other.

    Random masks are drawn as if the sample were the start of the tensor, which does not matter for a sample. If only one
    `model` is needed, the others are not copied; their operands alias the first.
    """
    operands = (*(() if loaded.base is None else (loaded.base,)), *loaded.models)
    first = len(operands) - len(loaded.models)
    copied = [i for i in range(len(operands)) if i < first or model is None or i - first == model]
    fitting = _SAMPLE_BYTES // (BLOCK * sum(itemsize(operands[i].dtype) for i in copied))
    blocks = max(1, min(_SAMPLE_BLOCKS, max(16, loaded.n >> 16), fitting))
    stride = loaded.n // blocks // BLOCK * BLOCK
    parts = []
    copies = []
    position = 0
    for i, operand in enumerate(operands):
        if i not in copied:
            copies.append(Operand(0, operands[copied[0]].dtype))
            continue
        width = itemsize(operand.dtype)
        spread = loaded.buffer[operand.offset : operand.offset + blocks * stride * width]
        parts.append(spread.reshape(blocks, stride * width)[:, : BLOCK * width].ravel())
        copies.append(Operand(position, operand.dtype))
        position += parts[-1].size
    n = blocks * BLOCK
    return replace(
        loaded,
        buffer=np.concatenate(parts),
        base=copies[0] if first else None,
        models=tuple(copies[first:]),
        start=0,
        n=n,
        shape=(n,),
        fishers=(),
    )


def sample_starts(n: int, blocks: int) -> list[int]:
    """Return the starts of `blocks` runs spread over `n` elements, each a multiple of 4096."""
    return sorted({int(i * n / blocks) // BLOCK * BLOCK for i in range(blocks)})


# --- values in the journal


def plain(worker: Worker, job: Job) -> list[list[object]]:
    """Return the values of a job's statistics for JSON, up to the first round with a value that is too large."""
    known = worker.answers[job.ordinal]
    rounds: list[list[object]] = []
    for i, values in enumerate(known):
        wanted = follow(worker, job, known[:i])
        assert isinstance(wanted, list)
        one = [statistic.to_json(value) for statistic, value in zip(wanted, values, strict=True)]
        if any(value is None for value in one):
            break
        rounds.append(one)
    return rounds


def restored(worker: Worker, job: Job, rounds: Sequence[Sequence[object]]) -> Answers:
    """Return the values that `plain` converted; empty if they are invalid, so that they are computed again."""
    known: Answers = []
    for one in rounds:
        wanted = follow(worker, job, known)
        if not isinstance(wanted, list):
            return []
        try:
            known.append([statistic.from_json(value) for statistic, value in zip(wanted, one, strict=True)])
        except ValueError:
            return []
    return known
