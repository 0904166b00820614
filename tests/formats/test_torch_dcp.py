"""torch.distributed.checkpoint: what torch wrote is read as torch wrote it, whoever wrote which part where."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from streammerge.checkpoint.index import open_model
from streammerge.errors import ModelError
from streammerge.formats.torch_dcp import open_dcp
from streammerge.io.reader import Reader
from streammerge.tensors.read import read_elements
from tests.formats.dcp_files import HOSTILE, grid, write_dcp
from tests.formats.dcp_processes import full

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with what two processes wrote."""
    directory = tmp_path_factory.mktemp("two")
    command = [sys.executable, "-m", "tests.formats.dcp_processes", str(directory)]
    subprocess.run(command, check=True, capture_output=True, cwd=Path(__file__).parents[2])
    return directory


def assert_holds(directory: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Compare every element that is read of a checkpoint, in one read and in many, with tensors."""
    index = open_model(str(directory))
    assert set(index) == set(tensors)
    reader = Reader()
    for name, tensor in tensors.items():
        ref, expected = index[name], tensor.contiguous().view(WORDS[tensor.element_size()]).numpy().tobytes()
        assert ref.shape == tuple(tensor.shape)
        assert read_elements(reader, ref, 0, ref.n_elements).tobytes() == expected
        cuts = [0, *range(1, ref.n_elements, 5), ref.n_elements]
        parts = [read_elements(reader, ref, *pair).tobytes() for pair in itertools.pairwise(cuts)]
        assert b"".join(parts) == expected
    reader.close()


@pytest.mark.parametrize("kind", ["two", "two-safetensors"])
def test_what_two_processes_wrote_is_whole(kind: str, two: Path) -> None:
    assert_holds(two / kind, full())


def test_state_of_optimizers_and_entries_that_are_no_tensors_are_left_out_and_named(two: Path) -> None:
    notes = " ".join(open_model(str(two / "two")).notes)
    assert "holds 'optimizer (2 entries)', 'step' beside the weights, which are left out" in notes


def test_what_one_process_wrote_is_whole(tmp_path: Path) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.filesystem import FileSystemWriter, SerializationFormat

    tensors = {
        "w": torch.randn(4, 6),
        "half": torch.randn(6, 2).bfloat16(),
        "scalar": torch.tensor(3.0, dtype=torch.float64),
        "whole": torch.arange(5),
        "turned": torch.randn(3, 8).t(),
        "none": torch.zeros(0, 3),
        "float8": torch.randn(4, 4).to(torch.float8_e4m3fn),
    }
    state = {"model": tensors, "optimizer": {"state": {"w": {"step": torch.tensor(1.0)}}}, "step": 7}
    dcp.save(state, checkpoint_id=tmp_path / "one", no_dist=True)
    named = {f"model.{name}": tensor for name, tensor in tensors.items() if name != "float8"}
    index = open_model(str(tmp_path / "one"))
    assert set(index) == {*named, "model.float8"}
    reader = Reader()
    for name, tensor in named.items():
        data = read_elements(reader, index[name], 0, index[name].n_elements)
        assert data.tobytes() == tensor.contiguous().view(WORDS[tensor.element_size()]).numpy().tobytes()
    assert index["model.float8"].stored.dtype == "F8_E4M3"
    writer = FileSystemWriter(tmp_path / "safe", serialization_format=SerializationFormat.SAFETENSORS)
    some = {name: tensors[name] for name in ("w", "half", "whole")}
    dcp.save({**some, "step": 7}, storage_writer=writer, no_dist=True)  # the number lies before the tensors
    assert_holds(tmp_path / "safe", some)


CUTS: dict[str, Callable[[], Any]] = {
    "rows": lambda: grid((8, 6), (3, 4), ()),
    "columns": lambda: grid((8, 6), (), (1, 5)),
    "both": lambda: grid((8, 6), (2, 5), (3,)),
    "no grid": lambda: [((0, 0), (8, 2)), ((0, 2), (3, 4)), ((3, 2), (5, 3)), ((3, 5), (5, 1))],
    "replicated": lambda: [*grid((8, 6), (4,), ()), *grid((8, 6), (4,), ())],
    "nothing for one process": lambda: [*grid((8, 6), (8,), ())],
    "from the last to the first": lambda: grid((8, 6), (2, 5), (3,))[::-1],
}


@pytest.mark.parametrize("cut", CUTS)
def test_any_cut_is_put_together_and_torch_agrees(cut: str, tmp_path: Path) -> None:
    import torch.distributed.checkpoint as dcp

    tensors = {"w": torch.randn(8, 6), "n": torch.randn(6).half()}
    write_dcp(tmp_path, tensors, {"w": CUTS[cut]()}, n_files=3)
    assert_holds(tmp_path, tensors)
    if cut != "replicated":  # which the torch of today does not write
        loaded = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
        dcp.load(loaded, checkpoint_id=tmp_path, no_dist=True)
        assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_every_file_that_is_read_has_its_stamp(two: Path) -> None:
    contents = open_dcp(two / "two" / ".metadata")
    names = [Path(stamp.path).name for stamp in (contents.stamp, *contents.more_stamps)]
    assert names == [".metadata", "__0_0.distcp", "__1_0.distcp"]
    digests = {stamp.header_digest for stamp in contents.more_stamps}
    assert len(digests) == 2
    assert "" not in digests


def test_the_directory_of_accelerate_is_found(tmp_path: Path) -> None:
    write_dcp(tmp_path / "checkpoint-5" / "pytorch_model_fsdp_0", {"model.w": torch.ones(3)})
    write_dcp(tmp_path / "checkpoint-5" / "optimizer_0", {"state.w.exp_avg": torch.ones(3)})
    assert set(open_model(str(tmp_path / "checkpoint-5"))) == {"model.w"}


def test_megatron_of_torch_dist_is_read(tmp_path: Path) -> None:
    tensors = {"decoder.layers.mlp.linear_fc1.weight": torch.randn(2, 4, 3)}
    write_dcp(tmp_path, tensors, change=lambda metadata: setattr(metadata, "mcore_data", {"decoder": {}}))
    (tmp_path / "metadata.json").write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')
    torch.save({"args": 1}, tmp_path / "common.pt")
    assert_holds(tmp_path, tensors)


def test_a_checkpoint_of_megatron_in_zarr_is_named(tmp_path: Path) -> None:
    (tmp_path / "metadata.json").write_text('{"sharded_backend": "zarr"}')
    (tmp_path / "common.pt").write_bytes(b"")
    with pytest.raises(ModelError, match="Megatron in its format 'zarr': only torch_dist is read"):
        open_model(str(tmp_path))


def test_a_chunk_that_its_file_lost_is_refused(tmp_path: Path) -> None:
    """torch keeps one chunk of a name in a file of safetensors, and says of more that they lie there."""
    from safetensors.torch import save_file

    def change(metadata: Any) -> None:
        for info in metadata.storage_data.values():
            info.offset, info.length, info.relative_path = 0, 24, "__0_0.distcp"

    write_dcp(tmp_path, {"w": torch.randn(4, 3)}, {"w": grid((4, 3), (2,), ())}, change=change)
    about = {"DCP_SHARDING_INFO": '{"w": {"saved_offsets": [2, 0]}}'}
    save_file({"w": torch.randn(2, 3)}, tmp_path / "__0_0.distcp", metadata=about)
    with pytest.raises(ModelError, match=r"holds its chunk at \[2, 0\], not the one at \[0, 0\]"):
        open_model(str(tmp_path))


@pytest.mark.parametrize(("build", "words"), [pytest.param(b, w, id=what) for what, b, w in HOSTILE])
def test_what_no_torch_writes_is_refused(build: Callable[[Path], object], words: str, tmp_path: Path) -> None:
    build(tmp_path)
    with pytest.raises(ModelError) as refused:
        open_model(str(tmp_path))
    assert words in str(refused.value)
    assert not Path("/tmp/harm").exists()


def test_many_chunks_are_compared_in_little_time(tmp_path: Path) -> None:
    shape = (32, 32)
    cut = grid(shape, range(1, 32), range(1, 32))
    tensors = {"w": torch.from_numpy(np.arange(1024, dtype=np.float32).reshape(shape))}
    write_dcp(tmp_path, tensors, {"w": cut})
    ref = open_model(str(tmp_path))["w"]
    assert ref.n_blocks == 1024
    assert read_elements(Reader(), ref, 100, 900).view(np.float32).tolist() == list(range(100, 900))
