"""The dtype of an output tensor, where the config names none and where it names one in short."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch

from streammerge.api import merge, plan
from streammerge.config import parse_config
from streammerge.dtypes import promoted
from tests.conftest import config_for, read_tensors, write_model

TORCH = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
CODES = {dtype: code for code, dtype in TORCH.items()}


@pytest.mark.parametrize("kinds", [k for n in (1, 2, 3) for k in itertools.product(TORCH, repeat=n)])
def test_dtypes_promote_as_torch_promotes_them(kinds: tuple[str, ...]) -> None:
    wanted = TORCH[kinds[0]]
    for kind in kinds[1:]:
        wanted = torch.promote_types(wanted, TORCH[kind])
    assert promoted(kinds) == CODES[wanted]


def test_fp8_gives_way_to_wider_floats_and_two_kinds_of_it_meet_in_float32() -> None:
    assert promoted(["F8_E4M3", "F8_E4M3"]) == "F8_E4M3"
    assert promoted(["F8_E4M3", "F16"]) == "F16"
    assert promoted(["F8_E4M3", "F8_E5M2"]) == "F32"


@pytest.fixture
def mixed(tmp_path: Path) -> list[Path]:
    """A base of bfloat16 and two models: `w` in float16 and bfloat16, `v` in bfloat16 and in float32."""
    kinds = {"base": ("BF16", "BF16"), "a": ("F16", "BF16"), "b": ("BF16", "F32")}
    paths = []
    for seed, (name, (w, v)) in enumerate(kinds.items()):
        generator = torch.Generator().manual_seed(seed)
        tensors = {
            "w": torch.randn(40, 8, generator=generator).to(TORCH[w]),
            "v": torch.randn(16, generator=generator).to(TORCH[v]),
            "u": torch.randn(8, generator=generator).bfloat16(),
        }
        paths.append(write_model(tmp_path / name, tensors))
        settings = {
            "torch_dtype": "bfloat16",
            "vision_config": {"dtype": "bfloat16"},
            "text_config": {"dtype": "float16"},
        }
        (paths[-1] / "config.json").write_text(json.dumps(settings))
    return paths


@pytest.mark.parametrize(
    ("method", "members"),
    [
        ("linear", (0, 1, 2)),
        ("linear", (0, 2, 1)),
        ("task_arithmetic", (0, 1, 2)),
        ("slerp", (1, 2)),
        ("karcher", (0, 1, 2)),
    ],
)
def test_without_a_dtype_each_tensor_has_the_one_its_inputs_promote_to(
    method: str, members: tuple[int, ...], mixed: list[Path], tmp_path: Path
) -> None:
    config = config_for(method, [mixed[i] for i in members])
    if method == "slerp":
        config |= {
            "base_model": str(mixed[1]),
            "models": [{"model": str(mixed[2])}],
            "parameters": {"t": 0.3},
        }
    merge(config, tmp_path / "out")
    found = read_tensors(tmp_path / "out")
    assert {name: t.dtype for name, t in found.items()} == {
        "w": torch.float32,
        "v": torch.float32,
        "u": torch.bfloat16,
    }
    settings = json.loads((tmp_path / "out" / "config.json").read_text())
    assert settings["torch_dtype"] == "float32", "the dtype that most bytes have"
    assert settings["vision_config"] == {"dtype": "bfloat16"}, "a dtype that occurs stays"
    assert settings["text_config"] == {"dtype": "float32"}


def test_a_copy_keeps_its_dtype(mixed: list[Path]) -> None:
    config = config_for("passthrough", mixed[:1] * 2) | {"base_model": str(mixed[0])}
    assert {job.dtype for job in plan(config).jobs} == {"BF16"}


def test_a_dtype_may_be_written_in_short() -> None:
    text = "merge_method: linear\nmodels: [a]\ndtype: {}\n"
    for name, code in {
        "bf16": "BF16",
        "fp16": "F16",
        "half": "F16",
        "fp32": "F32",
        "torch.float": "F32",
        "BF16": "BF16",
        "float64": "F64",
    }.items():
        assert parse_config(text.format(name)).dtype == code
