"""The loops of parameter competition give the bits of their formulas, whatever the entries."""

from __future__ import annotations

import math

import numpy as np
import pytest

from streammerge.algebra.block import Block, BlockMath, Operand
from streammerge.algebra.competition import Competition, Range, Size
from streammerge.algebra.extent import Extent
from streammerge.algebra.rules import BalancedMerge
from streammerge.algebra.scores import Score
from streammerge.algebra.task_vectors import TaskVector
from streammerge.backends.registry import BACKENDS
from streammerge.numerics.philox import RandomKeys

N = 1200
WEIGHTS = (1.0, -0.7, 1.3)
VECTORS = tuple(TaskVector(i, weight=weight, drop=1 << 29) for i, weight in enumerate(WEIGHTS))
ODD = [math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-42, 3e38, -3e38]


def block_of(size: float) -> Block:
    """Return a block of a base and three models whose task vectors are about `size` large, fp32, with room for the output."""
    rng = np.random.default_rng(3)
    base = rng.standard_normal(N) * size
    models = [base + size * rng.standard_normal(N) for _ in VECTORS]
    models[1][: N // 4] = base[: N // 4]
    for i, value in enumerate(ODD):
        models[i % 3][10 * i + 700] = value
    parts = np.concatenate([base, *models, np.zeros(N)]).astype(np.float32)
    places = [Operand(4 * N * i, "F32") for i in range(4)]
    return Block(
        parts.view(np.uint8), tuple(places[1:]), places[0], "w", 0, N, (N,), RandomKeys(1, ("a", "b", "c"))
    )


def counted(on: BlockMath, score: Score) -> tuple[tuple[int, int], bytes]:
    bins = np.zeros(1 << 16, np.int32)
    return on.count_keys(score, 0, (1 << 31) - 1, 15, bins), bins.tobytes()


# Products of small entries take the series of tanh, of large ones the quotient; in a part there may be both.
@pytest.mark.parametrize("size", [1e-3, 0.1, 3.0])
def test_loops_equal_the_formulas(size: float) -> None:
    block = block_of(size)
    kernel, torch = (BACKENDS[name].math(block, "cpu", Extent.ELEMENT) for name in ("cpu", "torch"))
    spans: tuple[Range, ...] = ((0.1 * size, 2 * size), (0.0, size), (size, size))
    scores: list[Score] = [Size(VECTORS[1]), *(Competition(VECTORS, spans, i) for i in range(3))]
    for score in scores:
        assert counted(kernel, score) == counted(torch, score)
        key = counted(kernel, score)[0][1]
        assert (kernel.ties(score, key, 100) == torch.ties(score, key, 100)).all()
    for winners in (((-0.5, 0.9), (0.0, 0.1), (1e-9, 1e-3)), ((0.0, 0.0), (0.1, 0.1), (-1.0, 1.0))):
        rule = BalancedMerge(VECTORS, spans, winners, 0.7)
        outs = []
        for on in (kernel, torch):
            applied = on.apply(rule, Operand(16 * N, "F32"))
            outs.append((applied, block.buffer[16 * N :].tobytes()))
        assert outs[0] == outs[1]
        assert outs[0][0].not_finite > 0
