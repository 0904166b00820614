"""`verify` does not stop at checksums: a manifest that was sealed anew is held against headers, index and values."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from streammerge.api import merge
from streammerge.cli import main
from streammerge.errors import ModelError, StreammergeError
from streammerge.events import Event
from streammerge.numerics.crc32 import crc32
from streammerge.output.check import verify
from streammerge.output.manifest import load_manifest, seal
from streammerge.output.place import MANIFEST
from tests.conftest import config_for, read_tensors, write_model, write_models
from tests.output.verify.forge import reseal

SHAPES: dict[str, tuple[int, ...]] = {"embed.weight": (60, 32), "layers.0.weight": (32, 48), "norm": (32,)}
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("finished")
    merge(
        config_for("linear", write_models(directory, shapes=SHAPES)),
        directory / "out",
        shard_size=5000,
        device="cpu",
    )
    assert sorted(path.name for path in (directory / "out").glob("model-*")) == [FIRST, SECOND]
    return directory / "out"


@pytest.fixture
def out(finished: Path, tmp_path: Path) -> Path:
    """A finished merge of two shards, to be harmed."""
    shutil.copytree(finished, tmp_path / "out")
    return tmp_path / "out"


def rewrite(out: Path, name: str, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(out / name)
    change(tensors)
    save_file(tensors, out / name, metadata={"format": "pt"})
    reseal(out, name)


def problem_of(out: Path) -> str:
    (problem,) = verify(out).problems
    return problem


def test_the_manifest_records_dtype_and_shape_of_every_tensor(out: Path) -> None:
    recorded = load_manifest(out)["tensors"]
    assert {name: (entry["dtype"], tuple(entry["shape"])) for name, entry in recorded.items()} == {
        **{name: ("BF16", shape) for name, shape in SHAPES.items()},
        "position_ids": ("I64", (16,)),
    }


def test_a_shape_that_is_not_the_one_written_is_found_though_every_byte_of_the_values_is(out: Path) -> None:
    raw = (out / FIRST).read_bytes()
    (out / FIRST).write_bytes(raw.replace(b"[60,32]", b"[32,60]"))
    reseal(out, FIRST)
    assert (
        problem_of(out)
        == f"{FIRST}: tensor embed.weight: BF16 [32, 60] in the header, BF16 [60, 32] was written"
    )


def test_a_dtype_that_is_not_the_one_written_is_found(out: Path) -> None:
    raw = (out / FIRST).read_bytes()
    (out / FIRST).write_bytes(raw.replace(b'"BF16"', b'"F16" '))
    reseal(out, FIRST)
    assert (
        "tensor embed.weight: F16 [60, 32] in the header, BF16 [60, 32] was written"
        in verify(out).problems[0]
    )


def test_a_header_that_breaks_the_format_is_found_though_its_checksum_is_right(out: Path) -> None:
    raw = (out / FIRST).read_bytes()
    (out / FIRST).write_bytes(raw.replace(b"[60,32]", b"[60,33]"))
    reseal(out, FIRST)
    assert f"{FIRST}: tensor 'embed.weight': its 3840 bytes are not those of BF16" in problem_of(out)


def test_a_tensor_that_is_not_in_the_manifest_is_found(out: Path) -> None:
    rewrite(out, SECOND, lambda tensors: tensors.update(more=torch.zeros(3)))
    problems = "\n".join(verify(out).problems)
    assert f"{SECOND}: tensor more: not in {MANIFEST}" in problems
    assert f"{INDEX}: leads for tensor more to nowhere, it is in {SECOND}" in problems


def test_a_tensor_that_is_in_no_file_is_found(out: Path) -> None:
    rewrite(out, SECOND, lambda tensors: tensors.__delitem__("norm"))
    assert f"tensor norm is in no file, though in {MANIFEST}" in verify(out).problems


def test_a_tensor_in_two_shards_is_found(out: Path) -> None:
    norm = read_tensors(out)["norm"]
    rewrite(out, FIRST, lambda tensors: tensors.update(norm=norm))
    assert f"{SECOND}: tensor norm is in {FIRST} too" in verify(out).problems


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda index: index["weight_map"].update(norm=FIRST),
            f"leads for tensor norm to {FIRST}, it is in {SECOND}",
        ),
        (
            lambda index: index["weight_map"].pop("norm"),
            f"leads for tensor norm to nowhere, it is in {SECOND}",
        ),
        (
            lambda index: index["weight_map"].update(more=FIRST),
            f"leads for tensor more to {FIRST}, it is in nowhere",
        ),
        (lambda index: index["weight_map"].update(norm=["x\x1b"]), "leads for tensor norm to ['x\\x1b']"),
        (lambda index: index["metadata"].update(total_size=3), "total_size is 3, but the tensors have"),
        (lambda index: index["metadata"].pop("total_size"), "total_size is None"),
        (lambda index: index.update(weight_map=[]), "no weight_map"),
        (lambda index: index.pop("metadata"), "no weight_map or no metadata"),
    ],
)
def test_an_index_that_leads_elsewhere_is_found(
    change: Callable[[dict[str, Any]], None], words: str, out: Path
) -> None:
    index = json.loads((out / INDEX).read_text())
    change(index)
    (out / INDEX).write_text(json.dumps(index))
    reseal(out, INDEX)
    assert words in problem_of(out)
    assert problem_of(out).startswith(INDEX)


def test_an_index_that_is_no_json_is_found(out: Path) -> None:
    (out / INDEX).write_text("[" * 100_000)
    reseal(out, INDEX)
    assert f"{INDEX}: the file is nested too deeply" in problem_of(out)


def test_shards_without_an_index_are_found(out: Path) -> None:
    (out / INDEX).unlink()
    files = {name: entry for name, entry in load_manifest(out)["files"].items() if name != INDEX}
    reseal(out, files=files)
    assert f"{INDEX}: not in {MANIFEST}, though there are 2 shards" in problem_of(out)


# --- values


def planted(paths: list[Path], which: int, name: str, values: dict[int, float]) -> None:
    tensors = load_file(paths[which] / "model.safetensors")
    for element, value in values.items():
        tensors[name].view(-1)[element] = value
    write_model(paths[which], tensors)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_a_value_that_is_not_finite_and_was_not_accepted_is_found(
    dtype: torch.dtype, make_models: Callable[..., list[Path]], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    merge(config_for("linear", make_models(shapes=SHAPES, dtype=dtype)), out)
    tensors = load_file(out / "model.safetensors")
    for element in (77, 1919):
        tensors["embed.weight"].view(-1)[element] = -torch.inf
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    manifest = load_manifest(out)
    raw = tensors["embed.weight"].view(-1).view(torch.uint8).numpy().tobytes()
    manifest["tensors"]["embed.weight"]["crc32"] = f"{crc32(raw):08x}"
    reseal(out, "model.safetensors", tensors=manifest["tensors"])
    assert problem_of(out) == (
        "model.safetensors: tensor embed.weight: 2 elements are NaN or infinite (the first is 77), 0 were written so"
    )
    reseal(out, not_finite={"embed.weight": 2})
    assert verify(out).problems == ()
    reseal(out, not_finite={"embed.weight": 2, "norm": 1})
    assert "tensor norm: 0 elements are NaN or infinite, 1 were written so" in problem_of(out)


def test_what_was_accepted_as_not_finite_is_no_problem(
    make_models: Callable[..., list[Path]], tmp_path: Path
) -> None:
    paths = make_models(shapes=SHAPES)
    planted(paths, 1, "embed.weight", {5: torch.nan, 6: torch.inf})
    merge(config_for("linear", paths), tmp_path / "out", nonfinite="warn")
    assert load_manifest(tmp_path / "out")["not_finite"] == {"embed.weight": 2}
    assert verify(tmp_path / "out").problems == ()


def test_what_is_not_finite_in_a_copied_tensor_is_recorded_told_and_no_problem(
    make_models: Callable[..., list[Path]], tmp_path: Path
) -> None:
    paths = make_models(shapes=SHAPES)
    planted(paths, 0, "norm", {3: torch.nan, 31: torch.inf})
    events: list[Event] = []
    config = config_for("ties", paths, exclude=["^norm$"])
    merge(config, tmp_path / "out", on_event=events.append)
    assert load_manifest(tmp_path / "out")["not_finite"] == {"norm": 2}
    assert verify(tmp_path / "out").problems == ()
    (warning,) = [event.values["message"] for event in events if event.kind == "warning"]
    assert warning.startswith("tensor norm: 2 elements of")


# --- manifests that a stranger sealed

FORGED: list[tuple[str, dict[str, Any]]] = [
    ("files", {"files": {}}),
    ("files", {"files": ["config.json"]}),
    ("files", {"files": None}),
    ("files", {"files": {"config.json": 3}}),
    ("files", {"files": {"config.json": {"nbytes": 1, "crc32": "\x1b[31m00"}}}),
    ("files", {"files": {"config.json": {"nbytes": 1, "crc32": "0" * 500}}}),
    ("files", {"files": {"config.json": {"nbytes": True, "crc32": "00000000"}}}),
    ("files", {"files": {"config.json": {"nbytes": -1, "crc32": "00000000"}}}),
    ("files", {"files": {"config.json": {"nbytes": 1e3, "crc32": "00000000"}}}),
    ("files", {"files": {"../config.yml": {"nbytes": 1, "crc32": "00000000"}}}),
    ("files", {"files": {"/etc/passwd": {"nbytes": 1, "crc32": "00000000"}}}),
    ("files", {"files": {"..": {"nbytes": 1, "crc32": "00000000"}}}),
    ("files", {"files": {"": {"nbytes": 1, "crc32": "00000000"}}}),
    ("files", {"files": {"a\0b": {"nbytes": 1, "crc32": "00000000"}}}),
    ("files", {"files": {"a\nb": {"nbytes": 1, "crc32": "00000000"}}}),
    ("files", {"files": {"x" * 300: {"nbytes": 1, "crc32": "00000000"}}}),
    ("tensors", {"tensors": []}),
    ("tensors", {"tensors": {"w": "00000000"}}),
    ("tensors", {"tensors": {"w": {"dtype": "BF17", "shape": [], "crc32": "00000000"}}}),
    ("tensors", {"tensors": {"w": {"dtype": ["BF16"], "shape": [], "crc32": "00000000"}}}),
    ("tensors", {"tensors": {"w": {"dtype": "BF16", "shape": [-1], "crc32": "00000000"}}}),
    ("tensors", {"tensors": {"w": {"dtype": "BF16", "shape": [1] * 65, "crc32": "00000000"}}}),
    ("not_finite", {"not_finite": ["norm"]}),
    ("not_finite", {"not_finite": {"norm": "2"}}),
    ("floored", {"floored": [1]}),
    ("floored", {"floored": {"elements": 1, "of": 2, "fraction": "half"}}),
    ("densities", {"densities": {}}),
    ("densities", {"densities": [{"model": 0}]}),
    ("identity", {"identity": [["config", "x"]]}),
    ("identity", {"identity": {"config": 7}}),
    ("inputs", {"inputs": [7]}),
    ("seed", {"seed": "7"}),
    ("seed", {"seed": 2**64}),
    ("format", {"format": 1}),
    ("format", {"format": {"a": "\x1b" * 900}}),
    ("digits", {"files": {"config.json": {"nbytes": 10**999, "crc32": "00000000"}}}),
    ("NaN", {"densities": [float("nan")]}),
    ("nested", {"method": json.loads("[" * 900 + "]" * 900)}),
]  # fmt: skip


@pytest.mark.parametrize(("words", "fields"), FORGED, ids=[f"{i} {row[0]}" for i, row in enumerate(FORGED)])
def test_a_sealed_manifest_of_wrong_types_is_refused_in_one_line(
    words: str,
    fields: dict[str, Any],
    out: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reseal(out, **fields)
    monkeypatch.setattr("sys.argv", ["streammerge", "verify", str(out)])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.isprintable()
    assert MANIFEST in line
    if words != "nested":  # how deep is too deep is Python's to say
        assert words in line


def test_a_merge_run_again_beside_a_sealed_manifest_of_wrong_types_is_refused(
    make_models: Callable[..., list[Path]], out: Path
) -> None:
    for _, fields in FORGED:
        sound = (out / MANIFEST).read_bytes()
        reseal(out, **fields)
        with pytest.raises(StreammergeError) as caught:
            merge(config_for("linear", make_models(shapes=SHAPES)), out, shard_size=5000)
        assert caught.value.exit_code == 2
        assert str(caught.value).isprintable()
        (out / MANIFEST).write_bytes(sound)


def test_a_manifest_whose_field_is_missing_is_refused(out: Path) -> None:
    for field in ("files", "tensors", "identity", "seed", "format", "densities"):
        sound = (out / MANIFEST).read_bytes()
        manifest = load_manifest(out)
        del manifest[field], manifest["manifest_crc32"]
        (out / MANIFEST).write_bytes(seal(manifest))
        with pytest.raises(ModelError, match=field):
            verify(out)
        (out / MANIFEST).write_bytes(sound)
