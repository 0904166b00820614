"""A pass may be split over processes: parts written as JSON, absorbed in any order, give the same bits."""

from __future__ import annotations

import json
import pickle
import random
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streammerge.algebra.block import Block, Operand
from streammerge.algebra.competition import Competition, Size
from streammerge.algebra.rules import TaskVectorMerge
from streammerge.algebra.scores import Selection, Spread
from streammerge.algebra.task_vectors import Cut, TaskVector
from streammerge.backends.torch.math import TorchMath
from streammerge.numerics.philox import RandomKeys
from streammerge.statistics import kinds
from streammerge.statistics.base import KINDS, Known, MeasuredTensor, Measurement, Reducer, Source, Statistic
from streammerge.statistics.parts import decoded, encoded

KEYS = RandomKeys(3, ("one", "two"))
COLUMNS = 64
LENGTHS = {4: 5 * 4096, 7: 3 * 4096 + 640}
"""Elements of the tensors of the model, by ordinal."""
VECTORS = (TaskVector(0), TaskVector(1, drop=2**30, rescale=1.25))
SPREAD = Spread(VECTORS)
TIE = int(np.float32(0.5).view(np.uint32))
EXAMPLES: list[Statistic[Any]] = [
    kinds.TopK(VECTORS[0], 0.2),
    kinds.TopK(VECTORS[1], 0.3, plus_one=True, extent=kinds.SignTotal(TaskVectorMerge(VECTORS)).extent),
    kinds.Band(VECTORS[0], 0.4, 0.1, "lower"),
    kinds.NonZero(SPREAD),
    kinds.Largest(SPREAD, 900),
    kinds.Quantile(SPREAD, 0.75),
    kinds.Order(Size(VECTORS[1]), 0.9999, 1),
    kinds.Order(Competition(VECTORS, ((0.01, 0.3), (0.0, 0.2)), 1), 0.7, 0),
    kinds.TieIndex(VECTORS[0], kinds.Threshold(TIE, 80, 33)),
    kinds.AbsSum(VECTORS[1]),
    kinds.Squares(VECTORS),
    kinds.Squares(VECTORS, Selection(SPREAD, Cut(TIE, "all"))),
    kinds.Touches(VECTORS, 0.1),
    kinds.OwnSquares(3),
    kinds.SignAgreement(VECTORS),
    kinds.Magnitudes(VECTORS[1]),
    kinds.Moves(2, 1),
    kinds.Gram(2, VECTORS),
    kinds.ColumnGram(2, VECTORS),
    kinds.SignTotal(TaskVectorMerge(VECTORS, elect=True)),
    kinds.FisherSquares(1),
]


def tensors_of(ordinal: int) -> list[torch.Tensor]:
    """Return base, two models and two diagonals; every 200th delta of the first model is 0.5."""
    g = torch.Generator().manual_seed(ordinal)
    base = torch.randn(LENGTHS[ordinal], generator=g).bfloat16().float()
    deltas = [0.1 * torch.randn(base.numel(), generator=g) for _ in range(2)]
    models = [base + delta for delta in deltas]
    models[0][::200] = base[::200] + 0.5
    return [base, *models, *(delta.square() for delta in deltas)]


TENSORS = {ordinal: tensors_of(ordinal) for ordinal in LENGTHS}


