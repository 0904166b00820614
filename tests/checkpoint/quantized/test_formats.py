"""Every format is read to the values that it was built from, bit for bit, whole and in any cut."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from streammerge.checkpoint.index import open_model
from streammerge.formats.refs import SourceRef
from streammerge.io.reader import Reader
from streammerge.tensors.read import read_elements
from tests.checkpoint.quantized.formats import FORMATS, compressed, stored, write, write_entries
from tests.checkpoint.quantized.numbers import bytes_of, floats_of


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


def test_groups_have_formats_of_their_own(tmp_path: Path, reader: Reader) -> None:
    down, query = FORMATS["nvfp4"].modules
    names = {down: "nvfp4", query: "pack-quantized 4 bits"}
    tensors, values, groups = {}, {}, {}
    for module, name in names.items():
        some, found, declared = stored(name, 1, modules=(module,))
        tensors |= some
        values |= found
        settings = declared["quantization_config"]
        groups[name] = {**settings["config_groups"]["group_0"], "format": settings["format"]}
    groups["nvfp4"]["targets"] = ["Linear"]
    groups["pack-quantized 4 bits"]["targets"] = [r"re:.*self_attn\.(q|k)_proj$"]
    whole = {**settings, "format": "mixed-precision", "config_groups": groups}
    write_entries(tmp_path, tensors, {"quantization_config": whole})
    model = open_model(tmp_path)
    for module in names:
        want = values[f"{module}.weight"].reshape(-1)
        assert np.array_equal(read(reader, model[f"{module}.weight"], 0, want.size), want)


def test_a_list_of_groups_that_says_nothing_is_in_order(tmp_path: Path, reader: Reader) -> None:
    """As compressed-tensors wrote it where columns were not reordered."""
    tensors, values, declared = stored("pack-quantized 4 bits", 2)
    (module, _) = FORMATS["pack-quantized 4 bits"].modules
    tensors[f"{module}.weight_g_idx"] = ("I32", [64], b"\xff" * 256)
    write_entries(tmp_path, tensors, declared)
    want = values[f"{module}.weight"].reshape(-1)
    assert np.array_equal(read(reader, open_model(tmp_path)[f"{module}.weight"], 0, want.size), want)


def test_one_scale_serves_all_matrices_of_a_tensor(tmp_path: Path, reader: Reader) -> None:
    codes = np.random.default_rng(0).integers(-128, 128, (3, 4, 8))
    module = "model.layers.0.mlp.experts.down_proj"
    tensors = {
        f"{module}.weight": bytes_of(codes, "I8"),
        f"{module}.weight_scale": floats_of(np.array([0.5]), "F32")[0],
        f"{module}.weight_zero_point": bytes_of(np.array([[3]]), "I8"),
    }
    declared = compressed("int-quantized", num_bits=8, type="int", strategy="tensor", symmetric=False)
    write_entries(tmp_path, tensors, declared)
    found = read(reader, open_model(tmp_path)[f"{module}.weight"], 0, codes.size)
    assert np.array_equal(found, 0.5 * (codes.reshape(-1) - 3))


def test_modelopt_is_known_by_the_file_next_to_config_json(tmp_path: Path) -> None:
    tensors, values, _ = stored("nvfp4 modelopt")
    write_entries(tmp_path, tensors, {})
    (tmp_path / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "NVFP4"}}))
    assert set(open_model(tmp_path)) == set(values)
    assert open_model(tmp_path).stored_formats == {"modelopt NVFP4": 2}
