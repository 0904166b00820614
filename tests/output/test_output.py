"""A finished output holds what a loader reads, and nothing that must not be there."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from streammerge.api import merge
from streammerge.errors import ModelError
from streammerge.events import Event
from tests.conftest import config_for, output_bytes, read_tensors, write_model
from tests.patience import PATIENCE

SHAPES: dict[str, tuple[int, ...]] = {
    "embed.weight": (200, 32),
    "layers.0.weight": (64, 48),
    "layers.1.weight": (64, 48),
    "norm": (32,),
}
Make = Callable[..., list[Path]]


def edit(model: Path, **tensors: torch.Tensor) -> None:
    """Replace tensors of a model on disk."""
    path = model / "model.safetensors"
    named = {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    save_file({**load_file(path), **named}, path, metadata={"format": "pt"})


def warnings_of(config: Any, out: Path, **options: Any) -> list[str]:
    """Merge and return the warnings."""
    events: list[Event] = []
    merge(config, out, on_event=events.append, **options)
    return [event.values["message"] for event in events if event.kind == "warning"]


# --- shards


def test_sharded_output_loads_through_its_index_and_equals_the_single_file(
    make_models: Make, tmp_path: Path
) -> None:
    config = config_for("ties", make_models(shapes=SHAPES), parameters={"density": 0.5})
    merge(config, tmp_path / "one")
    merge(config, tmp_path / "many", shard_size="8000")
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    names = sorted(p.name for p in (tmp_path / "many").glob("model-*"))
    assert len(names) >= 3
    assert names == [f"model-{i + 1:05d}-of-{len(names):05d}.safetensors" for i in range(len(names))]
    assert set(index["weight_map"].values()) == set(names)
    expected = load_file(tmp_path / "one" / "model.safetensors")
    assert set(index["weight_map"]) == set(expected)
    for tensor, file in index["weight_map"].items():
        with safe_open(tmp_path / "many" / file, "pt") as shard:
            assert shard.metadata() == {"format": "pt"}
            assert torch.equal(shard.get_tensor(tensor), expected[tensor])
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in expected.values())


def test_a_shard_is_byte_equal_to_what_the_safetensors_library_writes(
    make_models: Make, tmp_path: Path
) -> None:
    merge(config_for("linear", make_models(shapes=SHAPES)), tmp_path / "out", shard_size="8000")
    for path in (tmp_path / "out").glob("model-*"):
        save_file(load_file(path), tmp_path / "again", metadata={"format": "pt"})
        assert (tmp_path / "again").read_bytes() == path.read_bytes()


def test_one_shard_has_no_index(make_models: Make, tmp_path: Path) -> None:
    merge(config_for("linear", make_models(shapes=SHAPES)), tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
        "streammerge.json",
        "streammerge_config.yml",
    ]


# --- files beside the weights


def test_config_json_says_the_dtype_that_was_written_and_keeps_the_rest(
    make_models: Make, tmp_path: Path
) -> None:
    paths = make_models(shapes=SHAPES)
    given = {"torch_dtype": "bfloat16", "model_type": "llama", "nested": {"a": [1, 2.5, None]}}
    (paths[0] / "config.json").write_text(json.dumps(given))
    merge(config_for("ties", paths, dtype="float16"), tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written == {**given, "torch_dtype": "float16"}
    floats = [t for t in read_tensors(tmp_path / "out").values() if t.is_floating_point()]
    assert {t.dtype for t in floats} == {torch.float16}


def test_config_json_with_the_newer_key_keeps_the_newer_key(make_models: Make, tmp_path: Path) -> None:
    paths = make_models(shapes=SHAPES)
    (paths[0] / "config.json").write_text('{"dtype": "bfloat16"}')
    merge(config_for("ties", paths, dtype="float32"), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"dtype": "float32"}


def test_config_json_is_copied_byte_for_byte_where_the_dtype_stays(make_models: Make, tmp_path: Path) -> None:
    paths = make_models(shapes=SHAPES)
    odd = b'{ "torch_dtype":"bfloat16",  "x" : 1e5 }\r\n'
    (paths[0] / "config.json").write_bytes(odd)
    merge(config_for("ties", paths), tmp_path / "out")
    assert (tmp_path / "out" / "config.json").read_bytes() == odd


def test_files_beside_the_weights_come_from_the_base_and_other_formats_do_not(
    make_models: Make, tmp_path: Path
) -> None:
    paths = make_models(shapes=SHAPES)
    for i, path in enumerate(paths):
        for name in (
            "tokenizer.json",
            "tokenizer_config.json",
            "generation_config.json",
            "chat_template.jinja",
        ):
            (path / name).write_text(f"{name} of {i} ü\n")
        (path / "modeling_new.py").write_text("raise SystemExit")
        (path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n")
        (path / "optimizer.pt").write_bytes(b"x")
    merge(config_for("ties", paths), tmp_path / "out")
    files = output_bytes(tmp_path / "out")
    assert files["tokenizer.json"] == (paths[0] / "tokenizer.json").read_bytes()
    assert "tokenizer_config.json" in files
    assert "chat_template.jinja" in files
    assert files["modeling_new.py"] == b"raise SystemExit"
    assert not {"pytorch_model.bin", "optimizer.pt"} & set(files)


def test_the_config_is_kept_word_for_word(make_models: Make, tmp_path: Path) -> None:
    text = "# a comment\n" + yaml.safe_dump(config_for("linear", make_models(shapes=SHAPES))) + "\n\n"
    (tmp_path / "c.yml").write_text(text)
    merge(tmp_path / "c.yml", tmp_path / "out")
    assert (tmp_path / "out" / "streammerge_config.yml").read_text() == text
    assert "# a comment" in (tmp_path / "out" / "README.md").read_text()


def test_the_manifest_has_no_path_host_or_time(make_models: Make, tmp_path: Path) -> None:
    merge(config_for("dare_ties", make_models(shapes=SHAPES), parameters={"density": 0.5}), tmp_path / "out")
    text = (tmp_path / "out" / "streammerge.json").read_text()
    manifest = json.loads(text)
    assert str(tmp_path) not in text
    assert "/" not in text
    assert socket.gethostname() not in text
    assert not [key for key in manifest if "time" in key or "date" in key]
    assert str((tmp_path / "out").stat().st_mtime_ns)[:6] not in text
    assert [entry["role"] for entry in manifest["inputs"]] == ["model", "model", "model", "base"]
    assert all(0.45 < entry["density"] < 0.55 for entry in manifest["densities"])


# --- the same bytes


def test_weights_do_not_depend_on_where_the_models_and_the_output_lie(
    make_models: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = make_models(shapes=SHAPES)
    parameters = {"density": 0.3}
    merge(config_for("dare_linear", paths, parameters=parameters, seed=9), tmp_path / "a")
    moved = [path.rename(tmp_path / f"elsewhere {i}") for i, path in enumerate(paths)]
    merge(config_for("dare_linear", moved, parameters=parameters, seed=9), tmp_path / "b")
    monkeypatch.chdir(tmp_path)
    relative = [Path(path.name) for path in moved]
    merge(config_for("dare_linear", relative, parameters=parameters, seed=9), "c")
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in "abc"]
    assert weights[0] == weights[1] == weights[2]


def test_the_same_relative_config_gives_the_same_files_in_another_directory(
    make_models: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = make_models(shapes=SHAPES)
    config = config_for("ties", [Path("models") / path.name for path in paths])
    outputs = []
    for place in ("here", "there"):
        models = tmp_path / place / "models"
        models.mkdir(parents=True)
        for path in paths:
            (models / path.name).symlink_to(path, target_is_directory=True)
        monkeypatch.chdir(tmp_path / place)
        merge(config, "out")
        outputs.append(output_bytes(Path("out")))
    assert outputs[0] == outputs[1]


def test_bytes_do_not_depend_on_the_hash_seed(make_models: Make, tmp_path: Path) -> None:
    paths = make_models(shapes=SHAPES)
    (tmp_path / "c.yml").write_text(
        yaml.safe_dump(config_for("dare_ties", paths, parameters={"density": 0.5}))
    )
    for seed in ("0", "4242"):
        command = [
            sys.executable,
            "-m",
            "streammerge.cli",
            "merge",
            "c.yml",
            f"out{seed}",
            "--shard-size",
            "9000",
        ]
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        subprocess.run(
            command, cwd=tmp_path, env=environment, check=True, capture_output=True, timeout=PATIENCE
        )
    assert output_bytes(tmp_path / "out0") == output_bytes(tmp_path / "out4242")


def test_another_seed_gives_other_drops(make_models: Make, tmp_path: Path) -> None:
    config = config_for("dare_linear", make_models(shapes=SHAPES), parameters={"density": 0.5})
    for seed in (1, 2):
        merge(config, tmp_path / f"out{seed}", seed=seed)
    first, second = read_tensors(tmp_path / "out1"), read_tensors(tmp_path / "out2")
    assert not torch.equal(first["embed.weight"], second["embed.weight"])


def test_inputs_are_never_written(make_models: Make, tmp_path: Path) -> None:
    paths = make_models(shapes=SHAPES)
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for path in paths for p in path.iterdir()}
    merge(config_for("ties", paths), tmp_path / "out")
    merge(config_for("linear", paths), tmp_path / "out", overwrite=True)
    assert {p: (p.read_bytes(), p.stat().st_mtime_ns) for path in paths for p in path.iterdir()} == before


# --- integers, exclusions, odd shapes


def test_integers_that_differ_give_a_warning_and_come_from_the_base(
    make_models: Make, tmp_path: Path
) -> None:
    paths = make_models(shapes=SHAPES)
    edit(paths[2], position_ids=torch.arange(16) + 1)
    (warning,) = warnings_of(config_for("ties", paths), tmp_path / "out")
    assert "position_ids" in warning
    assert "base" in warning
    assert torch.equal(read_tensors(tmp_path / "out")["position_ids"], torch.arange(16))


def test_integers_that_agree_give_no_warning(make_models: Make, tmp_path: Path) -> None:
    assert warnings_of(config_for("ties", make_models(shapes=SHAPES)), tmp_path / "out") == []


def test_excluded_tensors_are_copied_from_the_base(make_models: Make, tmp_path: Path) -> None:
    paths = make_models(shapes=SHAPES)
    edit(paths[1], embed__weight=torch.randn(7, 5))
    merge(config_for("ties", paths, exclude=["^embed"]), tmp_path / "out")
    merged, base = read_tensors(tmp_path / "out"), read_tensors(paths[0])
    assert torch.equal(merged["embed.weight"], base["embed.weight"])
    assert not torch.equal(merged["layers.0.weight"], base["layers.0.weight"])


def test_excluded_tensors_may_hold_nan(make_models: Make, tmp_path: Path) -> None:
    paths = make_models(shapes=SHAPES)
    edit(paths[0], norm=torch.full((32,), torch.nan, dtype=torch.bfloat16))
    merge(config_for("ties", paths, exclude=["^norm$"]), tmp_path / "out")
    assert read_tensors(tmp_path / "out")["norm"].isnan().all()


def test_empty_scalar_and_deep_tensors_are_merged(make_models: Make, tmp_path: Path) -> None:
    shapes: dict[str, tuple[int, ...]] = {"none": (0, 5), "scalar": (), "deep": (2, 1, 3, 1, 2), "one": (1,)}
    paths = make_models(shapes=shapes)
    merge(config_for("linear", paths), tmp_path / "out")
    merged = read_tensors(tmp_path / "out")
    assert {name: tuple(merged[name].shape) for name in shapes} == shapes


# --- values that are not finite


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("which", [0, 2])
@pytest.mark.parametrize(
    ("method", "parameters"),
    [("ties", {"density": 0.3}), ("ties", {"density": 0.3, "trim_scope": "model"}), ("task_arithmetic", {})],
)
@pytest.mark.parametrize("capacity", [1 << 16, 1 << 30])
def test_a_value_that_is_not_finite_is_refused_naming_file_tensor_and_element(
    capacity: int,
    method: str,
    parameters: dict[str, Any],
    which: int,
    value: float,
    make_models: Make,
    small_capacity: Callable[[int, int], None],
    tmp_path: Path,
) -> None:
    small_capacity(capacity, 2)
    paths = make_models(shapes=SHAPES)
    tensor = load_file(paths[which] / "model.safetensors")["embed.weight"]
    tensor.view(-1)[5001] = value
    edit(paths[which], embed__weight=tensor)
    with pytest.raises(ModelError, match=r"embed\.weight holds NaN or infinity at element 5001") as caught:
        merge(config_for(method, paths, parameters=parameters), tmp_path / "out")
    assert str(paths[which] / "model.safetensors") in str(caught.value)
    assert caught.value.exit_code == 2
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert not {"model.safetensors", "model.safetensors.index.json"} & names


@pytest.mark.parametrize("kernels", [True, False])
def test_an_overflow_of_the_output_dtype_is_refused_naming_the_tensor(
    kernels: bool, make_models: Make, tmp_path: Path
) -> None:
    paths = make_models(shapes=SHAPES, dtype=torch.float32)
    for path in paths:
        edit(path, norm=torch.full((32,), 7e4))
    with pytest.raises(ModelError, match=r"norm: the merged values overflow F16"):
        merge(config_for("linear", paths, dtype="float16"), tmp_path / "out", kernels=kernels)
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_the_largest_half_precision_number_is_not_an_overflow(make_models: Make, tmp_path: Path) -> None:
    paths = make_models(shapes=SHAPES, dtype=torch.float32)
    for path in paths:
        edit(path, norm=torch.full((32,), 65519.0))
    merge(config_for("linear", paths, dtype="float16"), tmp_path / "out")
    assert torch.equal(
        read_tensors(tmp_path / "out")["norm"], torch.full((32,), 65504.0, dtype=torch.float16)
    )


def test_an_overflow_in_a_copied_and_cast_tensor_is_refused_too(make_models: Make, tmp_path: Path) -> None:
    paths = make_models(shapes=SHAPES, dtype=torch.float32)
    edit(paths[0], norm=torch.full((32,), 7e4))
    with pytest.raises(ModelError, match="norm"):
        merge(config_for("ties", paths, dtype="float16", exclude=["norm"]), tmp_path / "out")
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_a_nan_in_an_entry_that_is_dropped_is_found_too(
    make_models: Callable[..., list[Path]], tmp_path: Path
) -> None:
    base, *models = make_models(n_models=2)
    tensors = read_tensors(models[1])
    tensors["model.embed_tokens.weight"].view(-1)[5000:5008] = float("nan")  # one of them is dropped, surely
    write_model(models[1], tensors)
    config = config_for("dare_linear", [base, *models], parameters={"density": 0.01})
    for kernels in (True, False):
        with pytest.raises(ModelError, match=r"embed_tokens.*element 5000"):
            merge(config, tmp_path / f"out{kernels}", memory="1GiB", kernels=kernels)
