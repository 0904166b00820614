"""The values of statistics that are taken from a tensor in memory, and what a method wants next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from streammerge.algebra.block import Block, BlockMath, Operand
from streammerge.algebra.extent import Extent
from streammerge.algebra.rules import Rule, WeightedSum
from streammerge.dtypes import itemsize
from streammerge.engine.worker import Worker, math_of
from streammerge.planning.job import Job
from streammerge.planning.needs import tensor_context_of
from streammerge.statistics.kinds import (
    Answer,
    ColumnDots,
    Dots,
    Mixing,
    SquareSums,
    SquareTotal,
    Statistic,
    Threshold,
    Touched,
    partials_of,
)
from streammerge.statistics.reducers import (
    Range,
    Reducer,
    TopKReducer,
    collect,
    make_reducer,
)

_SAMPLE_ABOVE = 1 << 19
"""Elements; below, one full pass costs no more than sampling."""
_SAMPLE_BLOCKS = 64
_SAMPLE_BYTES = 1 << 22
"""Upper bound of a sample: with many models it has fewer blocks."""
_COUNTED_AT_ONCE = 1 << 30
"""Elements; a piece counts in 32 bits."""


def follow(worker: Worker, job: Job) -> Rule | list[Statistic]:
    """Return a job's rule, or the statistics it has after the answers known so far."""
    if job.kind != "merge":
        return WeightedSum((1.0,))
    answers = worker.answers.get(job.ordinal, [])
    wanted = worker.plan.method.start(tensor_context_of(job), job.parameters, answers)
    if isinstance(wanted, list) and isinstance(wanted[0], Mixing):
        mixers = worker.mixers.get(job, wanted[0], worker.reader, worker.stages)
        return worker.plan.method.start(tensor_context_of(job), job.parameters, [*answers, [mixers]])
    return wanted


def resolve_in_memory(
    worker: Worker, job: Job, loaded: Block, math: BlockMath, *, until_model: bool
) -> Rule | list[Statistic]:
    """Answer a job's tensor-scope statistics from the tensor in memory.

    Returns its rule or, with `until_model`, the whole-model statistics it stops at.
    """
    while isinstance(wanted := follow(worker, job), list):
        if wanted[0].extent == Extent.MODEL:
            assert until_model, "whole-model statistics come before the merge"
            return wanted
        # One after the other: the tensor lies in memory, and of many models each has counts of its own.
        known = [_answer_in_memory(worker, job, loaded, math, statistic) for statistic in wanted]
        worker.answers.setdefault(job.ordinal, []).append(known)
    return wanted


