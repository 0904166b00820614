"""Tensors that torch saved, in any order of elements and any wrapping, read equal to what torch loads."""

from __future__ import annotations

import argparse
import collections
import io
import math
import pathlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streammerge.errors import ModelError
from streammerge.formats.strided_refs import StridedRef
from streammerge.formats.torch_file import open_pickle, read_pickle
from streammerge.io.reader import Reader
from streammerge.tensors import strided
from streammerge.tensors.read import read_elements, read_source
from streammerge.tensors.strided import boxes

DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.int8, torch.bool, torch.complex64, torch.int32]
YOUNG = [torch.float8_e4m3fn, torch.uint16]


def own_bytes(value: torch.Tensor) -> bytes:
    flat = torch.empty(value.numel(), dtype=value.dtype)
    flat.copy_(value.detach().reshape(-1))
    return bytes(flat.view(torch.uint8).numpy().tobytes()) if flat.numel() else b""


@st.composite
def views(draw: st.DrawFn) -> torch.Tensor:
    """A tensor cut, turned, strided or repeated out of a storage."""
    dtype = draw(st.sampled_from([*DTYPES, *YOUNG]))
    shape = draw(st.lists(st.integers(1, 7), min_size=1, max_size=4))
    x = torch.arange(math.prod(shape)).remainder(100).float().reshape(shape).to(dtype)
    for _ in range(draw(st.integers(0, 3))):
        axis = draw(st.integers(0, x.dim() - 1))
        match draw(st.sampled_from(["turn", "cut", "step", "expand", "window"])):
            case "turn":
                x = x.permute(draw(st.permutations(range(x.dim()))))
            case "cut":
                first = draw(st.integers(0, x.shape[axis]))
                x = x.narrow(axis, first, draw(st.integers(0, x.shape[axis] - first)))
            case "step":
                x = x[(slice(None),) * axis + (slice(None, None, draw(st.integers(1, 3))),)]
            case "expand":
                x = x.unsqueeze(axis).expand(*x.shape[:axis], draw(st.integers(1, 3)), *x.shape[axis:])
            case "window" if x.shape[axis] > 1:
                x = x.unfold(axis, 2, 1)
    return x


@settings(max_examples=150, deadline=None)
@given(
    tensors=st.lists(views(), min_size=1, max_size=4),
    new=st.booleans(),
    wrapper=st.sampled_from([None, "state_dict", "model", "module", "anything"]),
    data=st.data(),
)
def test_whatever_torch_saves_is_read_as_torch_reads_it(
    tmp_path_factory: pytest.TempPathFactory,
    tensors: list[torch.Tensor],
    new: bool,
    wrapper: str | None,
    data: st.DataObject,
) -> None:
    path = tmp_path_factory.getbasetemp() / "views.pt"
    new = new or any(x.dtype in YOUNG for x in tensors)  # Torch cannot read these from its old format.
    state = {f"t{i}": x for i, x in enumerate(tensors)}
    content = state if wrapper is None else {wrapper: state}
    torch.save(content, path, _use_new_zipfile_serialization=new)
    loaded = torch.load(path, weights_only=True)
    refs, _ = read_pickle(path)
    reader = Reader("read")
    assert refs.keys() == state.keys()
    for name in state:
        ref = refs[name]
        want = own_bytes((loaded if wrapper is None else loaded[wrapper])[name])
        assert ref.shape == tuple(state[name].shape)
        assert read_elements(reader, ref, 0, ref.n_elements).tobytes() == want
        first = data.draw(st.integers(0, ref.n_elements))
        last = data.draw(st.integers(first, ref.n_elements))
        width = len(want) // max(1, ref.n_elements)
        assert read_elements(reader, ref, first, last).tobytes() == want[first * width : last * width]
    reader.close()


@settings(max_examples=200, deadline=None)
@given(shape=st.lists(st.integers(1, 5), max_size=5), data=st.data())
def test_boxes_hold_every_element_of_a_range_once_and_in_order(shape: list[int], data: st.DataObject) -> None:
    n = math.prod(shape)
    start = data.draw(st.integers(0, n))
    stop = data.draw(st.integers(start, n))
    index = np.arange(n).reshape(shape)
    found = [index[tuple(slice(a, b) for a, b in box)].reshape(-1) for box in boxes(shape, start, stop)]
    assert np.concatenate([[], *found]).tolist() == list(range(start, stop))
    assert len(found) <= 2 * max(1, len(shape))


@pytest.mark.parametrize("block", [64, 200, 1 << 20])
@pytest.mark.parametrize("gap", [0, 32, 1 << 14])
def test_blocks_and_gaps_change_no_element(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, block: int, gap: int
) -> None:
    x = torch.arange(7 * 8 * 9 * 10, dtype=torch.int32).reshape(7, 8, 9, 10)
    state = {"turned": x.permute(3, 1, 0, 2), "steps": x[::2, 1:, ::3, 3], "flat": x.reshape(56, 90).T}
    torch.save(state, tmp_path / "x.pt")
    monkeypatch.setattr(strided, "STRIDED_BLOCK", block)
    monkeypatch.setattr(strided, "_GAP_BYTES", gap)
    reader = Reader("read")
    for name, ref in read_pickle(tmp_path / "x.pt")[0].items():
        assert isinstance(ref, StridedRef)
        want = own_bytes(state[name])
        for first, last in [(0, ref.n_elements), (1, 2), (13, 79), (ref.n_elements - 5, ref.n_elements)]:
            slot, room = np.zeros(4 * (last - first), np.uint8), np.zeros(ref.scratch_bytes, np.uint8)
            assert read_source(reader, ref, first, last, slot, room) == 0
            assert slot.tobytes() == want[4 * first : 4 * last], (name, first, last)


