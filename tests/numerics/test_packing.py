"""Packed integers and codes of 4 bits: every width, order and cut as Python's own integers give them, compiled and not."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streammerge.numerics import packing
from streammerge.numerics.packing import NO_ZEROS, NONE, PAD, look_up, scale_integers, turned, unpacked

HOW = ("compiled", "numpy")
CHECKED = settings(max_examples=40, deadline=None)


def use(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    monkeypatch.setattr(packing, "is_compiled", lambda name: how == "compiled")


def lines_of(rng: np.random.Generator, lines: int, nbytes: int) -> np.ndarray:
    """Return random lines of bytes with something else behind them."""
    return rng.integers(0, 256, lines * nbytes + PAD, np.uint8)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("order", [(), (0, 4, 1, 5, 2, 6, 3, 7)])
def test_an_integer_is_the_bits_at_its_place(
    bits: int, order: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(bits)
    for n, skip in ((1, 0), (7, 0), (8, 8), (61, 5), (64, 29), (203, 64)):
        skip = skip // 8 * 8 if bits == 8 else skip
        n = n // 8 * 8 + 8 if order else n
        pitch = -(-(skip + n * bits) // 8) + 3
        raw = lines_of(rng, 3, pitch)
        want = []
        for line in range(3):
            number = int.from_bytes(raw[line * pitch : (line + 1) * pitch].tobytes(), "little") >> skip
            in_order = [number >> (bits * c) & ((1 << bits) - 1) for c in range(n)]
            want.append([in_order[c // 8 * 8 + order[c % 8]] for c in range(n)] if order else in_order)
        for how in HOW:
            use(monkeypatch, how)
            assert unpacked(raw, pitch, skip, bits, (3, n), order).tolist() == want


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("shape", [(1, 1), (3, 40), (33, 31), (64, 48)])
def test_a_matrix_is_turned(how: str, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, how)
    codes = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    assert np.array_equal(turned(codes), codes.T)


@CHECKED
@given(st.data())
def test_an_integer_less_its_zero_point_is_scaled_and_rounded_once(data: st.DataObject) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 1 << 32), "seed"))
    rows, columns = data.draw(st.tuples(st.integers(1, 5), st.integers(1, 150)), "shape")
    by_rows, by_columns = data.draw(st.sampled_from([(1, 16), (1, 32), (2, 7), (3, 1), (1, 200)]), "extent")
    row, column = data.draw(st.tuples(st.integers(0, 9), st.integers(0, 70)), "place")
    signed, with_zeros, listed = (data.draw(st.booleans(), what) for what in ("signed", "zeros", "listed"))
    divisor = data.draw(st.sampled_from([1, 127]), "divisor")
    groups = (
        (row + rows - 1) // by_rows - row // by_rows + 1,
        (column + columns - 1) // by_columns - column // by_columns + 1,
    )
    column_of = (column + np.arange(columns)) // by_columns - column // by_columns
    if listed:
        column_of = rng.integers(0, groups[1], columns)
    scales = np.ldexp(rng.uniform(1, 2, groups), rng.integers(-140, 127, groups)).astype(np.float32)
    zeros = rng.integers(-128, 257, groups).astype(np.float32) if with_zeros else NO_ZEROS
    pitch, out_pitch = columns + 3, columns + 5
    codes = rng.integers(0, 256, rows * pitch, np.uint8)
    numbers = codes.reshape(rows, pitch)[:, :columns].astype(np.int64)
    flip, offset = (128, -128) if signed else (0, -8)
    numbers = np.where(numbers > 127, numbers - 256, numbers) if signed else numbers + offset
    places = np.ix_((row + np.arange(rows)) // by_rows - row // by_rows, column_of)
    with np.errstate(over="ignore"):
        exact = (numbers - (zeros[places] if with_zeros else 0)) * scales[places].astype(np.float64) / divisor
        want = exact.astype(np.float32)
    for how in HOW:
        out = np.full(rows * out_pitch, 7, np.float32)
        with pytest.MonkeyPatch.context() as patch:
            use(patch, how)
            scale_integers(
                codes,
                pitch,
                flip,
                offset,
                zeros,
                scales,
                column_of if listed else NONE,
                (row, column),
                (rows, columns),
                (by_rows, by_columns),
                divisor,
                out,
                out_pitch,
            )
        found = out.reshape(rows, out_pitch)
        assert np.array_equal(found[:, :columns].view(np.uint32), want.view(np.uint32)), how
        assert (found[:, columns:] == 7).all()


@CHECKED
@given(
    st.integers(0, 200), st.integers(0, 1), st.sampled_from([2, 16, 64]), st.booleans(), st.integers(0, 99)
)
def test_a_code_is_looked_up_in_the_table_of_its_group(
    n: int, skip: int, group: int, high_first: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    before = int(rng.integers(0, group))
    n_groups = -(-(before + n) // group)
    tables = rng.standard_normal((9, 16)).astype(np.float32)
    rows = rng.integers(0, 9, n_groups).astype(np.int32)
    raw = rng.integers(0, 256, -(-(n + skip) // 2), np.uint8)
    halves = [
        half
        for byte in raw.tolist()
        for half in ((byte >> 4, byte & 15) if high_first else (byte & 15, byte >> 4))
    ]
    want = [tables[rows[(before + i) // group], halves[skip + i]] for i in range(n)]
    for how in HOW:
        out = np.empty(n, np.float32)
        with pytest.MonkeyPatch.context() as patch:
            use(patch, how)
            look_up(raw, skip, high_first, tables, rows, before, group, out)
        assert out.tolist() == want
