"""Paths that are no sound file: pipes, devices, broken links, disks that fail; and bounds on time and memory."""

import errno
import os
import socket

import pytest

from streammerge.checkpoint import read_header
from streammerge.errors import ModelError, WorldError
from streammerge.io.files import from_os
from tests.formats.safetensors_cases import (
    GOOD,
    HOSTILE,
)
from tests.formats.safetensors_files import entry, framed, within

# Paths that are not files.


def test_a_pipe_is_refused_without_waiting_for_a_writer(tmp_path):
    path = tmp_path / "m.safetensors"
    os.mkfifo(path)
    with within(2), pytest.raises(ModelError, match=r"a pipe, not a regular file$"):
        read_header(path)


def test_a_directory_a_device_and_a_socket_are_refused(tmp_path):
    with pytest.raises(ModelError, match=r"a directory, not a regular file$"):
        read_header(tmp_path)
    device = tmp_path / "device.safetensors"
    device.symlink_to("/dev/zero")
    with within(2), pytest.raises(ModelError, match=r"a device, not a regular file$"):
        read_header(device)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        with pytest.raises(ModelError, match=r"a socket, not a regular file$"):
            read_header(tmp_path / "s")


def test_broken_links_and_missing_files_are_refused(tmp_path):
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    for name, message in [
        ("dangling", "a symbolic link to a file that is missing"),
        ("loop", "leads back to itself"),
        ("missing", "no such file"),
        ("n" * 300, "too long"),
        ("nul\0", "not a valid path"),
        ("surrogate\ud800", "not a valid path"),
    ]:
        with pytest.raises(ModelError, match=message) as caught:
            read_header(tmp_path / name)
        assert str(caught.value).isprintable()


def test_a_link_to_a_blob_is_read_as_in_the_hub_cache(tmp_path):
    (tmp_path / "blob").write_bytes(GOOD)
    (tmp_path / "m.safetensors").symlink_to("blob")
    tensors, _, stamp = read_header(tmp_path / "m.safetensors")
    assert tensors["a"].path == stamp.path == str(tmp_path / "m.safetensors")


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.ENOENT, ModelError),
        (errno.EACCES, ModelError),
        (errno.ELOOP, ModelError),
        (errno.EIO, WorldError),
        (errno.EMFILE, WorldError),
        (errno.ESTALE, WorldError),  # A network file system lost the file.
    ],
)
def test_what_the_user_can_cure_is_told_from_what_the_machine_did(number, kind):
    error = from_os("m.safetensors", OSError(number, os.strerror(number)))
    assert type(error) is kind
    assert str(error).startswith("m.safetensors: ")


def test_a_failing_disk_and_a_shrinking_file_are_the_worlds_fault(write, monkeypatch):
    path = write(GOOD)

    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "pread", fail)
    with pytest.raises(WorldError, match="Input/output error"):
        read_header(path)
    monkeypatch.setattr(os, "pread", lambda *_: b"")
    with pytest.raises(WorldError, match="became shorter"):
        read_header(path)


# Bounds: of time, memory, descriptors.


@pytest.mark.parametrize("length", [100_000_001, 2**31, 2**63, 2**64 - 1])
def test_a_huge_length_is_refused_before_anything_is_read(length, tmp_path, monkeypatch):
    path = tmp_path / "m.safetensors"
    path.write_bytes(framed(b"{}", b"", length))
    os.truncate(path, 2**33)  # Sparse: the length may even be within the file.
    asked = []
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, n, at: asked.append(n) or pread(fd, n, at))
    with within(2), pytest.raises(ModelError, match=f"header length {length} exceeds"):
        read_header(path)
    assert asked == [8]


def test_a_hundred_thousand_overlapping_tensors_are_refused_quickly(write):
    path = write(framed({f"t{i}": entry() for i in range(100_000)}))
    with within(10), pytest.raises(ModelError, match=r"tensors 't0' and 't1' overlap$"):
        read_header(path)


def test_no_refusal_leaves_a_descriptor_open(write):
    before = len(os.listdir("/proc/self/fd"))
    for _, raw, _ in HOSTILE:
        if len(raw) < 10_000:
            with pytest.raises(ModelError):
                read_header(write(raw))
    assert len(os.listdir("/proc/self/fd")) == before
