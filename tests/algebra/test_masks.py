"""Masks of task vectors: the same for every backend and wherever a tensor is cut."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streammerge.algebra.block import Operand
from streammerge.algebra.rules import TaskVectorMerge
from streammerge.algebra.task_vectors import Cut, TaskVector
from streammerge.backends.cpu.math import KernelMath
from streammerge.backends.torch.math import TorchMath
from tests.statistics.test_reducers import cuts_of, deltas, load, vector_of


def survivors(delta: torch.Tensor, vector: TaskVector, start: int) -> np.ndarray:
    """Return the elements that a kernel merge keeps, seen in its output over a base of zeros."""
    piece = load([torch.zeros(delta.numel()), delta], start)
    out = Operand(piece.models[0].offset, "F32")
    applied = KernelMath(piece).apply(TaskVectorMerge((vector,)), out)
    written = piece.buffer[out.offset : out.offset + 4 * delta.numel()].view(np.float32)
    kept = written != 0
    assert not (vector.drop or vector.cut) or applied.kept == (int(kept.sum()),)
    return kept.copy()


KEY = int(np.float32(0.25).view(np.uint32))
CUTS = [
    Cut(KEY, "drop"),
    Cut(KEY, "all"),
    Cut(KEY, "thin", 2**31),
    Cut(KEY, "thin", 2**27),
    Cut(KEY, "index", 1500),
]


@pytest.mark.parametrize("cut", [None, *CUTS])
@pytest.mark.parametrize("drop", [0, 2**31])
@given(cuts=st.lists(st.integers(1, 2999), max_size=4))
@settings(max_examples=8, deadline=None)
def test_masks_do_not_depend_on_the_pieces(drop: int, cut: Cut | None, cuts: list[int]) -> None:
    if drop == 0 and cut is None:
        return
    # Dense ties in one half, sparse ones in the other: the kernel draws words in two ways.
    delta = torch.cat([torch.full((1500,), 0.25), deltas("gaussian", 1500)])
    delta[1600::97] = -0.25
    vector = vector_of(drop, cut)
    whole = survivors(delta, vector, 0)
    pieces = [survivors(delta[a:b], vector, a) for a, b in cuts_of(3000, cuts)]
    assert (np.concatenate(pieces) == whole).all()
    if cut is not None:
        magnitude = delta.abs().numpy()
        assert not whole[magnitude < 0.25].any()
        if drop == 0:
            assert whole[magnitude > 0.25].all()


def test_an_output_may_lie_over_an_input_of_its_width() -> None:
    # `survivors` overwrites the model; here the base is overwritten by a narrower output as well.
    base, theta = deltas("gaussian", 5000), deltas("gaussian", 5000, 1)
    expected = (base.double() + 0.5 * (theta - base).double()).bfloat16()
    piece = load([base, theta])
    assert piece.base is not None
    KernelMath(piece).apply(TaskVectorMerge((TaskVector(0),), scale=0.5), Operand(piece.base.offset, "BF16"))
    written = piece.buffer[piece.base.offset : piece.base.offset + 2 * 5000].view(np.int16)
    assert torch.equal(torch.from_numpy(written.copy()).view(torch.bfloat16), expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_election_does_not_hide_what_is_not_finite_in_torch(value: float) -> None:
    tensors = [torch.ones(1001), deltas("gaussian", 1001), deltas("gaussian", 1001, 1)]
    tensors[-1][511] = value
    piece = load(tensors)
    rule = TaskVectorMerge((TaskVector(0), TaskVector(1)), elect=True)
    assert TorchMath(piece, "cpu", 4096).apply(rule, Operand(0, "F32")).not_finite == 1


@pytest.mark.parametrize("ties", ["all", "thin", "index", "drop"])
def test_what_was_dropped_does_not_return_by_a_tie_at_a_threshold_of_zero(ties: Any) -> None:
    delta = deltas("gaussian", 3000)
    delta[::2] = 0.0  # Half of the entries are the base's: a density of 0.8 keeps entries of 0.
    vector = vector_of(2**31, Cut(0, ties, {"thin": 2**31, "index": 1500}.get(ties, 0)))
    dropped = ~survivors(torch.ones(3000), vector_of(2**31, None), 0)
    piece = load([torch.zeros(3000), delta])
    results = []
    for math in (KernelMath(piece), TorchMath(piece, "cpu", 4096)):
        out = np.empty(3000, np.float32)
        room = Operand(piece.models[0].offset, "F32")
        saved = piece.buffer.copy()
        applied = math.apply(TaskVectorMerge((vector,)), room)
        out[:] = piece.buffer[room.offset : room.offset + 12000].view(np.float32)
        piece.buffer[:] = saved
        assert not out[dropped].any()
        assert (out != 0).sum() == (~dropped & (delta.numpy() != 0)).sum()
        results.append((out, applied.kept))
    assert (results[0][0] == results[1][0]).all()
    assert results[0][1] == results[1][1]