def test_elements_may_begin_at_any_byte_of_a_file(tmp_path: pathlib.Path) -> None:
    x = torch.arange(1001, dtype=torch.float32)
    torch.save({"w": x.as_strided((3, 4), (1, 250), 1), "b": torch.ones(1)}, tmp_path / "x.pt")
    ref = read_pickle(tmp_path / "x.pt")[0]["w"]
    raw = (tmp_path / "x.pt").read_bytes()
    (tmp_path / "y").write_bytes(b"odd" + raw)
    assert isinstance(ref, StridedRef)
    source = replace(ref.source, path=str(tmp_path / "y"), offset=ref.source.offset + 3)
    odd = StridedRef(source, ref.shape, ref.strides)
    target = np.zeros(49, np.uint8)[1:]
    read_source(Reader("read"), odd, 0, 12, target, np.zeros(odd.scratch_bytes, np.uint8))
    assert target.tobytes() == own_bytes(x.as_strided((3, 4), (1, 250), 1))


class Callback:
    """The objects that a trainer keeps next to its weights."""

    def __init__(self) -> None:
        self.settings = {
            "a": [1, 2.5, None],
            3: {4, 5},
            "raw": b"x" * 300,
            "path": pathlib.PurePosixPath("a/b"),
        }


def trainer_state(weights: dict[str, torch.Tensor], key: str) -> dict[str, object]:
    """A checkpoint as trainers write it: the weights among objects of all kinds."""
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([parameter])
    parameter.sum().backward()
    optimizer.step()
    return {
        key: weights,
        "epoch": 3,
        "lr_schedulers": [],
        "callbacks": {"early": Callback()},
        0: "a key of no text",
        "optimizer_states": [optimizer.state_dict()],
        "hyper_parameters": argparse.Namespace(lr=1e-3, names=("a",)),
        "text": "long " * 10_000,
        "count": 2**200,
        "losses": collections.defaultdict(list, a=[0.5]),
        "random": np.random.default_rng(1).bit_generator.state,
        "frozen": frozenset({1}),
        "array": np.ones(3),
        "dtype": torch.bfloat16,
        "device": torch.device("cpu"),
        "generator": torch.get_rng_state(),
    }


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("new", [True, False])
@pytest.mark.parametrize("key", ["state_dict", "model", "module", "model_state_dict"])
def test_what_trainers_keep_beside_the_weights_is_passed_over(
    tmp_path: pathlib.Path, protocol: int, new: bool, key: str
) -> None:
    weights = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2)).state_dict()
    state = trainer_state(weights, key)
    torch.save(state, tmp_path / "x.ckpt", pickle_protocol=protocol, _use_new_zipfile_serialization=new)
    file = open_pickle(tmp_path / "x.ckpt")
    assert file.refs.keys() == weights.keys()
    assert set(file.left_out) == {k for k in state if k not in (key, 0)}
    reader = Reader("read")
    for name, ref in file.refs.items():
        assert read_elements(reader, ref, 0, ref.n_elements).tobytes() == own_bytes(weights[name])


class Marked(torch.Tensor):
    """A subclass as some libraries have them."""


def test_attributes_and_classes_of_tensors_are_passed_over(tmp_path: pathlib.Path) -> None:
    marked, parameter = torch.ones(2, 3), torch.nn.Parameter(torch.rand(3, 2).T)
    marked.ds_id = 3  # type: ignore[attr-defined]
    parameter.owner = Callback()  # type: ignore[attr-defined]
    own = torch.rand(4).as_subclass(Marked)
    own.note = "x"  # type: ignore[attr-defined]
    state = {"a": marked, "b": parameter, "c": own, "d": torch.nn.Parameter(torch.ones(1)), "e": None}
    state["x._extra_state"] = state.pop("e")
    for new in (True, False):
        torch.save(state, tmp_path / "x.bin", _use_new_zipfile_serialization=new)
        file = open_pickle(tmp_path / "x.bin")
        assert file.left_out == ("x._extra_state",)
        assert {name: ref.shape for name, ref in file.refs.items()} == {
            "a": (2, 3),
            "b": (2, 3),
            "c": (4,),
            "d": (1,),
        }


def test_nested_wrappers_are_unwrapped_and_a_second_set_of_weights_is_named(tmp_path: pathlib.Path) -> None:
    weights = {"w": torch.ones(2)}
    torch.save(
        {"model": {"state_dict": weights, "step": 1}, "model_ema": {"w": torch.zeros(2)}}, tmp_path / "x.pt"
    )
    file = open_pickle(tmp_path / "x.pt")
    assert list(file.refs) == ["w"]
    assert file.left_out == ("model_ema", "step")


def test_a_tensor_that_is_expanded_beyond_its_file_is_refused(tmp_path: pathlib.Path) -> None:
    torch.save({"w": torch.ones(1).expand(1 << 20)}, tmp_path / "x.pt")
    with pytest.raises(ModelError, match=r"a view of 4194304 bytes upon 4 \(stride 0\): save it contiguous"):
        read_pickle(tmp_path / "x.pt")


def test_an_old_file_of_many_tensors_is_read_on_as_far_as_needed(tmp_path: pathlib.Path) -> None:
    state = {f"layers.{i}.weight": torch.full((3,), i) for i in range(6000)}
    buffer = io.BytesIO()
    torch.save(state, buffer, _use_new_zipfile_serialization=False)
    assert len(buffer.getvalue()) > 1 << 19
    (tmp_path / "x.pt").write_bytes(buffer.getvalue())
    refs, _ = read_pickle(tmp_path / "x.pt")
    raw = buffer.getvalue()
    assert all(raw[ref.offset : ref.offset + 24] == own_bytes(state[name]) for name, ref in refs.items())
