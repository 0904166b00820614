"""The loops of merges by votes give the bits of their formulas, whatever the entries and however many models."""

from __future__ import annotations

import math

import numpy as np
import pytest

from streammerge.algebra.block import Block, Operand
from streammerge.algebra.extent import Extent
from streammerge.algebra.rules import ConsensusMerge, LargestAgreeing, Rule
from streammerge.algebra.task_vectors import TaskVector
from streammerge.backends.registry import BACKENDS
from streammerge.numerics.philox import RandomKeys

N = 1200
SOME = np.array([0.0, -0.0, 1.0, -1.0, 2.0, -2.0, 1e-42, 3e38, -3e38, math.inf, -math.inf, math.nan])


@pytest.mark.parametrize("k", [1, 2, 3, 5])
@pytest.mark.parametrize("dropped", [0, 1 << 30])
def test_votes_by_loops_equal_the_formulas(k: int, dropped: int) -> None:
    rng = np.random.default_rng(k)
    base = np.where(rng.random(N) < 0.5, 0.0, rng.standard_normal(N))
    models = [np.where(rng.random(N) < 0.2, base, base + rng.choice(SOME[: 6 + 2 * i], N)) for i in range(k)]
    models[-1][::37] = np.resize(SOME, models[-1][::37].size)
    weights = [1.0, -0.7, 1.0, 1.3, 0.0][:k]
    vectors = tuple(TaskVector(i, weight=weight, drop=dropped) for i, weight in enumerate(weights))
    parts = np.concatenate([base, *models, np.zeros(N)]).astype(np.float32)
    places = [Operand(4 * N * i, "F32") for i in range(k + 2)]
    keys = RandomKeys(1, tuple("abcde"[:k]))
    block = Block(parts.view(np.uint8), tuple(places[1:-1]), places[0], "w", 0, N, (N,), keys)
    rules: list[Rule] = [LargestAgreeing(vectors, 0.7), LargestAgreeing(vectors)]
    rules += [ConsensusMerge(vectors, needed, share, -1.5) for needed in (1, 2) for share in (0.0, 0.4, 1.0)]
    for rule in rules:
        outs = []
        for name in ("cpu", "torch"):
            applied = BACKENDS[name].math(block, "cpu", Extent.ELEMENT).apply(rule, places[-1])
            outs.append((applied, block.buffer[places[-1].offset :].tobytes()))
        assert outs[0] == outs[1]
        assert outs[0][0].not_finite > 0