def math_of(ordinal: int, start: int, stop: int) -> TorchMath:
    cut = [tensor[start:stop] for tensor in TENSORS[ordinal]]
    n, width = stop - start, 4 * -(-(stop - start) // 2) * 2
    buffer = np.zeros(len(cut) * width, np.uint8)
    for i, tensor in enumerate(cut):
        buffer[i * width : i * width + 4 * n] = tensor.numpy().view(np.uint8)
    base, one, two, *fishers = (Operand(i * width, "F32") for i in range(len(cut)))
    shape = (n // COLUMNS, COLUMNS)
    return TorchMath(
        Block(buffer, (one, two), base, f"t{ordinal}", start, n, shape, KEYS, tuple(fishers)), "cpu", 4096
    )


def measurement_of(statistic: Statistic[Any]) -> Measurement:
    ordinals = list(LENGTHS) if statistic.extent == "model" else [4]
    tensors = [MeasuredTensor(i, LENGTHS[i], f"t{i}", COLUMNS, (None, None)) for i in ordinals]
    return Measurement(tensors, KEYS, dict.fromkeys(ordinals, statistic), tolerant=False)


Piece = tuple[int, int, int]


def pieces_of(statistic: Statistic[Any], only: Piece | None) -> list[Piece]:
    if only is not None:
        return [(only[0], start, start + 4096) for start in range(only[1], only[2], 4096)]
    lengths = [(tensor.ordinal, tensor.n) for tensor in measurement_of(statistic).tensors]
    return [(i, start, min(n, start + 4096)) for i, n in lengths for start in range(0, n, 4096)]


def add(reducer: Reducer[Any], piece: Piece) -> None:
    ordinal, start, stop = piece
    stop = min(stop, LENGTHS[ordinal])
    if start < stop:
        reducer.add(ordinal, start, stop - start, math_of(ordinal, start, stop))


@cache
def alone(statistic: Statistic[Any]) -> Any:
    reducer = statistic.reducer(measurement_of(statistic))
    assert not isinstance(reducer, Known)
    while True:
        for piece in pieces_of(statistic, reducer.wants):
            add(reducer, piece)
        if reducer.end():
            return reducer.value


def travelled(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


def told(part: Any) -> Any:
    """Return a part as a process reads it that another one has written as JSON."""
    return decoded(json.loads(json.dumps(encoded(part))))


def together(statistic: Statistic[Any], n_workers: int, luck: random.Random) -> Any:
    """Take a statistic by several workers, each with a pickled reducer for each pass."""
    reducer = travelled(statistic).reducer(measurement_of(statistic))
    while True:
        pieces = pieces_of(statistic, reducer.wants)
        workers = [travelled(reducer) for _ in range(n_workers)]
        if reducer.in_order:  # each takes over from the one before
            share = -(-len(pieces) // n_workers)
            for i, worker in enumerate(workers):
                if i:
                    worker.absorb(told(workers[i - 1].part()))
                for piece in pieces[i * share : (i + 1) * share]:
                    add(worker, piece)
            reducer.absorb(told(workers[-1].part()))
        else:
            luck.shuffle(pieces)
            for piece in pieces:
                add(luck.choice(workers), piece)
            luck.shuffle(workers)
            for worker in workers:
                reducer.absorb(told(worker.part()))
        if reducer.end():
            return reducer.value


def bits(value: Any) -> Any:
    return value.values.tobytes() if isinstance(value, kinds.ColumnDots) else repr(value)


@pytest.mark.parametrize("statistic", EXAMPLES, ids=lambda one: type(one).__name__)
@given(n_workers=st.integers(1, 4), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=6, deadline=None)
def test_parts_absorbed_in_any_order_give_the_same_bits(
    statistic: Statistic[Any], n_workers: int, seed: int
) -> None:
    assert bits(together(statistic, n_workers, random.Random(seed))) == bits(alone(statistic))


@pytest.mark.parametrize("statistic", EXAMPLES, ids=lambda one: type(one).__name__)
def test_values_survive_json(statistic: Statistic[Any]) -> None:
    value = alone(statistic)
    plain = statistic.to_json(value)
    if plain is None:
        assert isinstance(statistic, kinds.ColumnGram)
        return
    assert bits(statistic.from_json(json.loads(json.dumps(plain)))) == bits(value)
    for wrong in (
        None,
        [],
        {},
        {"pair": [1]},
        {"float": "x"},
        "1",
        {"threshold": [1, 2]},
        {"dots": [[], -1]},
    ):
        with pytest.raises(ValueError):  # noqa: PT011
            statistic.from_json(wrong)


def test_every_kind_that_reads_blocks_has_an_example_here() -> None:
    shipped = {
        kind
        for name, kind in KINDS.items()
        if name.startswith("streammerge.") and kind.source in (Source.MODELS, Source.FISHERS)
    }
    abstract = {kind for kind in shipped if kind.__subclasses__()}
    assert shipped - abstract == {type(example) for example in EXAMPLES}


@pytest.mark.parametrize(
    "wrong",
    [
        [],
        {},
        1.5,
        {"float": 1},
        {"tuple": [{"x": 1}]},
        {"map": [[1]]},
        {"array": ["object", [1], "AAAA"]},
        {"array": ["int64", [-1], "AAAA"]},
        {"array": ["int64", [1 << 40], "AAAA"]},
        {"array": ["int64", [1], "AAAA"]},
        {"array": ["int32", [2], "eJxjYGBgAAAABAAB"]},
    ],
)
def test_what_is_no_part_is_refused(wrong: Any) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        decoded(wrong)
