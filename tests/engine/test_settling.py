"""Tensors that are merged while their thresholds are counted: read once, the same bits, whatever the sample says."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import streammerge
from streammerge.engine import settling
from streammerge.engine.settling import Settler
from streammerge.errors import Stopped
from streammerge.output.journal import Receipt
from streammerge.planning import settling as rooms
from streammerge.planning.memory import allocate
from streammerge.statistics import brackets
from streammerge.statistics.ranks import INFINITE, Threshold
from streammerge.testing.models import write_models
from streammerge.testing.trial import PLENTY, capacity
from tests.conftest import config_for, output_bytes

SHAPES = {"embed.weight": (700, 120), "layers.0.norm.weight": (64,), "layers.0.up.weight": (96, 700)}
"""Two tensors that `ROOM` bytes of buffers do not hold whole, so that they are settled, and a small one."""
ROOM = 700_000
_WHOLE = 1 << 32

Models = dict[str, list[Path]]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """Write a base and three fine-tunes: in bf16, with few distinct deltas; in fp32; in both."""
    folder = tmp_path_factory.mktemp("models")
    bf16 = write_models(folder / "bf16", 3, shapes=SHAPES)
    fp32 = write_models(folder / "fp32", 3, torch.float32, shapes=SHAPES)
    fp16 = write_models(folder / "fp16", 3, torch.float16, shapes=SHAPES)
    return {"bf16": bf16, "fp32": fp32, "mixed": [fp32[0], bf16[1], fp16[2], fp32[3]]}


def merged(config: dict[str, Any], out: Path, room: int, **options: Any) -> tuple[dict[str, bytes], int]:
    """Merge with buffers of `room` bytes; return the files, and the bytes read."""
    with capacity(room, 2):
        result = streammerge.merge(config, out, device="cpu", progress=False, **options)
    return output_bytes(out), result.bytes_read


@pytest.fixture(autouse=True)
def as_with_large_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let brackets be as narrow, in elements, and have as many bins as those of tensors that are sampled better."""
    monkeypatch.setattr(brackets, "ERRORS", 1.5)
    monkeypatch.setattr(allocate, "FEWEST_BINS", 1 << 20)
    monkeypatch.setattr(
        rooms, "UNDECIDED", (8,)
    )  # one piece, of four, is undecided where ties are kept by index
    monkeypatch.setattr(settling, "MOST_OF_PIECE", 2)


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Return the names of the tensors that were merged in one pass, as they are finished."""
    names: list[str] = []
    merge = Settler.merge

    def told(self: Settler) -> list[Receipt] | None:
        receipts = merge(self)
        if receipts is not None:
            names.append(self._job.name)
        return receipts

    monkeypatch.setattr(Settler, "merge", told)
    return names


@pytest.mark.parametrize(
    ("method", "parameters", "dtypes"),
    [
        ("ties", {"density": 0.2}, "bf16"),  # ties at the threshold are drawn
        ("ties", {"density": 0.2}, "mixed"),
        ("ties", {"density": [0.0, 0.3, 0.9], "ties": "all", "weight": [1.0, 0.5, -2.0]}, "fp32"),
        ("ties", {"density": 0.5, "ties": "drop", "zero_sign": "positive"}, "bf16"),
        (
            "ties",
            {"density": 0.5, "drop_rate": 0.7},
            "bf16",
        ),  # most magnitudes are 0, and equal the threshold
        ("breadcrumbs", {"density": 0.6, "gamma": 0.05}, "bf16"),
        ("breadcrumbs_ties", {"density": 0.6, "gamma": 0.05, "drop_rate": 0.2}, "mixed"),
        ("ties", {"density": 0.3, "ties": "index", "zero_sign": "positive"}, "bf16"),
        ("ties", {"density": 0.3, "ties": "index"}, "mixed"),
        ("breadcrumbs", {"density": 0.6, "gamma": 0.05, "ties": "index"}, "bf16"),
        ("dare_linear", {"density": 0.3, "mask": "magnitude"}, "bf16"),
    ],
)
def test_tensors_larger_than_memory_are_read_once_and_merged_to_the_same_bits(
    method: str, parameters: dict[str, Any], dtypes: str, models: Models, settled: list[str], tmp_path: Path
) -> None:
    """The law of memory and the law of reading, for every policy of ties and every dtype that kernels read."""
    per_model = {key: value for key, value in parameters.items() if isinstance(value, list)}
    config = config_for(
        method, models[dtypes], parameters={k: v for k, v in parameters.items() if k not in per_model}
    )
    for key, values in per_model.items():
        for model, value in zip(config["models"], values, strict=True):
            model.setdefault("parameters", {})[key] = value
    if dtypes != "bf16":
        config["dtype"] = "float32"
    room = ROOM * (1 if dtypes == "bf16" else 2)
    expected, once = merged(config, tmp_path / "whole", PLENTY)
    assert not settled
    found, read = merged(config, tmp_path / "settled", room)
    assert found == expected
    assert set(settled) == {name for name, shape in SHAPES.items() if len(shape) == 2}
    assert (
        read <= 2 * once
    )  # tensors as small as these are sampled whole; a pass of its own would make it three times
    planned = []
    for buffers in (PLENTY, room):
        with capacity(buffers, 2):
            planned.append(streammerge.plan(config, device="cpu").bytes_to_read())
    assert planned[0] == planned[1]


WRONG = {
    "above the true threshold": (INFINITE - 2, 0, INFINITE - 1, 0),
    "below it": (0, _WHOLE, 1, 0),
    "too wide to count each pattern": (0, _WHOLE, 1 << 21, 0),
    "everything undecided": (0x3A000000, _WHOLE, 0x3A000000 + (1 << 20) - 1, 0),
}
"""What a sample may say: lower pattern and words, higher pattern and words."""


@pytest.mark.parametrize("wrong", WRONG)
def test_a_sample_that_misleads_costs_a_second_read_and_no_bit(
    wrong: str, models: Models, settled: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The brackets are forced to fail, each in its own way."""
    config = config_for("ties", models["bf16"], parameters={"density": 0.3})
    expected, _ = merged(config, tmp_path / "whole", PLENTY)
    low, low_words, high, high_words = WRONG[wrong]
    pair = Threshold(low, _WHOLE, low_words), Threshold(high, _WHOLE, high_words)
    monkeypatch.setattr(settling, "bracket", lambda keys, share, room: pair)
    found, _ = merged(config, tmp_path / "misled", ROOM)
    assert (found, settled) == (expected, [])


