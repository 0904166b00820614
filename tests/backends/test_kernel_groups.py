"""Compiled kernels are found by registration: a new rule declares what applies it, what it calls and an example."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from streammerge.algebra.block import Applied, Block, Call, Operand
from streammerge.backends.cpu import registry
from streammerge.backends.cpu.compile import GROUPS, kernels_of_call, kernels_of_rule
from streammerge.backends.cpu.math import KernelMath
from streammerge.backends.cpu.memory import BlockMemory
from streammerge.numerics.philox import RandomKeys


@dataclass(frozen=True)
class Zeros:
    """theta = 0."""


def test_a_new_rule_is_applied_and_compiled_by_what_one_file_registers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(registry, "_RULES", dict(registry._RULES))
    monkeypatch.setattr(registry, "_EXAMPLES", dict(registry._EXAMPLES))

    @registry.applies(Zeros, kernels="zeros")
    def _apply(memory: BlockMemory, rule: Zeros, out: Operand) -> Applied:
        return Applied(memory.write(np.zeros(memory.block.n), out, 0), ())

    calls: list[object] = []
    registry.example("zeros")(calls.append)
    assert kernels_of_rule(Zeros()) == {"zeros"}
    assert [run(None) for run in registry.groups()["zeros"]] == [None]  # type: ignore[arg-type]
    assert len(calls) == 1
    buffer = np.ones(16, np.uint8)
    block = Block(buffer, (), None, "t", 0, 4, (4,), RandomKeys(0, ()))
    assert KernelMath(block).apply(Zeros(), Operand(0, "F32")) == Applied(0, ())  # type: ignore[arg-type]
    assert not buffer.any()


def test_every_group_that_is_called_has_an_example() -> None:
    methods = ("dots", "add_column_dots", "touches", "fisher_squares", "words_between")
    called = {name for method in methods for name in kernels_of_call(Call(method))}
    assert called <= set(GROUPS)
    with pytest.raises(KeyError):
        kernels_of_call(Call("no_method"))
