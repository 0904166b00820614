"""Tensors put together from chunks: any range of any cut holds what the tensor holds."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streammerge.formats.refs import TensorRef
from streammerge.formats.sharded_refs import Chunk, ShardedRef
from streammerge.formats.strided_refs import StridedRef
from streammerge.io.reader import Reader
from streammerge.tensors import strided
from streammerge.tensors.read import read_elements, read_source
from tests.formats.dcp_files import grid


@st.composite
def cut_tensors(
    draw: st.DrawFn,
) -> tuple[np.ndarray, list[tuple[tuple[int, ...], tuple[int, ...]]], list[bool]]:
    """A tensor, a cut of it, and of each chunk whether its axes lie the other way round in the file."""
    shape = tuple(draw(st.lists(st.integers(1, 6), max_size=4)))
    bounds = [sorted(draw(st.sets(st.integers(1, size - 1)))) if size > 1 else [] for size in shape]
    cut = list(grid(shape, *bounds))
    tensor = np.arange(math.prod(shape), dtype=np.uint16).reshape(shape)
    return tensor, cut, [draw(st.booleans()) for _ in cut]


@settings(max_examples=60, deadline=None)
@given(case=cut_tensors(), data=st.data())
def test_any_range_of_any_cut_holds_what_the_tensor_holds(
    case: tuple, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    tensor, cut, turned = case
    path = tmp_path_factory.mktemp("cut") / "file"
    ref = write_chunks(path, tensor, cut, turned)
    start = data.draw(st.integers(0, tensor.size))
    stop = data.draw(st.integers(start, tensor.size))
    reader = Reader()
    found = read_elements(reader, ref, start, stop).view(np.uint16)
    np.testing.assert_array_equal(found, tensor.reshape(-1)[start:stop])
    covered = np.zeros(tensor.size, bool)
    for lies, first, last in ref.extents(start, stop):
        raw = read_elements(reader, lies, first, last).view(np.uint16)
        covered[raw] = True
    assert covered[start:stop].all()
    reader.close()


def write_chunks(path: Path, tensor: np.ndarray, cut: list, turned: list[bool]) -> ShardedRef:
    """Write chunks one behind the other, with odd bytes between; return the tensor that they are."""
    raw, chunks = b"", []
    for (begins, sizes), turn in zip(cut, turned, strict=True):
        part = tensor[tuple(slice(b, b + s) for b, s in zip(begins, sizes, strict=True))]
        raw += b"\xff" * (len(chunks) % 3)
        lies = TensorRef("w", "U16", sizes, str(path), len(raw), part.nbytes)
        raw += np.ascontiguousarray(part.T if turn else part).tobytes()
        if turn and part.ndim > 1:
            stretch = TensorRef("w", "U16", (part.size,), str(path), lies.offset, part.nbytes)
            strides = tuple(math.prod(sizes[:axis]) for axis in range(len(sizes)))
            chunks.append(Chunk.of(begins, sizes, StridedRef(stretch, sizes, strides), tensor.shape))
        else:
            chunks.append(Chunk.of(begins, sizes, lies, tensor.shape))
    path.write_bytes(raw)
    return ShardedRef("w", "U16", tensor.shape, tuple(chunks))


def test_a_large_chunk_is_read_block_by_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strided, "STRIDED_BLOCK", 64)
    tensor = np.arange(60 * 50, dtype=np.uint16).reshape(60, 50)
    ref = write_chunks(
        tmp_path / "file", tensor, list(grid((60, 50), (7,), (20,))), [False, True, False, True]
    )
    found = read_elements(Reader(), ref, 3, 2_900).view(np.uint16)
    np.testing.assert_array_equal(found, tensor.reshape(-1)[3:2_900])


def test_what_one_chunk_holds_in_a_row_is_read_past_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensor = np.arange(1000, dtype=np.uint16).reshape(10, 100)
    ref = write_chunks(tmp_path / "file", tensor, list(grid((10, 100), (4,), ())), [False, False])
    reader, slots = Reader(), []
    monkeypatch.setattr(
        reader,
        "read_slot",
        lambda *place, **how: (
            slots.append(place[:3]) or reader.read_into(*place[:2], place[3][: place[2]]) or 0
        ),
    )
    slot = np.empty(4096, np.uint8)
    for start, stop in ((10, 300), (450, 900), (350, 450)):
        begin = read_source(reader, ref, start, stop, slot, np.empty(ref.scratch_bytes, np.uint8))
        found = slot[begin : begin + 2 * (stop - start)].view(np.uint16)
        np.testing.assert_array_equal(found, tensor.reshape(-1)[start:stop])
    assert len(slots) == 2
