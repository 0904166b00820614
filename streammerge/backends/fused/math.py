"""`BlockMath` by fused kernels on a device: the bits of `KernelMath`, with the same reports."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from streammerge.algebra.block import (
    Applied,
    Bins,
    Block,
    BlockMath,
    Call,
    Counts,
    Found,
    Operand,
    operand_bytes,
)
from streammerge.algebra.gram_matrix import rows_at_once
from streammerge.algebra.rules import Rule, TaskVectorMerge, ranked
from streammerge.algebra.scores import Ranked, Selection
from streammerge.algebra.task_vectors import TaskVector
from streammerge.backends.fused.launcher import Launcher, Residence
from streammerge.backends.fused.memory import DeviceMemory, Scratch
from streammerge.backends.fused.rules import enqueue_ranks, enqueued, fused_rule, signs_of
from streammerge.backends.fused.specs import kernel_specs
from streammerge.backends.fused.tables import bits, pair_rows, search_rows, weighted_rows
from streammerge.numerics.ordered_sum import BLOCK

_DIGITS = ((20, "11"), (10, "10"), (0, "10"))
"""The first bit of each digit of a pattern of 31 bits, and its width."""
_MOST_COUNTED = (1 << 31) - 1
"""Elements that counters of 32 bits can count."""


_LONGEST_ROW = 1 << 16
"""Elements of a row that is sorted on the device; longer ones, which no model has, go through the CPU."""
_METHODS = {
    "abs_sums",
    "add_column_dots",
    "dots",
    "fisher_squares",
    "own_squares",
    "sign_total",
    "touches",
    "words_between",  # reads no tensor, and runs on the CPU in every merge
}


__all__ = ["FusedMath", "fused_call", "fused_rule"]


def fused_call(call: Call) -> bool:
    """Return whether fused kernels answer a statistic's call; if not, `FusedMath` asks its fallback."""
    if call.method in ("count_keys", "ties"):
        return isinstance(call.subject, TaskVector) and call.subject.rank_drop is None
    if call.method == "squares":
        return call.subject is None
    return call.method in _METHODS


