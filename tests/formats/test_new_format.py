"""A new input format is one file of code: here int16 fixed point, big-endian, with a step for each tensor.

The code is the block of docs/build/formats.md. It is merged from end to end, in whatever memory, interrupted and continued, and
gives the bytes that the same values give as fp32 in safetensors.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

from streammerge import merge
from streammerge.checkpoint.index import open_model
from streammerge.errors import ModelError
from streammerge.formats import registry
from streammerge.methods.registry import get_method
from streammerge.report.tables import inspect_values
from streammerge.testing.laws import same_bytes_at_any_memory, same_bytes_when_interrupted
from streammerge.testing.models import output_bytes, write_model
from streammerge.testing.trial import Trial

PAGE = Path(__file__).parents[2] / "docs" / "build" / "formats.md"


@pytest.fixture(scope="module", autouse=True)
def format_is_registered(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Import the page's module, as a package would bring it."""
    block = re.search(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert block is not None
    directory = tmp_path_factory.mktemp("package")
    (directory / "fixed16.py").write_text(block[1])
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(directory)
        importlib.import_module("fixed16")
        yield
    del registry._OPENERS[".fixed16"], sys.modules["fixed16"]


def write_fixed(directory: Path, codes: Mapping[str, np.ndarray], scales: Mapping[str, float]) -> Path:
    """Write a model in the format."""
    directory.mkdir(parents=True)
    header: dict[str, object] = {}
    offset = 16 + 1024
    for name, array in codes.items():
        header[name] = {"shape": list(array.shape), "scale": scales[name], "offset": offset}
        offset += array.nbytes
    text = json.dumps(header).encode().ljust(1024)
    data = b"".join(array.astype(">i2").tobytes() for array in codes.values())
    (directory / "model.fixed16").write_bytes(b"FIXED16\n" + len(text).to_bytes(8, "big") + text + data)
    return directory


SHAPES = {"model.layers.0.w.weight": (700, 64), "model.layers.0.b.bias": (31,), "model.norm.weight": (1, 3)}


def write_pair(directory: Path, seed: int) -> tuple[Path, Path]:
    """Write the same values in the format and in safetensors."""
    rng = np.random.default_rng(seed)
    codes = {name: rng.integers(-32768, 32768, shape).astype(np.int16) for name, shape in SHAPES.items()}
    scales = dict(zip(SHAPES, (2.0**-12, 2.0**-15, 0.5), strict=True))
    values = {name: torch.from_numpy(c.astype(np.float32)) * scales[name] for name, c in codes.items()}
    fixed = write_fixed(directory / f"fixed{seed}", codes, scales)
    return fixed, write_model(directory / f"plain{seed}", values)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Path, Path]]:
    directory = tmp_path_factory.mktemp("models")
    return [write_pair(directory, seed) for seed in range(3)]


def config(paths: list[Path]) -> dict[str, object]:
    base, *models = map(str, paths)
    return {
        "merge_method": "ties",
        "base_model": base,
        "models": [{"model": model} for model in models],
        "parameters": {"density": 0.6},
    }


def weights(outputs: Mapping[str, bytes]) -> dict[str, bytes]:
    return {name: data for name, data in outputs.items() if name.endswith(".safetensors")}


def test_a_merge_has_the_bytes_of_the_same_values_in_safetensors(
    pairs: list[tuple[Path, Path]], tmp_path: Path
) -> None:
    for kind, name in enumerate(("fixed", "plain")):
        merge(config([pair[kind] for pair in pairs]), tmp_path / name, progress=False)
    found, expected = (weights(output_bytes(tmp_path / name)) for name in ("fixed", "plain"))
    assert found == expected
    assert not list((tmp_path / "fixed").glob("*.fixed16"))


def test_neither_memory_nor_interruptions_change_a_bit(
    pairs: list[tuple[Path, Path]], tmp_path: Path
) -> None:
    trial = Trial(get_method("ties"), config([fixed for fixed, _ in pairs]), tmp_path)
    assert any(work.mode == "streamed" for work in trial.plan(trial.least(), 3).work)
    same_bytes_at_any_memory(trial)
    same_bytes_when_interrupted(trial)


def test_a_file_by_itself_is_a_model_and_inspect_says_what_it_says(pairs: list[tuple[Path, Path]]) -> None:
    index = open_model(pairs[0][0] / "model.fixed16")
    assert set(index) == set(SHAPES)
    shown = {tensor["name"]: tensor for tensor in inspect_values(index)}
    assert (shown["model.norm.weight"]["dtype"], shown["model.norm.weight"]["scale"]) == ("I16", 0.5)


def test_a_file_that_is_cut_is_refused(pairs: list[tuple[Path, Path]], tmp_path: Path) -> None:
    shutil.copytree(pairs[0][0], tmp_path / "cut")
    os.truncate(tmp_path / "cut" / "model.fixed16", 20_000)
    with pytest.raises(ModelError, match="lies outside the file: download it again"):
        open_model(tmp_path / "cut")
