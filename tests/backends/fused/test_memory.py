"""What the fused kernels ask of a launcher: memory that is given back whatever fails, and no wait before the end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from streammerge.algebra.block import Block, Call, Operand
from streammerge.algebra.competition import Size
from streammerge.algebra.rules import (
    ConsensusMerge,
    FisherMean,
    LargestAgreeing,
    Rule,
    SelectedMerge,
    TaskVectorMerge,
    TouchedMerge,
    WeightedSum,
)
from streammerge.algebra.task_vectors import Cut, RankDrop, TaskVector
from streammerge.backends.cpu.math import KernelMath
from streammerge.backends.fused.copied import Copied
from streammerge.backends.fused.launcher import KernelSpec
from streammerge.backends.fused.math import FusedMath, fused_call, fused_rule
from streammerge.numerics.philox import RandomKeys

VECTORS = tuple(TaskVector(i, cut=Cut(5, "thin", 9)) for i in range(2))
RANKED = tuple(TaskVector(i, rank_drop=RankDrop(0.4, 0.2)) for i in range(2))
OUT = Operand(64 * 5, "BF16")
RULES: list[Rule] = [
    WeightedSum((1.0, 1.0)),
    TaskVectorMerge(VECTORS, elect=True),
    TaskVectorMerge(RANKED),
    FisherMean((1.0, 1.0), (0.0, 0.0), vectors=VECTORS),
    ConsensusMerge(VECTORS, 2, 0.4),
    LargestAgreeing(VECTORS),
    TouchedMerge(VECTORS, 0.0, (1.0, 1.0)),
]


class Recording:
    """A launcher that computes nothing, records calls, and has memory for so many allocations."""

    def __init__(self, room: int = 1 << 30) -> None:
        self.calls: list[str] = []
        self.held: set[int] = set()
        self._room, self._next = room, 256

    def allocate(self, nbytes: int) -> int:
        assert nbytes > 0
        if self._room == 0:
            raise MemoryError
        self._room -= 1
        self._next += 1 << 20
        self.held.add(self._next)
        return self._next

    def free(self, address: int) -> None:
        self.held.remove(address)

    def send(self, values: NDArray[Any], address: int) -> None:
        assert values.flags.c_contiguous
        self.calls.append("send")

    def clear(self, address: int, nbytes: int) -> None:
        self.calls.append("clear")

    def fetch(self, address: int, values: NDArray[Any]) -> None:
        values[...] = 0
        self.calls.append("fetch")

    def launch(self, kernel: KernelSpec, grid: tuple[int, int], arguments: Sequence[int]) -> None:
        kernel.parameters(arguments)
        assert min(grid) > 0
        self.calls.append(kernel.name)


class Away:
    """A residence whose operands have no host memory."""

    def address(self, operand: Operand) -> int:
        return 1 << 40

    def output(self, out: Operand) -> int:
        return 1 << 41

    def written(self, out: Operand) -> None:
        return

    def on_host(self) -> Block:
        return block()


def block() -> Block:
    operands = [Operand(64 * i, "BF16") for i in range(5)]
    keys = RandomKeys(0, ("a", "b"))
    return Block(
        np.zeros(64 * 6, np.uint8),
        tuple(operands[:2]),
        operands[2],
        "t",
        0,
        8,
        (2, 4),
        keys,
        tuple(operands[3:]),
    )


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
def test_a_merge_waits_once_and_gives_its_memory_back(rule: Rule) -> None:
    launcher = Recording()
    wait = FusedMath(block(), launcher, Away(), KernelMath).enqueue(rule, OUT)
    assert "fetch" not in launcher.calls
    wait()
    assert launcher.calls.count("fetch") == 1
    assert not launcher.held


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
def test_memory_that_runs_out_anywhere_is_told_and_all_of_it_given_back(rule: Rule) -> None:
    needed = 0
    while True:
        launcher = Recording(needed)
        try:
            FusedMath(block(), launcher, Away(), KernelMath).apply(rule, OUT)
            break
        except MemoryError:
            assert not launcher.held
            needed += 1
    assert needed >= 2


def test_statistics_give_their_memory_back() -> None:
    launcher = Recording()
    math = FusedMath(block(), launcher, Away(), KernelMath)
    math.count_keys(VECTORS[0], 0, 255, 0, np.zeros(256, np.int32))
    math.ties(VECTORS[0], 5, 4)
    math.largest(VECTORS, [1, 8])
    math.abs_sums(VECTORS[0])
    math.abs_sums(RANKED[0])
    math.squares(VECTORS, None)
    math.own_squares()
    math.dots(VECTORS, 4)
    math.touches(VECTORS, 0.0)
    math.add_column_dots(VECTORS, np.zeros((3, 4)))
    math.fisher_squares(1)
    math.sign_total(TaskVectorMerge(VECTORS, elect=True))
    assert not launcher.held
    for call in (
        "surviving",
        "pair_sums",
        "abs_sums",
        "wide_abs_sums",
        "column_sums",
        "square_sums",
        "narrow_11",
    ):
        assert call in launcher.calls


def test_operands_are_copied_once_and_freed_with_their_residence() -> None:
    launcher = Recording()
    own = block()
    copied = Copied(own, launcher)
    math = FusedMath(own, launcher, copied, KernelMath)
    math.own_squares()
    first = len(launcher.held)
    math.apply(WeightedSum((1.0, 1.0)), OUT)
    assert len(launcher.held) == first + 1 == 4  # the base, two models, the output
    del math, copied
    assert not launcher.held


def test_what_has_no_kernel_is_merged_by_the_cpu_and_sent() -> None:
    launcher = Recording()
    math = FusedMath(block(), launcher, Away(), KernelMath)
    math.apply(SelectedMerge(VECTORS, None), OUT)
    assert launcher.calls == ["send"]


def test_what_is_fused_is_told() -> None:
    assert all(map(fused_rule, RULES))
    assert not fused_rule(SelectedMerge(VECTORS, None))
    assert fused_call(Call("count_keys", VECTORS[0]))
    assert not fused_call(Call("count_keys", RANKED[0]))
    assert not fused_call(Call("ties", Size(VECTORS[0])))
    assert fused_call(Call("squares"))
    assert fused_call(Call("touches"))
    assert not fused_call(Call("agreements"))
    assert not fused_rule(LargestAgreeing(RANKED))  # its kernel does not read what drops by rank left
    assert fused_call(Call("words_between"))
