"""The layout: offsets and headers of shards, byte for byte those that safetensors writes."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from streammerge.api import merge
from streammerge.dtypes import BITS, itemsize
from streammerge.planning.layout import lay_out
from tests.conftest import write_model
from tests.planning.jobs import make_job

# --- the layout

ALL_DTYPES = [
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.uint16,
    torch.int32,
    torch.uint32,
    torch.int64,
    torch.uint64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e8m0fnu,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
    torch.complex64,
]


def tensors_of_all_dtypes() -> dict[str, torch.Tensor]:
    rng = np.random.default_rng(0)
    tensors = {}
    for dtype in ALL_DTYPES:
        for shape in [(), (3,), (5, 7), (0, 4), (2, 1, 3)]:
            n = math.prod(shape)
            if n == 0:
                flat = torch.empty(0, dtype=dtype)
            elif dtype == torch.bool:
                flat = torch.from_numpy(rng.integers(0, 2, n).astype(bool))
            elif dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
                flat = torch.from_numpy(rng.standard_normal(n)).to(dtype)
            else:
                width = torch.empty(0, dtype=dtype).element_size()
                flat = torch.from_numpy(rng.integers(0, 256, n * width, dtype=np.uint8)).view(dtype)
            name = f"é{'x' * n}.{str(dtype).removeprefix('torch.')}.{len(shape)}"
            tensors[name] = flat.reshape(shape).clone()
    return tensors


def test_a_shard_is_byte_for_byte_what_safetensors_writes_for_every_dtype(tmp_path: Path) -> None:
    model = write_model(tmp_path / "in", tensors_of_all_dtypes())
    merge({"merge_method": "passthrough", "models": [{"model": str(model)}]}, tmp_path / "out", memory="1GiB")
    written = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert written == (model / "model.safetensors").read_bytes()


@pytest.mark.parametrize("shard_size", [1, 100, 400, 1000])
def test_each_of_many_shards_is_what_safetensors_writes_too(shard_size: int, tmp_path: Path) -> None:
    tensors = tensors_of_all_dtypes()
    model = write_model(tmp_path / "in", tensors)
    merge(
        {"merge_method": "passthrough", "models": [{"model": str(model)}]},
        tmp_path / "out",
        memory="1GiB",
        shard_size=shard_size,
    )
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 1
    assert sorted(index["weight_map"]) == sorted(tensors)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    for shard in shards:
        held = load_file(shard)
        assert {name for name, place in index["weight_map"].items() if place == shard.name} == set(held)
        assert (
            sum(t.nbytes for t in held.values()) <= shard_size
            or len([t for t in held.values() if t.nbytes]) == 1
        )
        save_file(held, tmp_path / "again.safetensors", metadata={"format": "pt"})
        assert (tmp_path / "again.safetensors").read_bytes() == shard.read_bytes()


NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(
    lambda name: name != "__metadata__"
)


@given(
    st.dictionaries(
        NAMES,
        st.tuples(
            st.sampled_from(sorted(d for d in BITS if BITS[d] >= 8)), st.lists(st.integers(0, 9), max_size=3)
        ),
        min_size=1,
        max_size=12,
    ),
    st.integers(1, 3000),
)
@settings(max_examples=100, deadline=None)
def test_offsets_are_contiguous_and_headers_parse(
    tensors: dict[str, tuple[str, list[int]]], shard_size: int
) -> None:
    jobs = [
        make_job(i, tuple(shape), 1, dtype, "copy", has_base=False, name=name)
        for i, (name, (dtype, shape)) in enumerate(tensors.items())
    ]
    layout = lay_out(jobs, shard_size)
    assert sorted(part for shard in layout.shards for part in shard.parts) == [
        (i, 0) for i in range(len(jobs))
    ]
    for number, shard in enumerate(layout.shards):
        length = int.from_bytes(shard.header[:8], "little")
        assert len(shard.header) == 8 + length
        assert length % 8 == 0
        header = json.loads(shard.header[8:])
        assert header.pop("__metadata__") == {"format": "pt"}
        position = len(shard.header)
        for ordinal, part in shard.parts:
            job, slot = jobs[ordinal], layout.slots[ordinal][part]
            assert (slot.shard, slot.offset, slot.nbytes) == (number, position, job.output_bytes)
            begin = position - len(shard.header)
            assert header.pop(job.name) == {
                "dtype": job.dtype,
                "shape": list(job.shape),
                "data_offsets": [begin, begin + slot.nbytes],
            }
            assert slot.offset % min(8, itemsize(job.dtype)) == 0 or job.output_bytes == 0
            position += slot.nbytes
        assert header == {}
        assert shard.nbytes == position
        filled = position - len(shard.header)
        assert filled <= shard_size or sum(jobs[o].output_bytes > 0 for o, _ in shard.parts) == 1