class FusedMath:
    """`BlockMath` by launches; see there for what the methods return.

    Parameters
    ----------
    block
        The same elements of every model; its buffer is not read.
    launcher
        The stream of the device.
    residence
        Where operands lie on the device, and where outputs go.
    fallback
        Makes the `BlockMath` of a block in this process's memory, for what no fused kernel computes.
    """

    def __init__(
        self,
        block: Block,
        launcher: Launcher,
        residence: Residence,
        fallback: Callable[[Block], BlockMath],
    ) -> None:
        self._memory = DeviceMemory(block, launcher, residence)
        self._fallback = fallback

    @cached_property
    def _else(self) -> BlockMath:
        return self._fallback(self._memory.residence.on_host())

    # --- merges

    def enqueue(self, rule: Rule, out: Operand) -> Callable[[], Applied]:
        """Enqueue what `apply` does; the returned function waits for it and reports."""
        if not self._fuses(rule):
            report = self._apply_on_host(rule, out)
            return lambda: report
        reports = self._enqueue([rule], [out])
        return lambda: reports()[0]

    def apply(self, rule: Rule, out: Operand) -> Applied:
        """See `BlockMath`."""
        return self.enqueue(rule, out)()

    def apply_scaled(self, rules: Sequence[Rule], outs: Sequence[Operand]) -> list[Applied]:
        """See `ScalingMath`."""
        return self._enqueue(rules, outs)()

    def _fuses(self, rule: Rule) -> bool:
        return fused_rule(rule) and (self._memory.block.row_length <= _LONGEST_ROW or not ranked(rule))

    def _enqueue(self, rules: Sequence[Rule], outs: Sequence[Operand]) -> Callable[[], list[Applied]]:
        enqueue = enqueued(rules[0])
        assert enqueue is not None, f"no fused kernel applies {type(rules[0]).__name__}"
        scratch = self._memory.scratch()
        try:
            counted = enqueue(self._memory, scratch, rules, outs)
        except BaseException:
            scratch.free()
            raise

        def wait() -> list[Applied]:
            with scratch:
                return counted.report(self._memory.fetch(counted.address, counted.n))

        return wait

    def _apply_on_host(self, rule: Rule, out: Operand) -> Applied:
        """Merge by the fallback; where the operands' home is the device, the output is sent there."""
        memory = self._memory
        here = memory.residence.on_host()
        if here is memory.block:
            return self._else.apply(rule, out)
        nbytes, end = operand_bytes(out, here.n), here.buffer.nbytes
        room = np.zeros(end + -(-nbytes // 8) * 8, np.uint8)
        room[:end] = here.buffer
        report = self._fallback(replace(here, buffer=room)).apply(rule, Operand(end, out.dtype))
        memory.launcher.send(room[end : end + nbytes], memory.residence.output(out))
        memory.residence.written(out)
        return report

    def sign_total(self, merge: TaskVectorMerge) -> int:
        """See `BlockMath`."""
        if not self._fuses(merge):
            return self._else.sign_total(merge)
        return signs_of(self._memory, merge)

    # --- ranks

    def count_keys(self, subject: Ranked, low: int, high: int, shift: int, bins: Bins) -> tuple[int, int]:
        """See `BlockMath`."""
        if not fused_call(Call("count_keys", subject)):
            return self._else.count_keys(subject, low, high, shift, bins)
        assert isinstance(subject, TaskVector)
        memory = self._memory
        with memory.scratch() as scratch:
            table, counts = scratch.sent(memory.rows([subject], cut=False)), scratch.zeros(16)
            found = np.empty(len(bins), np.int32)
            places = scratch.zeros(found.nbytes)
            window = (low, high, shift)
            memory.over_elements("keys_in_window", table, *memory.base(), *window, places, counts)
            memory.launcher.fetch(places, found)
            bins += found
            above, highest = memory.fetch(counts, 2)
        return int(above), int(highest)

    def ties(self, subject: Ranked, key: int, size: int) -> Counts:
        """See `BlockMath`."""
        if not fused_call(Call("ties", subject)):
            return self._else.ties(subject, key, size)
        assert isinstance(subject, TaskVector)
        memory, runs = self._memory, -(-self._memory.block.n // size)
        with memory.scratch() as scratch:
            table, counts = scratch.sent(memory.rows([subject], cut=False)), scratch.zeros(8 * runs)
            memory.over_elements("ties_per_run", table, *memory.base(), key, size, counts)
            return memory.fetch(counts, runs)

    def largest(self, vectors: Sequence[TaskVector], ranks: Sequence[int]) -> list[Found]:
        """See `SearchingMath`: three passes count digits of 11, 10 and 10 bits, and each narrows the search on the device."""
        memory, k = self._memory, len(vectors)
        assert memory.block.n <= _MOST_COUNTED, "a search counts in 32 bits"
        with memory.scratch() as scratch:
            table, searches = scratch.sent(memory.rows(vectors, cut=False)), scratch.sent(search_rows(ranks))
            bins = scratch.zeros(4 * k * (1 << 11))
            for shift, width in _DIGITS:
                how = (searches, bins, shift)
                memory.over_elements(f"count_digits_{width}", table, *memory.base(), *how, second=k)
                memory.launch(f"narrow_{width}", (k, 1), *how)
            found = memory.fetch(searches, 4 * k).reshape(k, 4)
        return [Found(int(key), int(ties), int(rank), int(top)) for key, rank, ties, top in found]

    def touches(self, vectors: tuple[TaskVector, ...], epsilon: float) -> Counts:
        """See `BlockMath`."""
        memory, k = self._memory, len(vectors)
        with memory.scratch() as scratch:
            table, counts = scratch.sent(memory.rows(vectors)), scratch.zeros(16 * k)
            memory.over_elements("touches", table, k, *memory.base(), bits(float(epsilon)), counts)
            return memory.fetch(counts, 2 * k).reshape(2, k)

    # --- sums

    def abs_sums(self, vector: TaskVector) -> NDArray[np.float64]:
        """See `BlockMath`."""
        memory, groups, rule = self._memory, self._groups(BLOCK), TaskVectorMerge((vector,))
        if not self._fuses(rule):
            return self._else.abs_sums(vector)
        with memory.scratch() as scratch:
            if vector.rank_drop is not None:
                counts, table = scratch.zeros(8), scratch.sent(memory.rows([vector]))
                rows = enqueue_ranks(memory, scratch, rule, table, counts, divided=False)
                name = "wide_abs_sums"
            else:
                (rows,), name = self._surviving(scratch, [vector]), "abs_sums"
            pairs = scratch.sent(pair_rows([rows], [1.0]))
            sums = scratch.empty(8 * groups)
            self._summed(name, groups, 1, pairs, memory.block.n, BLOCK, sums)
            return memory.fetch_reals(sums, (groups,))

    def squares(self, vectors: tuple[TaskVector, ...], selection: Selection | None) -> NDArray[np.float64]:
        """See `BlockMath`."""
        if selection is not None:
            return self._else.squares(vectors, selection)
        return self._pair_sums(vectors, BLOCK, squares=True)

    def own_squares(self) -> NDArray[np.float64]:
        """See `BlockMath`."""
        return self._pair_sums((), BLOCK, squares=True)

    def dots(self, vectors: Sequence[TaskVector], length: int) -> NDArray[np.float64]:
        """See `BlockMath`."""
        return self._pair_sums(vectors, length)

    def add_column_dots(self, vectors: Sequence[TaskVector], sums: NDArray[np.float64]) -> None:
        """See `BlockMath`."""
        memory, columns = self._memory, self._memory.block.row_length
        with memory.scratch() as scratch:
            pairs = scratch.sent(pair_rows(*self._terms(scratch, vectors)))
            totals = scratch.sent(sums)
            grid = (kernel_specs()["column_sums"].programs(columns), len(sums))
            shape = (memory.block.n // columns, columns, rows_at_once(columns))
            memory.launch("column_sums", grid, pairs, *shape, totals)
            sums[:] = memory.fetch_reals(totals, sums.shape)

    def fisher_squares(self, model: int) -> tuple[NDArray[np.float64], int]:
        """See `BlockMath`."""
        memory, groups = self._memory, self._groups(BLOCK)
        with memory.scratch() as scratch:
            sums, counts = scratch.empty(8 * groups), scratch.zeros(8)
            place = memory.place(memory.block.fishers[model])
            self._summed("square_sums", groups, 1, *place, memory.block.n, sums, counts)
            return memory.fetch_reals(sums, (groups,)), int(memory.fetch(counts, 1)[0])

    def _groups(self, length: int) -> int:
        return -(-self._memory.block.n // length)

    def _summed(self, name: str, groups: int, second: int, *arguments: int) -> None:
        self._memory.launch(name, (kernel_specs()[name].programs(groups), second), *arguments)

    def _pair_sums(
        self, vectors: Sequence[TaskVector], length: int, *, squares: bool = False
    ) -> NDArray[np.float64]:
        """Return the sums of products of pairs over every `length` elements, (groups, pairs)."""
        memory, groups = self._memory, self._groups(length)
        with memory.scratch() as scratch:
            table = pair_rows(*self._terms(scratch, vectors), squares=squares)
            pairs, k = scratch.sent(table), len(table)
            sums = scratch.empty(8 * groups * k)
            self._summed("pair_sums", groups, k, pairs, memory.block.n, length, sums)
            return memory.fetch_reals(sums, (groups, k))

    def _terms(self, scratch: Scratch, vectors: Sequence[TaskVector]) -> tuple[list[int], list[float]]:
        """Return the rows of a sum's terms in fp32, and their factors; without vectors, the base (if any) and the models."""
        if vectors:
            return self._surviving(scratch, vectors), [v.rescale for v in vectors]
        block = self._memory.block
        operands = [*([] if block.base is None else [block.base]), *block.models]
        return self._widened(scratch, operands), [1.0] * len(operands)

    def _surviving(self, scratch: Scratch, vectors: Sequence[TaskVector]) -> list[int]:
        """Write surviving entries without what is not finite; return the address of each vector's, fp32 (n,)."""
        table = self._memory.rows(vectors)
        return self._written(scratch, table, *self._memory.place(self._memory.block.base))

    def _widened(self, scratch: Scratch, operands: Sequence[Operand]) -> list[int]:
        places = [(self._memory.residence.address(one), one.dtype, 1.0) for one in operands]
        return self._written(scratch, weighted_rows(places), *self._memory.place(None))

    def _written(self, scratch: Scratch, table: NDArray[np.int64], base: int, code: int) -> list[int]:
        block, k = self._memory.block, len(table)
        rows, counts = scratch.empty(4 * k * block.n), scratch.zeros(8 * k)
        span = (base, code, block.start, block.n)
        self._memory.over_elements("surviving", scratch.sent(table), *span, rows, 1, counts, second=k)
        return [rows + 4 * i * block.n for i in range(k)]

    # --- without a fused kernel

    def agreements(self, vectors: tuple[TaskVector, ...]) -> Counts:
        """See `BlockMath`."""
        return self._else.agreements(vectors)
