"""`verify` finds any changed bit of any file, and names it."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from streammerge.api import merge
from streammerge.errors import ModelError, WorldError
from streammerge.output.check import verify
from streammerge.output.manifest import load_manifest
from streammerge.output.place import MANIFEST
from tests.conftest import config_for, write_models
from tests.output.verify.forge import reseal

SHAPES: dict[str, tuple[int, ...]] = {"embed.weight": (60, 32), "layers.0.weight": (32, 48), "norm": (32,)}


@pytest.fixture(scope="module", params=["one file", "shards"])
def finished(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("finished")
    config = config_for("ties", write_models(directory, shapes=SHAPES), parameters={"density": 0.5})
    size = 10**9 if request.param == "one file" else 3500
    merge(config, directory / "out", shard_size=size, device="cpu")
    return directory / "out"


@pytest.fixture
def out(finished: Path, tmp_path: Path) -> Path:
    """A finished merge, to be harmed."""
    shutil.copytree(finished, tmp_path / "out")
    return tmp_path / "out"


@pytest.fixture
def shards(make_models: Callable[..., list[Path]], tmp_path: Path) -> Path:
    """An output of three shards, with a tokenizer beside them."""
    paths = make_models(shapes={**SHAPES, "head.weight": (32, 60)})
    (paths[0] / "tokenizer.json").write_text('{"version": "1.0"}')
    merge(config_for("ties", paths, parameters={"density": 0.5}), tmp_path / "shards", shard_size=5000)
    assert len(list((tmp_path / "shards").glob("model-*"))) == 3
    return tmp_path / "shards"


def files(out: Path) -> list[str]:
    return sorted(p.name for p in out.iterdir())


def found(out: Path) -> str:
    """Return all that `verify` says about a directory that is not as it was written."""
    try:
        verdict = verify(out)
    except ModelError as error:
        return str(error)
    assert verdict.problems or verdict.edits
    return "\n".join([*verdict.problems, *verdict.edits])


def flip(path: Path, position: int, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    path.write_bytes(data)


def test_an_output_as_it_was_written_passes(out: Path) -> None:
    verdict = verify(out)
    assert verdict.problems == ()
    manifest = json.loads((out / "streammerge.json").read_text())
    assert set(manifest["files"]) == set(files(out)) - {"streammerge.json"}
    assert verdict.files == len(manifest["files"])
    assert verdict.nbytes == sum((out / name).stat().st_size for name in manifest["files"])


def test_five_bit_flips_in_every_file_are_all_found_and_the_file_is_named(out: Path) -> None:
    for name in files(out):
        path = out / name
        sound = path.read_bytes()
        size = len(sound)
        for position, bit in [(0, 0), (min(9, size - 1), 3), (size // 3, 7), (size // 2, 1), (size - 1, 0)]:
            flip(path, position, bit)
            assert name in found(out), (name, position)
            path.write_bytes(sound)
    assert verify(out).problems == ()


def test_a_bit_flip_anywhere_in_the_manifest_is_found(out: Path) -> None:
    path = out / "streammerge.json"
    sound = path.read_bytes()
    for position in range(0, len(sound), 7):
        flip(path, position, position % 8)
        assert "streammerge.json" in found(out), position
        path.write_bytes(sound)


@pytest.mark.parametrize("tensor", list(SHAPES))
def test_a_bit_flip_inside_a_tensor_names_the_tensor_and_the_file(tensor: str, out: Path) -> None:
    for path in out.glob("model*.safetensors"):
        raw = path.read_bytes()
        length = int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8 : 8 + length])
        if tensor in header:
            first, last = header[tensor]["data_offsets"]
            for position in (first, (first + last) // 2, last - 1):
                flip(path, 8 + length + position, 5)
                (problem,) = verify(out).problems
                assert f"tensor {tensor} is damaged" in problem
                assert path.name in problem
                path.write_bytes(raw)
            return
    pytest.fail("no file holds the tensor")


def cut_one_byte(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def cut_in_half(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def make_empty(path: Path) -> None:
    os.truncate(path, 0)


def add_a_byte(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"\0")


def add_a_newline(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"\n")


def make_a_link(path: Path) -> None:
    moved = path.parent.parent / f"moved {path.name}"
    path.rename(moved)
    path.symlink_to(moved)


def make_a_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def make_a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize(
    "damage",
    [
        cut_one_byte,
        cut_in_half,
        make_empty,
        add_a_byte,
        add_a_newline,
        Path.unlink,
        make_a_link,
        make_a_directory,
        make_a_pipe,
    ],
)
def test_damage_to_any_file_is_found_and_the_file_is_named(
    damage: Callable[[Path], None], out: Path, tmp_path: Path
) -> None:
    for name in files(out):
        copy = tmp_path / f"copy of {name}"
        shutil.copytree(out, copy)
        damage(copy / name)
        assert name in found(copy), name


def kinds_of_damage(out: Path) -> dict[str, tuple[str, Callable[[Path], None]]]:
    """Return by name which file is harmed and how: the 37 of the promise."""
    chance = random.Random(10)

    def flipped(position: int) -> Callable[[Path], None]:
        return lambda path: flip(path, position, chance.randrange(8))

    kinds: dict[str, tuple[str, Callable[[Path], None]]] = {}
    for shard in sorted(path.name for path in out.glob("model-*")):
        raw = (out / shard).read_bytes()
        header = 8 + int.from_bytes(raw[:8], "little")
        places = {
            "header length": 2,
            "header": header // 2,
            "middle": (header + len(raw)) // 2,
            "last byte": len(raw) - 1,
            "any byte": chance.randrange(len(raw)),
        }
        kinds |= {f"{shard}, {place}": (shard, flipped(at)) for place, at in places.items()}
    for name in files(out):
        if not name.startswith("model-"):
            kinds[f"{name}, a bit"] = (name, flipped(chance.randrange((out / name).stat().st_size)))
    harms = {"cut": cut_one_byte, "longer": add_a_byte, "missing": Path.unlink, "a link": make_a_link}
    for name in (
        "model-00002-of-00003.safetensors",
        "model.safetensors.index.json",
        "config.json",
        "streammerge.json",
    ):
        kinds |= {f"{name}, {what}": (name, harm) for what, harm in harms.items()}
    return kinds


def test_every_kind_of_damage_is_found_and_the_file_is_named(shards: Path, tmp_path: Path) -> None:
    kinds = kinds_of_damage(shards)
    missed = []
    for what, (name, harm) in kinds.items():
        copy = tmp_path / "copy"
        shutil.copytree(shards, copy)
        harm(copy / name)
        if name not in found(copy):
            missed.append(what)
        shutil.rmtree(copy)
        (tmp_path / f"moved {name}").unlink(missing_ok=True)
    assert missed == []
    assert len(kinds) == 37
    assert verify(shards).problems == ()


def test_two_files_exchanged_are_found(out: Path) -> None:
    one, two = out / "README.md", out / "config.json"
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    two.write_bytes(first)
    problems = found(out)
    assert "README.md" in problems
    assert "config.json" in problems


def test_a_model_file_that_the_manifest_does_not_know_is_found(out: Path) -> None:
    (out / "model-00009-of-00009.safetensors").write_bytes(next(out.glob("model*.safetensors")).read_bytes())
    assert "model-00009-of-00009.safetensors" in found(out)


@pytest.mark.parametrize(
    "name",
    [
        "tokenizer.json",
        "config.json",
        "pytorch_model.bin",
        "modeling_x.py",
        "adapter_config.json",
        "x.safetensors",
        "README.md.partial",
    ],
)
def test_a_file_that_a_loader_may_take_up_and_no_merge_wrote_is_found(name: str, out: Path) -> None:
    manifest = load_manifest(out)
    if name in manifest["files"]:
        del manifest["files"][name]
        reseal(out, files=manifest["files"])
    (out / name).write_text("{}")
    (problem,) = verify(out).problems
    assert problem.startswith(f"{name}: not in {MANIFEST}")


def test_other_files_are_told_of_and_are_no_problem(out: Path) -> None:
    (out / "notes.txt").write_text("mine")
    (out / "figures").mkdir()
    verdict = verify(out)
    assert verdict.problems == ()
    assert verdict.others == ("figures", "notes.txt")


def test_every_damaged_file_is_listed_not_only_the_first(out: Path) -> None:
    for name in ("streammerge_config.yml", "config.json"):
        flip(out / name, 3, 1)
    flip(next(out.glob("model*.safetensors")), -1, 1)
    assert len(verify(out).problems) == 3


def test_an_unfinished_merge_is_not_verified(out: Path) -> None:
    (out / ".streammerge").mkdir()
    assert "not finished" in found(out)


def test_a_directory_without_a_manifest_or_none_at_all_is_refused(tmp_path: Path) -> None:
    assert "no such directory" in found(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    assert "streammerge.json" in found(tmp_path / "empty")


# --- the machine, and the user


def test_a_disk_that_cannot_read_is_no_damage(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def preadv(*arguments: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", preadv)
    with pytest.raises(WorldError, match="cannot be read: Input/output error") as caught:
        verify(out)
    assert caught.value.exit_code == 1


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_it_at_once_in_one_line(signum: int, code: int, out: Path) -> None:
    program = (
        "import os, sys, streammerge.output.check as v, streammerge.cli\n"
        f"v.read_back = lambda *arguments: os.kill(os.getpid(), {int(signum)})\n"
        f"sys.argv = ['streammerge', 'verify', {str(out)!r}]\n"
        "streammerge.cli.main()"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (code, "streammerge: stopped\n")
