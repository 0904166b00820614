"""`check_statistic`: the laws of statistics over one statistic."""

from __future__ import annotations

import json
import pickle
import random
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from streammerge.algebra.block import Block, BlockMath, Operand
from streammerge.algebra.extent import Extent
from streammerge.backends.cpu.math import KernelMath
from streammerge.backends.registry import BACKENDS
from streammerge.numerics.philox import RandomKeys
from streammerge.records import dataclass
from streammerge.statistics.base import (
    KINDS,
    MeasuredTensor,
    Measurement,
    Range,
    Reducer,
    Source,
    Statistic,
)
from streammerge.statistics.passes import collect

A = TypeVar("A")
_BLOCK = 4096
_COLUMNS = 64
"""Elements of a row, a divisor of a block: blocks hold whole rows."""
_MODELS = 3
_DTYPES = {"BF16": torch.bfloat16, "F32": torch.float32}


@dataclass(frozen=True)
class _Data:
    """One tensor of every model in memory, and its description for a statistic."""

    buffer: NDArray[np.uint8]
    operands: tuple[Operand, ...]
    tensor: MeasuredTensor
    itemsize: int

    def block(self, start: int, stop: int, keys: RandomKeys) -> Block:
        """Return some elements as a block."""
        moved = tuple(
            Operand(one.offset + start * (4 if i > _MODELS else self.itemsize), one.dtype)
            for i, one in enumerate(self.operands)
        )
        rows = max(1, (stop - start) // self.tensor.columns)
        shape = (rows, (stop - start) // rows)
        base, models, fishers = moved[0], moved[1 : _MODELS + 1], moved[_MODELS + 1 :]
        return Block(
            self.buffer, models, base, self.tensor.name, start, stop - start, shape, keys, tuple(fishers)
        )


def _make(ordinal: int, rows: int, dtype: str) -> _Data:
    generator = torch.Generator().manual_seed(ordinal)
    shape = (rows, _COLUMNS)
    base = torch.randn(shape, generator=generator) * 0.02
    models = [base + torch.randn(shape, generator=generator) * 1e-3 for _ in range(_MODELS)]
    fishers = [torch.randn(shape, generator=generator).square() for _ in range(_MODELS)]
    parts, operands, position = [], [], 0
    for i, tensor in enumerate((base, *models, *fishers)):
        name = dtype if i <= _MODELS else "F32"
        raw = tensor.to(_DTYPES[name]).contiguous().view(-1).view(torch.uint8).numpy()
        operands.append(Operand(position, name))
        parts.append(raw)
        position += raw.size
    itemsize = torch.empty(0, dtype=_DTYPES[dtype]).element_size()
    measured = MeasuredTensor(
        ordinal, rows * _COLUMNS, f"layers.{ordinal}.weight", _COLUMNS, (None,) * _MODELS
    )
    return _Data(np.concatenate(parts), tuple(operands), measured, itemsize)


def check_statistic(statistic: Statistic[A], *, expected: Callable[..., A] | None = None) -> A | None:
    """Check the properties of a statistic that the engine relies on, and return its value for bf16 models.

    Its value is the same from whole tensors and from blocks in any order, by every backend of the CPU, and by reducers of
    several processes whose parts are absorbed in any order; it goes through JSON and pickle unchanged.

    Parameters
    ----------
    statistic
        A statistic over at most 3 models with a base. Its `extent` decides whether it covers the whole model.
    expected
        Function of ``(base, models)``, fp64 arrays of shape (rows, 64), that returns the right value; for a statistic
        of one tensor.

    Raises
    ------
    AssertionError
        If a law is broken.
    """
    title = f"statistic {type(statistic).__name__}"
    assert type(statistic) in KINDS.values(), f"{title}: derive it from Statistic, as a frozen dataclass"
    assert hash(statistic) == hash(pickle.loads(pickle.dumps(statistic))), (
        f"{title}: it does not pickle; use a frozen dataclass"
    )
    cost = statistic.cost
    assert min(cost.windows, cost.partials, cost.passes) >= 0, f"{title}: its cost is negative"
    first: list[A] = []
    for dtype in _DTYPES:
        rows = (
            (3 * _BLOCK // _COLUMNS + 5, 7)
            if statistic.extent is Extent.MODEL
            else (3 * _BLOCK // _COLUMNS + 5,)
        )
        data = [_make(ordinal, count, dtype) for ordinal, count in enumerate(rows)]
        value = _check_on(statistic, data, title)
        _check_value(statistic, value, title)
        if expected is not None and statistic.extent is not Extent.MODEL:
            right = expected(*_as_float64(data[0]))
            assert right == value, f"{title}: its value is {value!r}, expected {right!r} ({dtype})"
        first.append(value)
    return first[0]


def _as_float64(data: _Data) -> tuple[NDArray[np.float64], list[NDArray[np.float64]]]:
    tensors = []
    for one in data.operands[: _MODELS + 1]:
        raw = data.buffer[one.offset : one.offset + data.tensor.n * data.itemsize]
        tensors.append(
            torch.from_numpy(raw.copy()).view(_DTYPES[one.dtype]).double().numpy().reshape(-1, _COLUMNS)
        )
    return tensors[0], tensors[1:]


def _check_on(statistic: Statistic[A], data: Sequence[_Data], title: str) -> A:
    keys = RandomKeys(7, tuple(f"m{i}" for i in range(_MODELS)))
    over = Measurement(
        [one.tensor for one in data], keys, {one.tensor.ordinal: statistic for one in data}, most_bins=1 << 12
    )
    whole = _value(statistic, over, data, keys, KernelMath, 1 << 40)
    ways: dict[str, A] = {
        "the torch backend": _value(statistic, over, data, keys, _torch, 1 << 40),
        "blocks of 4096 elements": _value(statistic, over, data, keys, KernelMath, _BLOCK),
        "blocks in another order": _value(statistic, over, data, keys, KernelMath, _BLOCK, shuffled=True),
        "parts of several processes": _value(statistic, over, data, keys, KernelMath, _BLOCK, parts=True),
    }
    for how, value in ways.items():
        assert _plain(value) == _plain(whole), f"{title}: {how} give {value!r}, whole tensors {whole!r}"
    return whole


def _torch(block: Block) -> BlockMath:
    return BACKENDS["torch"].math(block, "cpu", Extent.ELEMENT)


def _value(
    statistic: Statistic[A],
    over: Measurement,
    data: Sequence[_Data],
    keys: RandomKeys,
    make_math: Callable[[Block], BlockMath],
    size: int,
    *,
    shuffled: bool = False,
    parts: bool = False,
) -> A:
    """Return the value from blocks of `size`: in any order, or each by a separate reducer whose part is absorbed."""
    order = random.Random(1)

    def blocks(only: Range | None) -> list[tuple[_Data, int, int]]:
        found = []
        for one in data:
            first, last = 0, one.tensor.n
            if only is not None:
                if only[0] != one.tensor.ordinal:
                    continue
                first, last = only[1], min(only[2], last)
            found += [(one, start, min(last, start + size)) for start in range(first, last, size)]
        return found

    def run(reducers: Sequence[Reducer[Any]], only: Range | None) -> None:
        for reducer in reducers:
            some = blocks(only)
            if shuffled and not reducer.in_order:
                order.shuffle(some)
            made: list[Any] = []
            before = pickle.dumps(reducer)
            for one, start, stop in some:
                target = pickle.loads(before) if parts else reducer
                if reducer.in_order and made:
                    target.absorb(made.pop())  # a new accumulator takes over what was added before
                target.add(one.tensor.ordinal, start, stop - start, make_math(one.block(start, stop, keys)))
                if parts:
                    made.append(pickle.loads(pickle.dumps(target.part())))
            order.shuffle(made)
            for part in made:
                reducer.absorb(part)

    reducer = statistic.reducer(over)
    if reducer.known or statistic.source is Source.GRAMS:
        run = lambda reducers, only: None  # noqa: E731
    value: A = collect([reducer], run, None)[0]
    return value


def _plain(value: object) -> object:
    """Return a value that can be compared: arrays by their bytes."""
    return pickle.dumps(value)


def _check_value(statistic: Statistic[A], value: A, title: str) -> None:
    placeholder = statistic.placeholder()
    assert type(value) is type(placeholder), (
        f"{title}: its placeholder is of type {type(placeholder).__name__}, its value of type {type(value).__name__}"
    )
    plain = statistic.to_json(value)
    if plain is None:
        return
    again = statistic.from_json(json.loads(json.dumps(plain)))
    assert again == value, f"{title}: JSON gives {again!r} for {value!r}; use hex_of for fp64"
    for wrong in ("no value", {"a": [1]}, [None], float("nan")):
        try:
            statistic.from_json(wrong)
        except ValueError:
            continue
        raise AssertionError(
            f"{title}: from_json accepts {wrong!r}; raise ValueError for what to_json never made"
        )
