"""Every format is read to the values that it was built from, bit for bit, whole and in any cut."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from streammerge.checkpoint.index import open_model
from streammerge.formats.refs import SourceRef
from streammerge.io.reader import Reader
from streammerge.tensors.read import read_elements
from tests.checkpoint.quantized.formats import FORMATS, write


@pytest.fixture
def reader() -> Iterator[Reader]:
    made = Reader()
    yield made
    made.close()


def read(reader: Reader, ref: SourceRef, start: int, stop: int) -> np.ndarray:
    return read_elements(reader, ref, start, stop).view(np.float32)


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_is_read_to_the_values_that_it_stands_for(name: str, tmp_path: Path, reader: Reader) -> None:
    values = write(tmp_path, name)
    model = open_model(tmp_path)
    assert model.quantization is None
    assert set(model) == set(values)
    rng = np.random.default_rng(1)
    for logical in values.keys() - {"model.norm.weight"}:
        ref, want = model[logical], values[logical].reshape(-1)
        assert (ref.shape, ref.dtype) == (values[logical].shape, "F32")
        assert ref.stored_format
        assert np.array_equal(read(reader, ref, 0, want.size).view(np.uint32), want.view(np.uint32))
        for _ in range(12):
            start, stop = sorted(rng.integers(0, want.size + 1, 2))
            found = read(reader, ref, int(start), int(stop))
            assert np.array_equal(found.view(np.uint32), want[start:stop].view(np.uint32)), (start, stop)


LARGE = (
    "pack-quantized g_idx",
    "gptq by index",
    "awq",
    "nvfp4",
    "nf4 nested",
    "int-quantized asymmetric",
    "gptq 3 bits",
)


@pytest.mark.parametrize("name", LARGE)
def test_what_is_decoded_in_several_steps_is_the_same(name: str, tmp_path: Path, reader: Reader) -> None:
    made = FORMATS[name]
    rows, columns = (640, 480) if name != "nf4 nested" else (641, 479)
    values = write(tmp_path, name, rows=rows, columns=columns)
    model = open_model(tmp_path)
    for logical in (f"{made.modules[0]}.weight",):
        want = values[logical].reshape(-1)
        for start, stop in ((0, want.size), (1, want.size - 1), (123_457, 123_459), (70_001, 201_003)):
            found = read(reader, model[logical], start, stop)
            assert np.array_equal(found.view(np.uint32), want[start:stop].view(np.uint32))
