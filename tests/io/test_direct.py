"""I/O past the page cache gives the bytes that I/O through it gives, and leaves the cache as it was."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from streammerge.api import merge, plan
from streammerge.errors import WorldError
from streammerge.io import direct
from streammerge.io.pages import DIRECT_BYTES, PAGE, slot_bytes
from streammerge.io.reader import Reader
from streammerge.output.place import place_of
from streammerge.output.shards import ShardWriter
from streammerge.planning.layout import Layout, Shard
from streammerge.planning.memory.buffers import divide
from tests.conftest import config_for

SHAPES = {"a.weight": (700, 1031), "b.bias": (13,), "c.weight": (1201, 997), "d.weight": (64, 64)}
"""Sizes that put every tensor but the first at odd places of a page."""


def paged(nbytes: int, fill: int = 0xEE) -> np.ndarray:
    buffer = np.frombuffer(mmap.mmap(-1, nbytes), np.uint8)
    buffer[:] = fill
    return buffer


def has_direct(path: Path) -> bool:
    descriptor = os.open(path, os.O_RDONLY)
    again = direct.open_direct(descriptor, os.O_RDONLY)
    os.close(descriptor)
    if again is not None:
        os.close(again)
    return again is not None


def forget(path: Path) -> float:
    """Write a file back, drop it from the page cache, and return which share stayed there."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return direct.cached_share(file.fileno(), 0, path.stat().st_size)


def share(path: Path) -> float:
    with open(path, "rb") as file:
        return direct.cached_share(file.fileno(), 0, path.stat().st_size)