def _answer_in_memory(
    worker: Worker, job: Job, loaded: Block, math: BlockMath, statistic: Statistic
) -> Answer:
    """Answer one statistic from the tensor in memory."""
    room, row = worker.plan.statistics_memory, worker.plan.work[job.ordinal].row
    most = room.elements if partials_of(statistic) else _COUNTED_AT_ONCE
    step = max(row, most // row * row)

    def run_pass(some: Sequence[Reducer], only: Range | None) -> None:
        first, last = (0, loaded.n) if only is None else (only[1], min(only[2], loaded.n))
        for start in range(first, last, step):
            stop = min(last, start + step)
            whole = stop - start == loaded.n
            part = loaded if whole else slice_of(loaded, start, stop)
            its_math = math if whole else math_of(worker, job, part)
            for reducer in some:
                reducer.add(job.ordinal, part.start, part.n, its_math)

    def run_sample(some: Sequence[TopKReducer]) -> None:
        for reducer in some:
            part = sample_of(loaded, reducer.model)
            reducer.add(job.ordinal, 0, part.n, math_of(worker, job, part))

    reducer = make_reducer(
        statistic, [job], {job.ordinal: statistic}, worker.keys, worker.tolerant, room.bins
    )
    return collect([reducer], run_pass, run_sample if loaded.n > _SAMPLE_ABOVE else None)[0]


def slice_of(loaded: Block, start: int, stop: int) -> Block:
    """Return elements `start` to `stop` of a loaded piece as a piece of its own, without copying."""

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
    """Return a copy of blocks of 4096 elements spread over a piece, one after the other.

    Random masks are drawn as if it began the tensor, which for a sample is as good. Where one `model` alone is
    looked at, the others are not copied: they seem to lie where the first operand does.
    """
    operands = (*(() if loaded.base is None else (loaded.base,)), *loaded.models)
    first = len(operands) - len(loaded.models)
    copied = [i for i in range(len(operands)) if i < first or model is None or i - first == model]
    fitting = _SAMPLE_BYTES // (4096 * sum(itemsize(operands[i].dtype) for i in copied))
    blocks = max(1, min(_SAMPLE_BLOCKS, max(16, loaded.n >> 16), fitting))
    stride = loaded.n // blocks // 4096 * 4096
    parts = []
    copies = []
    position = 0
    for i, operand in enumerate(operands):
        if i not in copied:
            copies.append(Operand(0, operands[copied[0]].dtype))
            continue
        width = itemsize(operand.dtype)
        spread = loaded.arena[operand.offset : operand.offset + blocks * stride * width]
        parts.append(spread.reshape(blocks, stride * width)[:, : 4096 * width].ravel())
        copies.append(Operand(position, operand.dtype))
        position += parts[-1].size
    n = blocks * 4096
    return replace(
        loaded,
        arena=np.concatenate(parts),
        base=copies[0] if first else None,
        models=tuple(copies[first:]),
        start=0,
        n=n,
        shape=(n,),
        fishers=(),
    )


def sample_starts(n: int, blocks: int) -> list[int]:
    """Return where `blocks` blocks spread over `n` elements begin, each at a multiple of 4096."""
    return sorted({int(i * n / blocks) // 4096 * 4096 for i in range(blocks)})


# --- as a journal has them


def is_short(answers: Sequence[Answer]) -> bool:
    """Return whether the answers of a round are a few numbers, not several for each column: these are asked anew."""
    return not any(isinstance(answer, ColumnDots) for answer in answers)


def plain(answer: Answer) -> object:
    """Return an answer as JSON holds it exactly."""
    if isinstance(answer, Threshold):
        return {"threshold": [answer.key, answer.ties, answer.needed]}
    if isinstance(answer, Dots):
        return {"dots": [[value.hex() for value in answer.values], answer.n]}
    if isinstance(answer, SquareSums):
        return {"sums": [[total.hex() for total in answer.totals], answer.n]}
    if isinstance(answer, Touched):
        return {"touched": [list(answer.unique), list(answer.shared)]}
    if isinstance(answer, SquareTotal):
        return {"squares": [answer.total.hex(), answer.n]}
    if isinstance(answer, float):
        return {"float": answer.hex()}
    return {"pair": list(answer)} if isinstance(answer, tuple) else answer


def restored(plain: object) -> Answer:
    """Return the answer that `plain` made this of; ValueError if it made nothing like it."""
    match plain:
        case {"threshold": [int(key), int(ties), int(needed)]}:
            return Threshold(key, ties, needed)
        case {"squares": [str(total), int(n)]}:
            return SquareTotal(_from_hex(total), n)
        case {"dots": [[*values], int(n)]}:
            return Dots(tuple(map(_from_hex, values)), n)
        case {"sums": [[*totals], int(n)]}:
            return SquareSums(tuple(map(_from_hex, totals)), n)
        case {"touched": [[*unique], [*shared]]} if all(
            isinstance(count, int) for count in (*unique, *shared)
        ):
            return Touched(tuple(unique), tuple(shared))
        case {"float": str(text)}:
            return _from_hex(text)
        case {"pair": [int(first), int(second)]}:
            return (first, second)
        case int():
            return plain
    raise ValueError("no answer")


def _from_hex(text: Any) -> float:
    try:
        return float.fromhex(text)
    except (OverflowError, TypeError):
        raise ValueError("no answer") from None
