"""Which set of weights is taken of several in one directory: every combination, and tensors never come from two."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from streammerge import merge, verify
from streammerge.checkpoint import open_model
from streammerge.errors import InputError
from streammerge.io.files import quoted

SHARDS = "model-0000{}-of-00002.safetensors"
# (the set, its files, what a note calls it), the first is taken before those that follow
SETS: list[tuple[str, list[str], str]] = [
    ("indexed", [SHARDS.format(1), SHARDS.format(2), "model.safetensors.index.json"], "model.safetensors.index.json"),
    ("single", ["model.safetensors"], "model.safetensors"),
    ("shards", ["model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors", "model-00003-of-00003.safetensors"], "model-00001-of-00003.safetensors … model-00003-of-00003.safetensors"),
    ("consolidated", ["consolidated.safetensors"], "consolidated.safetensors"),
    ("torch index", ["pytorch_model-00001-of-00001.bin", "pytorch_model.bin.index.json"], "pytorch_model.bin.index.json"),
    ("torch", ["pytorch_model.bin"], "pytorch_model.bin"),
    ("fp16", ["model.fp16.safetensors"], "model.fp16.safetensors"),
    ("torch fp16", ["pytorch_model.fp16.bin"], "pytorch_model.fp16.bin"),
]  # fmt: skip
COMBINATIONS = [some for n in range(1, len(SETS) + 1) for some in itertools.combinations(range(len(SETS)), n)]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write every set once; its tensors tell it from the others, but for one name that all have."""
    folder = tmp_path_factory.mktemp("sets")
    for name, files, _ in SETS:
        weights = [file for file in files if not file.endswith(".json")]
        for place, file in enumerate(weights):
            tensors = {f"{name}.{place}": torch.zeros(1)} | ({"shared": torch.ones(1)} if not place else {})
            if file.endswith(".bin"):
                torch.save(tensors, folder / file)
            else:
                save_file(tensors, folder / file)
        for index in (file for file in files if file.endswith(".json")):
            weight_map = {f"{name}.{place}": file for place, file in enumerate(weights)} | {
                "shared": weights[0]
            }
            (folder / index).write_text(json.dumps({"weight_map": weight_map}))
    return folder


def test_every_combination_is_read_as_the_best_set_of_it_and_the_others_are_named(
    store: Path, tmp_path: Path
) -> None:
    for combination in COMBINATIONS:
        directory = tmp_path / "model"
        directory.mkdir()
        for place in combination:
            for file in SETS[place][1]:
                (directory / file).hardlink_to(store / file)
        best, *others = (SETS[place] for place in combination)
        index = open_model(directory)
        weights = [file for file in best[1] if not file.endswith(".json")]
        assert set(index) == {"shared", *(f"{best[0]}.{place}" for place in range(len(weights)))}, combination
        assert {Path(stamp.path).name for stamp in index.stamps} == set(weights)
        if not others:
            assert index.notes == ()
        else:
            (note,) = index.notes
            assert note.startswith("its weights are there more than once: ")
            taken, _, rest = note.partition(" is taken, not ")
            assert taken.endswith(quoted(best[2], 60))
            shown = [title for _, _, title in others if quoted(title, 60) in rest]
            assert len(shown) == min(4, len(others))
            assert len(others) <= 4 or f"and {len(others) - 4} more" in note
        shutil.rmtree(directory)


# --- Mistral's own names


def write_mistral(directory: Path, seed: int) -> Path:
    directory.mkdir()
    generator = torch.Generator().manual_seed(seed)
    names = [
        "tok_embeddings.weight",
        "layers.0.attention.wq.weight",
        "layers.1.attention.wq.weight",
        "output.weight",
    ]
    tensors = {name: torch.randn(16, 16, generator=generator).bfloat16() for name in names}
    save_file(tensors, directory / "consolidated.safetensors")
    (directory / "params.json").write_text(json.dumps({"dim": 16, "n_layers": 2}))
    (directory / "tekken.json").write_text('{"vocab": []}')
    return directory


@pytest.fixture
def config(tmp_path: Path) -> dict[str, Any]:
    paths = [write_mistral(tmp_path / name, seed) for seed, name in enumerate(("a", "b"))]
    models = [{"model": str(path), "parameters": {"weight": 0.5}} for path in paths]
    return {"merge_method": "linear", "models": models}


@pytest.mark.parametrize("shard_size", [10**9, 600])
def test_consolidated_weights_merge_with_their_like_under_their_own_names(
    shard_size: int, config: dict[str, Any], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    summary = merge(config, out, shard_size=shard_size)
    written = {path.name for path in out.iterdir()}
    assert {"params.json", "tekken.json"} <= written
    assert "config.json" not in written
    weights = {name for name in written if name.endswith(".safetensors")}
    if shard_size > 10**6:
        assert weights == {"consolidated.safetensors"}
    else:
        assert sorted(weights)[0] == "consolidated-00001-of-00004.safetensors"
        assert "consolidated.safetensors.index.json" in written
    assert summary.warnings == ()
    merged = {name: tensor for file in weights for name, tensor in load_file(out / file).items()}
    one, two = (load_file(tmp_path / name / "consolidated.safetensors") for name in ("a", "b"))
    for name, tensor in merged.items():
        wanted = (0.5 * one[name].double() + 0.5 * two[name].double()).bfloat16()
        assert torch.equal(tensor, wanted)
    assert merged.keys() == one.keys()
    assert verify(out, against=config, sample=None).problems == ()
    assert set(open_model(out)) == set(one)
    assert "library_name: mistral-common" in (out / "README.md").read_text()


def test_consolidated_weights_that_are_quantised_are_no_plain_floats(
    config: dict[str, Any], tmp_path: Path
) -> None:
    for name in ("a", "b"):
        file = tmp_path / name / "consolidated.safetensors"
        tensors = load_file(file)
        tensors["layers.0.attention.wq.weight"] = tensors["layers.0.attention.wq.weight"].to(
            torch.float8_e4m3fn
        )
        tensors["layers.0.attention.wq.qscale_weight"] = torch.tensor(0.01)
        save_file(tensors, file)
    with pytest.raises(InputError, match=r"quantised"):
        merge(config, tmp_path / "out")
