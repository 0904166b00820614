"""Codes for a device: steps cover a range once, fit their slot, and every quantised kind has them and a kernel."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streammerge.backends.fused.decoding import decoded_kinds, enqueue_decoding, value_bytes
from streammerge.backends.fused.specs import kernel_specs
from streammerge.checkpoint.refs.blocks import Block, BlocksRef
from streammerge.checkpoint.refs.codebooks import CodebookRef
from streammerge.checkpoint.refs.decoded import DecodedRef
from streammerge.checkpoint.refs.float8 import WidenedRef
from streammerge.checkpoint.refs.integers import Groups, IntegersRef, Packed
from streammerge.checkpoint.refs.quantized import Encoding, QuantizedRef, Scales
from streammerge.formats.refs import RenamedRef, SourceRef, TensorRef
from streammerge.tensors.coded.kinds import coded_kinds, coded_steps, floats, integers, is_coded, tables
from streammerge.tensors.coded.rectangles import cut, rectangles
from streammerge.tensors.integers import Rectangle
from streammerge.tensors.stacked import all_leaves, leaves


def stored(name: str, dtype: str, *shape: int) -> TensorRef:
    size = int(np.prod(shape, dtype=np.int64)) * {"U8": 1, "F8_E4M3": 1, "BF16": 2, "F32": 4, "I32": 4}[dtype]
    return TensorRef(name, dtype, shape, "file", 0, size)


def test_every_kind_that_is_decoded_on_the_way_is_decoded_by_a_device() -> None:
    named = {one.__name__ for base in (DecodedRef, CodebookRef) for one in base.__subclasses__()}
    assert named - {"CodebookRef"} | {"WidenedRef"} == {one.__name__ for one in coded_kinds()}
    described = {
        floats.ScaledFloats, floats.PlainFloats, integers.ScaledIntegers, tables.TwiceScaled, tables.Looked
    }  # fmt: skip
    assert described == decoded_kinds()


def test_a_tensor_that_only_has_a_different_name_is_decoded_too_and_others_are_not() -> None:
    plain = stored("w", "F8_E4M3", 4, 4)
    assert not is_coded(plain)
    assert is_coded(RenamedRef(WidenedRef(plain), "head"))
    assert not is_coded(WidenedRef(RenamedRef(plain, "other")))


@given(st.integers(1, 9), st.integers(1, 70), st.data())
def test_rectangles_cover_a_range_once_in_order(rows: int, columns: int, data: st.DataObject) -> None:
    start, stop = sorted(data.draw(st.tuples(*2 * [st.integers(0, 3 * rows * columns)])))
    found = [
        (one.matrix * rows + row) * columns + column
        for one in rectangles(start, stop, rows, columns)
        for row in range(one.row, one.end)
        for column in range(one.column, one.last)
    ]
    assert found == list(range(start, stop))


@given(st.integers(0, 90), st.integers(1, 200), st.integers(0, 90), st.integers(1, 200), st.booleans())
def test_a_cut_rectangle_is_the_same_elements(
    row: int, high: int, column: int, wide: int, turned: bool
) -> None:
    whole = Rectangle(2, row, row + high, column, column + wide)

    def divides(part: Rectangle) -> str | None:
        if part.shape[0] * part.shape[1] <= 1024:
            return None
        lines = part.shape[1] if turned else part.shape[0]
        return "lines" if lines > (32 if turned else 1) else "across"

    parts = list(cut(whole, divides, turned=turned))  # type: ignore[arg-type]
    seen = np.zeros((row + high, column + wide), int)
    for one in parts:
        seen[one.row : one.end, one.column : one.last] += 1
        inner = [one.column] * (one.column > column) + [one.row] * (turned and one.row > row)
        assert all(edge % 32 == 0 for edge in inner)  # whole words
    assert (seen[row:, column:] == 1).all()
    assert seen.sum() == high * wide


def scaled(shape: tuple[int, int], block: tuple[int, int]) -> QuantizedRef:
    grid = [-(-n // b) for n, b in zip(shape, block, strict=True)]
    scales = Scales(stored("s", "F32", *grid), "F32", (1, *grid), (1, *block))
    return QuantizedRef("w", shape, stored("w", "F8_E4M3", *shape), scales, Encoding("FP8", "F8_E4M3"))


def gptq(outputs: int, inputs: int, group: int, *, listed: bool) -> IntegersRef:
    words, n = stored("w", "I32", inputs // 8, outputs), inputs // group
    index = stored("g", "I32", inputs) if listed else None
    zeros = Packed(stored("z", "I32", n, outputs // 8), 4, outputs)
    return IntegersRef(
        "w", (outputs, inputs), Packed(words, 4, inputs, axis=0), stored("s", "BF16", n, outputs),
        Groups(group, 1, index), "GPTQ", zeros, transposed=True,
    )  # fmt: skip


def mxfp4(rows: int, columns: int) -> QuantizedRef:
    groups = columns // 32
    scales = Scales(stored("s", "U8", rows, groups), "F8_E8M0", (1, rows, groups), (1, 1, 32))
    encoding = Encoding("MXFP4", "F4_E2M1")
    return QuantizedRef("w", (rows, columns), stored("w", "U8", rows, columns // 2), scales, encoding)


LARGE: dict[str, tuple[SourceRef, float]] = {
    "fp8 blocks": (scaled((28672, 8192), (128, 128)), 1.01),
    "fp8 rows": (scaled((129280, 7168), (1, 7168)), 1.01),
    "mxfp4": (mxfp4(28672, 8192), 0.532),  # half a byte, and a byte for 32
    "gptq": (gptq(28672, 8192, 128, listed=False), 0.57),
    "gptq by index": (gptq(8192, 28672, 128, listed=True), 0.8),
    "plain": (WidenedRef(stored("w", "F8_E4M3", 28672, 8192)), 1.01),
}


@pytest.mark.parametrize("name", LARGE)
def test_a_large_tensor_takes_few_steps_of_little_more_than_its_codes(name: str) -> None:
    ref, most = LARGE[name]
    steps = list(coded_steps(ref, 0, ref.n_elements, 8 << 20))
    assert len(steps) <= ref.n_elements / (1 << 20)
    assert sum(step.nbytes for step in steps) <= most * ref.n_elements
    assert max(step.nbytes for step in steps) <= 8 << 20


def test_a_launch_has_an_argument_for_each_of_the_signature() -> None:
    known = [
        (floats.ScaledFloats("F8_E5M2", 1, 9, 2, (0, 1), (3, 4), (2, 5), (4, 1), powers=True), 2, 4),
        (floats.PlainFloats("F8_E4M3", 12), 1, 2),
        (integers.ScaledIntegers(64, 4, 3, 1, tuple(range(8)), False, 128, -128, 2, (0, 1), (3, 4), (1, 8), 1, 4), 4, 4),
        (tables.TwiceScaled(1, 3, 16, 0.5, True, 12), 2, 4),
        (tables.Looked(1, True, 3, 64, 12), 3, 4),
    ]  # fmt: skip
    assert {type(how) for how, _, _ in known} == decoded_kinds()

    class Launches:
        def launch(self, kernel: object, grid: tuple[int, int], arguments: tuple[int, ...]) -> None:
            assert kernel in kernel_specs().values()
            assert grid == (1, 1)
            kernel.parameters(arguments)  # type: ignore[attr-defined]

    for how, arrays, width in known:
        enqueue_decoding(Launches(), how, range(0, 256 * arrays, 256), 1 << 40)  # type: ignore[arg-type]
        assert value_bytes(how) == width


# --- stacked tensors


def test_a_range_of_a_stacked_tensor_is_ranges_of_its_parts() -> None:
    def part(name: str, *shape: int) -> RenamedRef:
        return RenamedRef(scaled((shape[0], shape[1]), (16, 16)), name)

    gates, ups = ([part(f"{which}{i}", 4, 6) for i in range(2)] for which in ("gate", "up"))
    blocks = [
        Block(one, 0, 6, 4 * row, 0, 4, 6) for row, one in enumerate([gates[0], ups[0], gates[1], ups[1]])
    ]
    stack = BlocksRef("experts", "F32", (2, 8, 6), tuple(blocks))
    assert list(leaves(stack, 20, 50)) == [
        (gates[0], 20, 24, 0),
        (ups[0], 0, 24, 4),
        (gates[1], 0, 2, 28),
    ]
    assert list(all_leaves(RenamedRef(stack, "other"))) == [gates[0], ups[0], gates[1], ups[1]]
    cut_out = BlocksRef("up 1", "F32", (4, 6), (Block(stack, 72, 6, 0, 0, 4, 6),))  # of the second expert
    assert list(leaves(cut_out, 3, 24)) == [(ups[1], 3, 24, 0)]

    plain = stored("w", "BF16", 4, 6)
    assert list(leaves(plain, 2, 9)) == [(plain, 2, 9, 0)]
    for other in (
        Block(gates[0], 0, 12, 0, 0, 2, 6),  # every second row
        Block(gates[0], 0, 4, 0, 0, 6, 6, transposed=True),
        Block(plain, 0, 6, 0, 0, 4, 6),  # of a different dtype
    ):
        whole = BlocksRef("w", "F32", (other.rows, 6), (other,))
        assert list(leaves(whole, 0, 12)) == [(whole, 0, 12, 0)]
