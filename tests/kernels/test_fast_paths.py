"""The fast paths of the elementwise kernels against what defines them, on the values that betray a difference."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from streammerge.kernels.blocks import BLOCK, _round_to_bf16, divide, divides_fast
from streammerge.kernels.deltas import (
    ABOVE,
    INDEX,
    NO_CUT,
    THIN,
    _cut_bf16,
    _cut_block,
    _settle_ties,
    scratch,
)
from streammerge.kernels.few import add_few, elect_few, few_serve, weigh_few
from streammerge.kernels.gram import _add_products
from streammerge.kernels.merge import _add_weights, _elect, _sum_signs
from streammerge.kernels.operands import BF16, F32
from streammerge.numerics.casts import round_to

Doubles = NDArray[np.float64]

SPECIAL = np.array(
    [
        0x0000,
        0x8000,
        0x0001,
        0x8001,
        0x0080,
        0x8080,
        0x3F80,
        0xBF80,
        0x7F7F,
        0xFF7F,
        0x7F80,
        0xFF80,
        0x7FC0,
        0x7FFF,
    ],
    np.uint16,
)
"""Patterns of bf16: zeros, subnormals, the least normal numbers, ones, the largest numbers, infinities, NaN."""


def same(found: Doubles, expected: Doubles) -> bool:
    """Return whether all bits are equal, of a NaN only that it is one: rounding writes one NaN for all."""
    nan = np.isnan(expected)
    return bool(
        (np.isnan(found) == nan).all() and (found[~nan].view("u8") == expected[~nan].view("u8")).all()
    )


# --- rounding


def rounded(values: Doubles) -> tuple[bool, NDArray[np.uint16], NDArray[np.uint16]]:
    """Return whether the fast rounding held, its patterns, and the right ones."""
    target = np.zeros(values.size, np.uint16)
    held = _round_to_bf16(values, values.size, target)
    right = round_to(torch.from_numpy(values), "BF16").view(torch.int16).numpy().view(np.uint16)
    return bool(held), target, right


def test_normal_numbers_and_the_cases_between_them_round_fast() -> None:
    patterns = np.arange(0x0080, 0x7F80, dtype=np.uint32)
    numbers = (patterns << 16).view(np.float32).astype(np.float64)
    middle = (numbers[1:] + numbers[:-1]) / 2
    near = [
        numbers,
        middle,
        np.nextafter(middle, np.inf),
        np.nextafter(middle, 0),
        middle * (1 + 2.0**-30),
        [0.0],
    ]
    values = np.concatenate(near)
    held, found, right = rounded(np.concatenate([values, -values]))
    assert held
    assert (found == right).all()


def test_what_is_not_normal_is_found_or_rounded_right_alone() -> None:
    tiny = 2.0 ** -np.arange(120.0, 152.0, 0.25)
    tiny = np.concatenate(
        [tiny, np.nextafter(tiny, 0), np.nextafter(tiny, 1), tiny * (1 + 2.0**-10), [5e-324]]
    )
    nan = np.array(
        [0x7FF8000000000000, 0x7FFFFFFFFFFFFFFF, 0xFFFFFFFFE0000000, 0x7FF0000000000001], np.uint64
    )
    large = np.array([3.39e38, 3.4e38, 2.0**128, 1e300, np.inf])
    seen = set()
    for value in np.concatenate([tiny, -tiny, large, -large, nan.view(np.float64)]):
        held, found, right = rounded(np.array([1.0, value]))
        seen.add(held)
        assert not held or (found == right).all(), value.hex()
        size = int(right[1]) & 0x7FFF
        assert held or not 0x80 <= size < 0x7F80  # what is normal is not rounded slowly
    assert seen == {True, False}


# --- division


@pytest.mark.parametrize(
    "divisor", [3.0, 7.0, 0.6, 1.1, -0.3, 2 - 2.0**-52, 1 + 2.0**-52, 1e-8, 5.0 * 2.0**90]
)
def test_a_fast_quotient_is_the_rounded_one(divisor: float) -> None:
    rng = np.random.default_rng(0)
    whole = np.arange(1, 600).astype(np.float64)
    hard = np.concatenate(
        [whole * divisor, whole, whole + 2.0**-44, rng.normal(size=2000), 2 - 2.0**-52 * whole]
    )
    values = np.concatenate(
        [hard, np.nextafter(hard, 0), np.nextafter(hard, 9), hard * 2.0**200, hard * 2.0**-300]
    )
    values = np.concatenate([values, -values, [0.0, np.inf, -np.inf, np.nan]])
    found = values.copy()
    assert divides_fast(np.array([1.0, 0.0, -0.5]), divisor)
    divide(found, found.size, divisor, True)
    assert same(found, values / divisor)


def test_numbers_that_may_underflow_are_not_divided_fast() -> None:
    assert not divides_fast(np.array([1.0, 2.0**-101]), 3.0)
    assert not divides_fast(np.array([1.0, np.nan]), 3.0)
    assert not divides_fast(np.ones(2), 2.0**-101)
    assert not divides_fast(np.ones(2), np.inf)


# --- election


def elected(
    deltas: list[NDArray[np.float32]], c: Doubles, w: Doubles, zero_sign: int, normalize: bool
) -> Doubles:
    """Elect as the kernels for any number of models do, which add up sums in memory."""
    m = deltas[0].size
    up, down, up_weight, down_weight, merged = np.zeros((5, m))
    for delta, coefficient, weight in zip(deltas, c, w, strict=True):
        _sum_signs(m, delta, coefficient, up, down)
        _add_weights(m, delta, coefficient, weight, up_weight, down_weight)
    _elect(m, up, down, up_weight, down_weight, zero_sign, normalize, merged)
    return merged


@pytest.mark.parametrize(("stride", "dtype"), [(BLOCK, np.float32), (BLOCK + 9, np.float64)])
@pytest.mark.parametrize("k", [2, 3, 4])
def test_few_models_elect_as_many_do(k: int, stride: int, dtype: type[np.float32 | np.float64]) -> None:
    some = [0.0, -0.0, 1.0, -1.0, 0.3, -2.0, 1e-45, -3e38, np.inf, -np.inf, np.nan]
    rows = np.array(list(product(some if k < 4 else some[:4] + some[-3:], repeat=k)), np.float32)
    for weights in ([1.0] * k, [0.5, 0.3, 0.2, 0.1][:k], [1.0, -1.0, 0.0, 1e-300][:k]):
        w = np.array(weights)
        c = w * 1.7
        for first, zero_sign, normalize in product(range(0, len(rows), BLOCK), (-1, 0, 1), (False, True)):
            deltas = [np.ascontiguousarray(one) for one in rows[first : first + BLOCK].T]
            m, room, merged = deltas[0].size, np.zeros(4 * stride, dtype), np.empty(BLOCK)
            for i, delta in enumerate(deltas):
                room[i * stride : i * stride + m] = delta
            no_base, base = np.full(m, -0.0, np.float32), np.resize(np.float32(some), m)
            expected = elected(deltas, c, w, zero_sign, normalize)
            elect_few(m, room, stride, c, w, normalize, zero_sign, no_base, 1.0, merged)
            assert same(merged[:m], expected)
            elect_few(m, room, stride, c, w, normalize, zero_sign, base, -0.7, merged)
            with np.errstate(invalid="ignore"):
                assert same(merged[:m], base + -0.7 * expected)


# --- sums of few terms


@pytest.mark.parametrize("divisor", [1.0, 3.0, -0.7])
@pytest.mark.parametrize("k", [2, 3, 4])
def test_few_terms_are_added_one_after_the_other(k: int, divisor: float) -> None:
    rng = np.random.default_rng(k)
    m = BLOCK - 3
    patterns = rng.integers(0, 1 << 16, (k, m), np.uint16)
    patterns[:, : len(SPECIAL)] = SPECIAL
    half, places = np.zeros(k * BLOCK, np.uint16), np.arange(k) * BLOCK
    terms, deltas = (patterns.astype(np.uint32) << 16).view(np.float32), np.zeros(4 * BLOCK, np.float32)
    for i, place in enumerate(places):
        half[place : place + m], deltas[place : place + m] = patterns[i], terms[i]
    factors, base = np.array([0.3, -1.7, 0.9, 1.0])[:k], np.resize(terms[0], m)
    found, total = np.empty(BLOCK), np.zeros(m)
    with np.errstate(all="ignore"):
        for factor, term in zip(factors, terms.astype(np.float64), strict=True):
            total += factor * term
        total /= divisor
        expected = base.astype(np.float64) + 0.6 * total
    weigh_few(m, half, places, factors, divisor, found)
    assert same(found[:m], total)
    add_few(m, deltas, factors, divisor, base, 0.6, found)
    assert same(found[:m], expected)


def test_few_terms_are_two_to_four_of_bf16_whose_sum_divides_fast() -> None:
    for k in range(1, 6):
        codes, ones = np.full(k, BF16), np.ones(k)
        assert few_serve(codes, ones, 3.0) == (2 <= k <= 4)
        assert few_serve(codes, ones * 1e-200, 1.0) == (2 <= k <= 4)
        assert not few_serve(codes, ones * 1e-200, 3.0)
        assert not few_serve(np.array([*codes[1:], F32]), ones, 3.0)


# --- cuts and products


@pytest.mark.parametrize("share", [0.0, 0.02, 0.2, 1.0])
@pytest.mark.parametrize("n", [1, 63, 65, BLOCK])
def test_every_tie_is_settled(n: int, share: float) -> None:
    rng = np.random.default_rng(n)
    buffers = scratch()
    flags, limit = rng.random(n) < share, 1000 + n // 3
    buffers.at_threshold[:] = 1  # what a block before has left
    buffers.at_threshold[:n] = flags
    out = np.ones(n, np.float32)
    cut = np.array([INDEX, 0, limit, NO_CUT, 0, 0])
    removed = flags & (1000 + np.arange(n) >= limit)
    assert _settle_ties(1000, n, cut, np.zeros(4, np.uint32), out, buffers, False) == removed.sum()
    assert (out == np.where(removed, 0.0, 1.0)).all()


@pytest.mark.parametrize("threshold", [0, 1, 0x3F800000, 0x7F800000])
def test_the_cut_of_bf16_is_the_cut_of_the_difference(threshold: int) -> None:
    patterns, other = (one.ravel() for one in np.meshgrid(SPECIAL, SPECIAL))
    base = (other.astype(np.uint32) << 16).view(np.float32)
    with np.errstate(all="ignore"):
        delta = (patterns.astype(np.uint32) << 16).view(np.float32) - base
    for policy in (ABOVE, THIN):
        cut = np.array([policy, threshold, 0, NO_CUT, 0, 0])
        found, expected = np.empty((2, delta.size), np.float32)
        ties, expected_ties = np.empty((2, delta.size), np.uint8)
        kept = _cut_bf16(delta.size, patterns, base, cut, found, ties)
        assert kept == _cut_block(delta.size, cut, delta, expected, expected_ties)
        assert (ties == expected_ties).all()
        nan = np.isnan(expected)
        assert (np.isnan(found) == nan).all()
        assert (found[~nan].view(np.uint32) == expected[~nan].view(np.uint32)).all()


@pytest.mark.parametrize("k", [2, 3])
def test_products_are_added_in_eight_lanes_one_after_the_other(k: int) -> None:
    x = np.random.default_rng(k).normal(size=(k, BLOCK)) * 10.0 ** np.arange(k)[:, None]
    m = 501
    x[:, m:] = 0.0
    pairs = [(i, j) for i in range(k) for j in range(i, k)]
    lanes, expected = np.ones((2, len(pairs), 8))
    _add_products(k, m, x, lanes)
    for pair, (i, j) in enumerate(pairs):
        for line in range(0, m, 8):
            expected[pair] += x[i, line : line + 8] * x[j, line : line + 8]
    assert (lanes == expected).all()