@pytest.fixture(scope="module")
def noise(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("direct") / "noise"
    path.write_bytes(np.random.default_rng(0).bytes(4 * DIRECT_BYTES + 1234))
    return path


@given(
    st.integers(0, DIRECT_BYTES), st.integers(DIRECT_BYTES, 3 * DIRECT_BYTES), st.booleans(), st.booleans()
)
def test_a_slot_holds_the_range_and_nothing_beyond_it_is_touched(
    noise: Path, offset: int, nbytes: int, cached: bool, again: bool
) -> None:
    if not cached:
        forget(noise)
    nbytes = min(nbytes, noise.stat().st_size - offset)
    slot = paged(slot_bytes(nbytes) + PAGE)
    reader = Reader(cache_bytes=again * 10 * DIRECT_BYTES)
    for more in (True, False) if again else (False,):
        begins = reader.read_slot(os.fspath(noise), offset, nbytes, slot, again=more)
        assert begins in (0, offset % PAGE)
        assert slot[begins : begins + nbytes].tobytes() == noise.read_bytes()[offset : offset + nbytes]
        assert (slot[slot_bytes(nbytes) :] == 0xEE).all()
    reader.close()


def test_a_file_that_became_shorter_is_an_error(noise: Path, tmp_path: Path) -> None:
    short = tmp_path / "short"
    short.write_bytes(noise.read_bytes()[: DIRECT_BYTES + 100])
    forget(short)
    reader = Reader()
    with pytest.raises(WorldError, match="became shorter"):
        reader.read_slot(os.fspath(short), 0, 2 * DIRECT_BYTES, paged(slot_bytes(2 * DIRECT_BYTES)))


def test_reading_past_the_cache_leaves_nothing_in_it(noise: Path, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(noise.read_bytes())
    if forget(path) or not has_direct(path):
        pytest.skip("this file system has no direct I/O, or keeps its pages")
    size = 2 * DIRECT_BYTES
    slot = paged(slot_bytes(size))
    reader = Reader(cache_bytes=size)
    reader.read_slot(os.fspath(path), 64, size, slot)
    assert share(path) < 0.1
    # To be read again it may stay, but not longer than that.
    reader.read_slot(os.fspath(path), 64, size, slot, again=True)
    assert share(path) > 0.4
    reader.read_slot(os.fspath(path), 64, size, slot)
    assert share(path) < 0.7  # the kernel read ahead, into the other half
    forget(path)
    # And not more than was allowed.
    Reader(cache_bytes=size - 1).read_slot(os.fspath(path), 64, size, slot, again=True)
    assert share(path) < 0.1
    # Pages that others brought there stay.
    path.read_bytes()
    reader.read_slot(os.fspath(path), 64, size, slot)
    assert share(path) == 1.0


@pytest.mark.parametrize("where", ["open", "preadv"])
def test_a_file_system_without_direct_io_is_read_through_the_cache(
    where: str, noise: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forget(noise)
    real_open, real_read = os.open, os.preadv

    def refuse_open(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "no direct I/O")
        return real_open(path, flags, *args, **kwargs)

    def refuse_read(descriptor: int, buffers: Any, offset: int) -> int:
        import fcntl

        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, "no direct I/O")
        return real_read(descriptor, buffers, offset)

    monkeypatch.setattr(os, where, refuse_open if where == "open" else refuse_read)
    reader = Reader()
    slot = paged(slot_bytes(DIRECT_BYTES))
    begins = reader.read_slot(os.fspath(noise), 40, DIRECT_BYTES, slot)
    assert slot[begins : begins + DIRECT_BYTES].tobytes() == noise.read_bytes()[40 : 40 + DIRECT_BYTES]


@settings(max_examples=40)
@given(data=st.data())
def test_pieces_cut_anywhere_give_the_same_shard(
    data: st.DataObject, noise: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    content = noise.read_bytes()
    header = content[: data.draw(st.integers(8, 5000))]
    cuts = sorted(data.draw(st.sets(st.integers(len(header) + 1, len(content) - 1), max_size=4)))
    pieces = list(zip([len(header), *cuts], [*cuts, len(content)], strict=True))
    directory = tmp_path_factory.mktemp("shard")
    writer = ShardWriter(
        place_of(directory), Layout((Shard("model.safetensors", header, len(content), ()),), ()), direct=True
    )
    writer.open()
    for start, stop in data.draw(st.permutations(pieces)):
        lead = start % PAGE if data.draw(st.booleans()) else 0
        buffer = paged(lead + stop - start)
        buffer[lead:] = np.frombuffer(content[start:stop], np.uint8)
        writer.write(0, start, buffer[lead:])
    writer.sync({0})
    writer.publish(0)
    writer.close()
    assert (directory / "model.safetensors").read_bytes() == content
    assert writer.bytes_written == len(content) - len(header)


@pytest.fixture(scope="module")
def odd_models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[torch.dtype], list[Path]]:
    """Return what writes models once for each dtype."""

    @cache
    def write(dtype: torch.dtype) -> list[Path]:
        generator, paths = torch.Generator().manual_seed(1), []
        for number in range(4):
            paths.append(tmp_path_factory.mktemp("odd"))
            tensors = {n: torch.randn(s, generator=generator).to(dtype) for n, s in SHAPES.items()}
            # Headers of different lengths: each input lies at another place of its page.
            metadata = {"format": "pt", "pad": "x" * 8 * number}
            save_file(tensors, paths[-1] / "model.safetensors", metadata=metadata)
        return paths

    return write


@pytest.mark.parametrize(
    ("method", "top"),
    [
        ("linear", {}),
        ("linear", {"dtype": "float32"}),
        ("ties", {"parameters": {"density": 0.3}}),
        ("ties", {"parameters": {"density": 0.3, "trim_scope": "model"}}),
        ("dare_linear", {"parameters": {"density": 0.5}, "dtype": "float16"}),
        ("linear", {"exclude": ["a.weight", "c.weight"]}),
    ],
)
@pytest.mark.parametrize("capacity", [12 << 20, 1 << 30])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_way_of_io_gives_the_same_bytes(
    method: str,
    top: dict[str, Any],
    capacity: int,
    dtype: torch.dtype,
    odd_models: Callable[[torch.dtype], list[Path]],
    tmp_path: Path,
    small_capacity: Callable[[int, int], None],
) -> None:
    paths = odd_models(dtype)
    for path in paths:
        forget(path / "model.safetensors")
    small_capacity(capacity, 2)
    written = {}
    for io in ("direct", "read", "mmap"):
        merge(config_for(method, paths, **top), tmp_path / io, io=io)
        written[io] = (tmp_path / io / "model.safetensors").read_bytes()
    assert written["direct"] == written["read"] == written["mmap"]


def test_an_output_over_an_input_begins_no_later_and_in_its_place_of_the_page(
    make_models: Callable[..., list[Path]],
) -> None:
    decided = plan(config_for("linear", make_models(shapes=SHAPES)), memory="1GiB")
    for job in decided.jobs:
        places = divide(job, job.n_elements)
        assert places.paged == (job.n_elements * 4 >= DIRECT_BYTES)
        if places.paged:
            for first, offset in (
                (places.slots[0], 4095),
                (places.slots[0] + 4095, 0),
                (places.slots[0] + 8, 16),
            ):
                at = places.output_at(first, offset)
                assert 0 <= at <= first
                assert first - at < PAGE
                assert at % PAGE == offset % PAGE