def test_ties_outside_of_the_words_of_a_bracket_cost_a_second_read(
    models: Models, settled: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pattern of the threshold is right, but more of its ties are taken as kept than are."""
    config = config_for("ties", models["bf16"], parameters={"density": 0.3})
    expected, _ = merged(config, tmp_path / "whole", PLENTY)
    bracket = settling.bracket

    def surer(keys: Any, share: float, room: Any) -> tuple[Threshold, Threshold]:
        low, _ = bracket(keys, share, room)
        return low, Threshold(low.key, _WHOLE, low.needed)

    monkeypatch.setattr(settling, "bracket", surer)
    found, _ = merged(config, tmp_path / "misled", ROOM)
    assert (found, settled) == (expected, [])


@pytest.mark.parametrize("action", ["_look", "_settle"])
def test_a_merge_that_stops_within_a_tensor_is_continued_to_the_same_bits(
    action: str, models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first time it stops at the third piece: while elements are undecided, and while they are settled and written."""
    config = config_for("ties", models["bf16"], parameters={"density": 0.2})
    expected, _ = merged(config, tmp_path / "whole", PLENTY)
    left = [2]
    whole: Callable[..., Any] = getattr(Settler, action)

    def stopping(self: Settler, *arguments: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise Stopped(15)
        return whole(self, *arguments)

    with monkeypatch.context() as stopped:
        stopped.setattr(Settler, action, stopping)
        with pytest.raises(Stopped):
            merged(config, tmp_path / "stopped", ROOM)
    assert merged(config, tmp_path / "stopped", ROOM)[0] == expected


def test_a_value_that_is_not_finite_is_named_as_it_is_with_plenty_of_memory(tmp_path: Path) -> None:
    """An infinite weight in the middle of a tensor that is merged in one pass."""
    paths = write_models(tmp_path / "models", 3, shapes={"embed.weight": (700, 120)})
    from safetensors.torch import load_file, save_file

    file = paths[2] / "model.safetensors"
    tensors = load_file(file)
    tensors["embed.weight"][350, 7] = float("inf")
    save_file(tensors, file, metadata={"format": "pt"})
    config = config_for("ties", paths, parameters={"density": 0.2})
    told = []
    for name, room in (("whole", PLENTY), ("settled", ROOM)):
        with pytest.raises(streammerge.StreammergeError) as failure:
            merged(config, tmp_path / name, room)
        told.append(str(failure.value))
    assert told[0] == told[1]


def test_more_models_than_a_sample_has_room_for_cost_a_second_read_and_no_bit(
    settled: list[str], tmp_path: Path
) -> None:
    """Seventy models of one small tensor: one run of each model does not fit in the memory of the sample."""
    paths = write_models(tmp_path / "models", 70, shapes={"up.weight": (8, 4096)})
    config = config_for("ties", paths, parameters={"density": 0.3})
    expected, _ = merged(config, tmp_path / "whole", PLENTY)
    found, _ = merged(config, tmp_path / "many", 2_500_000)
    assert (found, settled) == (expected, [])
